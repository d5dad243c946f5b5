"""What the DHT core tells the layer above (inside ``core.Emit``)."""

from __future__ import annotations

from dataclasses import dataclass

from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.messages.dht import SignedRecord


@dataclass(frozen=True, slots=True)
class DhtStored:
    """``store`` has succeeded: ``replicas`` nodes hold the record so far, more copies follow.

    This node is counted if it holds one. Fewer than ``DHT_STORED_ENOUGH``: there were no more.
    """

    handle: int
    key: bytes
    replicas: int


@dataclass(frozen=True, slots=True)
class DhtFound:
    """``get`` or ``get_all`` has ended. No records: those who would hold them have none.

    ``records`` are validated; ``value`` is MessagePack (``records.decode_value``). ``get`` gives at
    most one, the one with the latest expiry; ``get_all`` one per publisher in order of publisher.
    """

    handle: int
    key: bytes
    records: tuple[SignedRecord, ...]


@dataclass(frozen=True, slots=True)
class DhtFailed:
    """A call could not be answered; a later one may be.

    ``code``: unreachable (no contact answered), busy (too many calls at once), or what the holders
    of a record refused it for: full, stale, far, expired (the last two: somebody's clock is wrong),
    or replaced (this site has stored something else under the key meanwhile).
    """

    handle: int
    key: bytes
    code: str


@dataclass(frozen=True, slots=True)
class DhtBootstrapped:
    """The nodes nearest to this one have been found; ``contacts`` are in the routing table."""

    handle: int
    contacts: int


@dataclass(frozen=True, slots=True)
class DhtRefused:
    """A request of ``peer`` was refused without blame: stale, expired, far, full, token or rate."""

    peer: PeerId
    code: str


@dataclass(frozen=True, slots=True)
class DhtCrowded:
    """More nodes lie around a key (its 20-byte id) than chance puts there: the search looks wider.

    Somebody has made keys until they fell near it, or the size of the network is misjudged.
    """

    key: bytes


@dataclass(frozen=True, slots=True)
class DhtRejoined:
    """A remembered peer that was out of sight has answered again: a split may be healing."""

    peer: PeerId
