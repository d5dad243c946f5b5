"""Messages of the DHT (spec 03). A reply carries the asker's request number and goes to the asker.

Records are signed by their publisher, so anybody may pass them on.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from swarmtrain_protocols import limits
from swarmtrain_protocols.dht.ids import key_bytes
from swarmtrain_protocols.messages.common import Addresses, Count, Key, Signature

NodeId = Annotated[bytes, Meta(min_length=limits.DHT_ID_BYTES, max_length=limits.DHT_ID_BYTES)]
KeyName = Annotated[bytes, Meta(min_length=1, max_length=limits.DHT_KEY_BYTES_MAX)]
Token = Annotated[bytes, Meta(max_length=limits.DHT_TOKEN_BYTES_MAX)]


class SignedRecord(msgspec.Struct, frozen=True, array_like=True):
    """A value that ``publisher`` stands for; its sub-key under ``name`` is the publisher.

    The name itself travels, not only its hash, so that every holder can apply the rule of the
    name's prefix (``dht/validators.py``). ``expires_s`` is Unix wall clock in whole seconds. The
    signature (domain ``dht record``) covers the MessagePack array [run, name, publisher, sequence,
    expires_s, value].
    """

    name: KeyName
    publisher: Key
    sequence: Count
    expires_s: Count
    value: Annotated[bytes, Meta(max_length=limits.DHT_VALUE_BYTES_MAX)]
    signature: Signature

    @property
    def key(self) -> bytes:
        """The 20 bytes of the key id that ``name`` hashes to."""
        return key_bytes(self.name)


class NodeInfo(msgspec.Struct, frozen=True, array_like=True):
    """A peer and where it may be dialled; a hint until the link has proven the key."""

    peer: Key
    addresses: Addresses


Contacts = Annotated[tuple[NodeInfo, ...], Meta(max_length=limits.DHT_K)]


class FindNode(msgspec.Struct, frozen=True, tag="dht-node?"):
    """Asks for the k contacts nearest to ``target``; also the DHT's ping."""

    request: Count
    target: NodeId


class Nodes(msgspec.Struct, frozen=True, tag="dht-nodes"):
    """``token``: lets the asker store under ``target`` soon after (opaque to it)."""

    request: Count
    contacts: Contacts
    token: Token = b""


class FindValue(msgspec.Struct, frozen=True, tag="dht-value?"):
    """Asks for the records under ``key`` whose publisher sorts behind ``after``.

    ``after`` is empty on the first page, else the last publisher of the page before. ``known``:
    digest of the records that the asker holds under the key, if it holds any.
    """

    request: Count
    key: NodeId
    after: Annotated[bytes, Meta(max_length=32)] = b""
    known: Annotated[bytes, Meta(max_length=limits.DHT_DIGEST_BYTES)] = b""


class Values(msgspec.Struct, frozen=True, tag="dht-values"):
    """One page of records in order of publisher; contacts near the key on the first page only.

    ``same``: the records held here have the digest that the asker named; none are repeated.
    """

    request: Count
    records: Annotated[tuple[SignedRecord, ...], Meta(max_length=limits.DHT_RECORDS_PER_KEY_MAX)]
    contacts: Contacts
    more: bool = False
    token: Token = b""
    same: bool = False


class StoreRecord(msgspec.Struct, frozen=True, tag="dht-store?"):
    """``token``: from the receiver's answer to a recent request for this key."""

    request: Count
    record: SignedRecord
    token: Token = b""


class StoreReply(msgspec.Struct, frozen=True, tag="dht-store"):
    """``code``: ok, or why not (spec 03, 2.1). ``sequence``: highest seen."""

    request: Count
    code: Annotated[str, Meta(max_length=32)]
    sequence: Count = 0


Question = FindNode | FindValue | StoreRecord
Reply = Nodes | Values | StoreReply
