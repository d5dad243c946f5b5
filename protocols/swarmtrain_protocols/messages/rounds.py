"""Messages of one round, from READY to the report of holding its result.

Bulk bytes never travel in these: they are fetched by Merkle root (``fetch``).
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from swarmtrain_protocols import limits
from swarmtrain_protocols.messages.common import (
    Channel,
    Count,
    Hash,
    Key,
    RoundKey,
    Signature,
    Spans,
)

Codec = Annotated[str, Meta(max_length=16)]


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """A contribution is encoded and committed to by ``root``; member -> leader.

    ``values`` is the length of the vector, ``samples`` what it was trained on, ``base_round`` the
    canonical round that its trainer last saw. ``expect`` is the number of contributors that a group
    call waits for (0: every member that has called before).
    """

    generation: Count
    channel: Channel
    root: Hash
    values: Count
    codec: Codec
    samples: float
    base_round: Count
    expect: Count = 0
    seen: Count = 0
    """Log index up to which the sender has applied: what was listed after it is no news to it."""
    phase_s: float = 0.0
    """Seconds of inner steps between two contributions of any channel, 0: not known."""
    exchange_s: float = 0.0
    """Seconds that the sender's last exchange in this channel took, 0: not known."""
    claims: Spans = ()
    """Positions in the data of the run that it was trained on (13)."""
    up_bytes_per_s: float = 0.0
    """What the sender's uplink was measured to carry, or its cap; 0: not known."""
    down_bytes_per_s: float = 0.0
    age: Count = 0
    """How many of the phases in it were handed over before, and returned (08 §2.8)."""


class Withdraw(msgspec.Struct, frozen=True, tag="withdraw"):
    """Takes a ``Ready`` back: timeout of the caller, polite leave, or bytes lost by a crash.

    Member -> leader.
    """

    generation: Count
    channel: Channel
    root: Hash


class PartsHeld(msgspec.Struct, frozen=True, tag="held"):
    """Which contributors (indices) have delivered all of ``part``; owner -> leader.

    ``refused``: those whose bytes match their root and are no valid contribution. ``squares``: of
    each of ``contributors`` the sum of the squares of its decoded part, where norms count (15).
    """

    key: RoundKey
    part: Count
    contributors: Annotated[tuple[Count, ...], Meta(max_length=limits.MEMBERS_MAX)]
    refused: Annotated[tuple[Count, ...], Meta(max_length=limits.MEMBERS_MAX)] = ()
    squares: Annotated[tuple[float, ...], Meta(max_length=limits.MEMBERS_MAX)] = ()


class TakeOver(msgspec.Struct, frozen=True, tag="takeover"):
    """``part`` is computed by ``deputy`` from now on; leader -> everybody in the round.

    Harmless if it is wrong: a deputy computes the same bytes as the owner.
    """

    key: RoundKey
    part: Count
    deputy: Key


class PartResult(msgspec.Struct, frozen=True, tag="result"):
    """The encoded result of ``part`` has Merkle root ``root``; signed by who computed it.

    Sent by the owner to everybody who needs the result, relayed by anybody on ``RoundQuery``.
    """

    key: RoundKey
    part: Count
    root: Hash
    owner: Key
    signature: Signature


class Holding(msgspec.Struct, frozen=True, tag="holding"):
    """The sender has all result bytes, under this root, and the state before; member -> leader.

    ``square_norm``: of the decoded result, summed in binary64; for stages of a pipeline (11).
    """

    key: RoundKey
    root: Hash
    durable: bool
    square_norm: float = 0.0


class Complaint(msgspec.Struct, frozen=True, tag="complaint"):
    """Results that the sender lacks, and signed ones that are not legal; receiver -> leader."""

    key: RoundKey
    missing: Annotated[tuple[Count, ...], Meta(max_length=limits.PARTS_MAX)]
    spoiled: Annotated[tuple[PartResult, ...], Meta(max_length=limits.SPOILED_TOLD_MAX)] = ()


class RoundQuery(msgspec.Struct, frozen=True, tag="round?"):
    """Asks for what the receiver knows of an attempt; its PartResult messages come back."""

    key: RoundKey
