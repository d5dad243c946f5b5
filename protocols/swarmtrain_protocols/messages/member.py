"""Messages of entering and leaving a run."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from swarmtrain_protocols import limits
from swarmtrain_protocols.messages.common import (
    Addresses,
    Capability,
    Channel,
    Count,
    Hash,
    Key,
    Name,
    Reason,
)


class ManifestRequest(msgspec.Struct, frozen=True, tag="manifest?"):
    run: Hash


class ManifestReply(msgspec.Struct, frozen=True, tag="manifest"):
    """The manifest's bytes; their BLAKE3 hash must be the run id."""

    manifest: Annotated[bytes, Meta(max_length=limits.MANIFEST_BYTES_MAX)]


class JoinRequest(msgspec.Struct, frozen=True, tag="join?"):
    """Asks the leader for an entry MEMBER_JOINED. Whoever does not lead answers ``Redirect``.

    ``capability`` is the signed capability of a ticket; ``votes`` asks to become a steward, which
    only a capability with the grant allows. ``reachable``: others may dial ``addresses``.
    """

    name: Name
    addresses: Addresses
    capability: Capability
    trains: bool
    holds_state: bool
    votes: bool
    reachable: bool
    life: Annotated[bytes, Meta(max_length=16)] = b""


class Redirect(msgspec.Struct, frozen=True, tag="redirect"):
    """The leader as far as the sender knows; no leader: an empty key."""

    leader: Annotated[bytes, Meta(max_length=32)]
    addresses: Addresses


class JoinRefused(msgspec.Struct, frozen=True, tag="join-refused"):
    code: Name
    reason: Reason


class LeaveRequest(msgspec.Struct, frozen=True, tag="leave"):
    """A leave, sent to the leader; it becomes MEMBER_LEFT.

    Polite by default: after what counts on the member. ``at_once``: it is going down now.
    """

    reason: Reason
    at_once: bool = False


class Propose(msgspec.Struct, frozen=True, tag="propose"):
    """A member asks the leader to log ``body``; only the kinds that members may ask for.

    Orders of the operator carry the founder's signature, and the index ``at`` that it covers.
    """

    body: Annotated[bytes, Meta(max_length=limits.ENTRY_BYTES_MAX)]
    at: Count = 0
    signature: Annotated[bytes, Meta(max_length=64)] = b""


class StateReport(msgspec.Struct, frozen=True, tag="state"):
    """Where a state holder stands in one channel: it has all rounds below ``round``.

    ``ready``: it is in step, so it counts as a holder. ``trains``: a trainer is at work here, so
    its contributions are worth waiting for.
    """

    generation: Count
    channel: Channel
    round: Count
    state_hash: Hash
    ready: bool
    trains: bool


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """The sender's trainer has done all its planned steps; when all have, the run ends."""

    generation: Count
    finished: bool


class SnapshotQuery(msgspec.Struct, frozen=True, tag="state-snapshot?"):
    """Which snapshots of a channel's state can the receiver serve?"""

    channel: Channel


class SnapshotOffer(msgspec.Struct, frozen=True, tag="state-snapshot"):
    """Snapshots on offer, oldest first: states before ``rounds[i]`` with state hash ``roots[i]``.

    Trusted only if the log pins the same hash for that round.
    """

    channel: Channel
    rounds: Annotated[tuple[Count, ...], Meta(max_length=8)]
    roots: Annotated[tuple[Hash, ...], Meta(max_length=8)]


class Metrics(msgspec.Struct, frozen=True, tag="metrics"):
    """A member's figures after a round, relayed by stewards to subscribers, never logged."""

    member: Key
    body: Annotated[bytes, Meta(max_length=4096)]
