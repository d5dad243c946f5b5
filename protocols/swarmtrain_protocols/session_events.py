"""What a ``SessionCore`` tells its shell."""

from __future__ import annotations

from dataclasses import dataclass

from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.messages.session import Hello


@dataclass(frozen=True, slots=True)
class Identified:
    """The other side has proven its identity."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Held:
    """The initiator's hello is admitted; with ``hold``, ``accept`` or ``refuse`` must follow."""

    peer: PeerId
    hello: Hello


@dataclass(frozen=True, slots=True)
class Opened:
    """Both hellos are admitted: ``send`` works from now on."""

    peer: PeerId
    hello: Hello


@dataclass(frozen=True, slots=True)
class Received:
    """A message of the layer above."""

    message: Message
    payload: bytes


@dataclass(frozen=True, slots=True)
class Ponged:
    """The answer to ``probe``."""

    nonce: int
    rtt_s: float


@dataclass(frozen=True, slots=True)
class Faulted:
    """The other side broke the protocol; counted, and the link ends at the third (or at once)."""

    code: str
    why: str


@dataclass(frozen=True, slots=True)
class Closed:
    """Last event of a link. ``by_peer``: the other side said so; ``opened``: it had opened."""

    code: str
    reason: str
    by_peer: bool
    opened: bool


SessionEvent = Identified | Held | Opened | Received | Ponged | Faulted | Closed
