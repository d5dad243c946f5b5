"""The contract of every core: four calls, and effects that a shell carries out.

A core never reads a clock, opens a socket, starts a thread or draws entropy of its own:

- ``receive(now, peer, message)`` feeds one decoded message,
- ``tick(now)`` lets time pass,
- ``deadline()`` says when ``tick`` wants to be called next (``math.inf``: never),
- ``drain()`` hands out the effects in the order in which they must take place.

``now`` is monotonic seconds. One driver executes effects on real sockets and disks, the simulator
executes the same effects in virtual time.

Order matters: effects that come after a ``Persist`` must not take place before that record is
durable. That single rule is what makes votes and appended entries safe to acknowledge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NewType, Protocol

if TYPE_CHECKING:
    from swarmtrain_protocols.messages import Message

PeerId = NewType("PeerId", bytes)
"""Raw Ed25519 public key of a site, 32 bytes. Members are ordered by these bytes."""


def short_id(peer: bytes) -> str:
    """Eight hex digits for people; never used to decide anything."""
    return peer.hex()[:8]


def earliest(a_at: float, b_at: float, c_at: float = math.inf, d_at: float = math.inf) -> float:
    """The first of some times. Asked for after every message, and without a list to go through."""
    first_at = min(a_at, b_at)
    first_at = min(first_at, c_at)
    return min(first_at, d_at)


@dataclass(frozen=True, slots=True)
class Send:
    """Send a control message. The shell dials if it knows an address, else it drops and counts."""

    peer: PeerId
    message: Message


@dataclass(frozen=True, slots=True)
class Connect:
    """Have a connection to ``peer``; ``addresses`` (``host:port``) are hints to remember."""

    peer: PeerId
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Learn:
    """Where ``peer`` can be dialled; replaces what was known. No connection is made."""

    peer: PeerId
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close the connection to ``peer``, telling it why."""

    peer: PeerId
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask ``peer``, if there is a link, for a sign of life; ``answered(now, peer, rtt_s)`` follows.

    It says nothing, so it may take place at once, before records that are not durable yet.
    """

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Persist:
    """Append ``record`` to the core's durable record file and sync it.

    With ``reset`` the record replaces everything before it, atomically (compaction). ``relied``:
    others build on it, so nothing behind it may take place before; without, a shell whose disk is
    full may go on, as long as it writes the record later and in its place.
    """

    record: bytes
    reset: bool = False
    relied: bool = True


@dataclass(frozen=True, slots=True)
class Fetch:
    """Fetch chunks ``first … first+count-1`` of the blob with Merkle root ``root`` from ``peer``.

    The shell verifies every chunk against the root, puts the bytes where ``purpose`` says, and
    answers with ``fetched(now, ticket)`` or ``fetch_failed(now, ticket, reason)`` on the core.
    """

    ticket: int
    peer: PeerId
    root: bytes
    first: int
    count: int
    purpose: object


@dataclass(frozen=True, slots=True)
class CancelFetch:
    """Forget a fetch; neither answer will be given for it."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Emit:
    """Something the layer above wants to know."""

    event: object


Effect = object
"""One of the classes above, or a data-plane effect of ``rounds.effects``."""


class Core(Protocol):
    """What the driver and the simulator need from a core."""

    def receive(self, now: float, peer: PeerId, message: Message) -> None:
        """Feed one message that arrived from an authenticated peer."""

    def tick(self, now: float) -> None:
        """Let time pass; safe to call at any time."""

    def deadline(self) -> float:
        """Monotonic seconds at which ``tick`` is wanted next; ``math.inf`` if never."""

    def drain(self) -> list[Effect]:
        """Return and forget the effects produced since the last call, in order."""
