"""Bodies of log entries. Every member derives the same ``ledger.Ledger`` from them.

An entry of the log is (index, term, body bytes); the body is one of these structs in MessagePack.
New fields are appended with defaults; unknown tags are refused, because skipping an entry forks.
"""

from __future__ import annotations

from typing import Annotated, Union

import msgspec
from msgspec import Meta

from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.messages.common import (
    Addresses,
    Channel,
    Count,
    Hash,
    Key,
    Keys,
    Name,
    Reason,
    RoundKey,
    Signature,
    Spans,
)


class Genesis(msgspec.Struct, frozen=True, tag="genesis"):
    """Entry 0: the founder's signature over (run, first steward). Domain ``genesis``."""

    run: Hash
    founder: Key
    steward: Key
    signature: Signature


class NoOp(msgspec.Struct, frozen=True, tag="noop"):
    """First entry of every leader's term."""


class MemberJoined(msgspec.Struct, frozen=True, tag="joined"):
    member: Key
    name: Name
    addresses: Addresses
    trains: bool
    holds_state: bool
    may_vote: bool
    reachable: bool
    ticket: Annotated[bytes, Meta(max_length=16)] = b""
    """Id of the ticket's capability, never its secret."""
    uses: Count = 0
    """Members that may join with this ticket, 0: any number; the ledger counts them."""
    role: Name = "trainer"
    """What the ticket is for (05 §2.5)."""
    life: Annotated[bytes, Meta(max_length=16)] = b""
    """Drawn anew by every process that serves the site (05 §2.6)."""


class MemberLeft(msgspec.Struct, frozen=True, tag="left"):
    """``reason``: leave (polite), lost (silent for longer than the suspicion time), or an order of
    the founder that begins with ``evicted``."""

    member: Key
    reason: Reason


class MemberBanned(msgspec.Struct, frozen=True, tag="banned"):
    """Turns a member out and keeps it out; ``lifted``: it may come back."""

    member: Key
    reason: Reason
    lifted: bool = False


class MemberSuspended(msgspec.Struct, frozen=True, tag="suspended"):
    """For some rounds the member owns no part and is no contributor of a state channel (08 §2.9).

    It has cost the others an attempt, or much of one.
    """

    member: Key
    reason: Reason


class TicketRevoked(msgspec.Struct, frozen=True, tag="revoked"):
    """Nobody new enters with the ticket of this id; who is in stays."""

    ticket: Annotated[bytes, Meta(min_length=8, max_length=16)]
    reason: Reason


class AllowChanged(msgspec.Struct, frozen=True, tag="allow"):
    """The allow list, which holds for newcomers from its first key on, until it is lifted.

    With a ``member``: it goes on the list, or (not ``allowed``) off it. Without one: the list is
    lifted (``allowed``: whoever has a ticket may enter), or holds as it is.
    """

    member: Annotated[bytes, Meta(max_length=32)]
    allowed: bool
    note: Name = ""


class FounderChanged(msgspec.Struct, frozen=True, tag="founder"):
    """Orders and tickets are signed with another key from here on: the run was handed over.

    ``tickets``: those that earlier founders have signed stay good. ``deed`` is the old founder's
    signature, by which those who do not know the log believe the new one (04 §2.8).
    """

    founder: Key
    tickets: bool
    reason: Reason
    deed: Signature


class StewardsChanged(msgspec.Struct, frozen=True, tag="stewards"):
    """The voters from this entry on. ``joint`` holds the previous set while both must agree."""

    voters: Annotated[tuple[Key, ...], Meta(min_length=1, max_length=limits.VOTERS_MAX)]
    joint: Annotated[tuple[Key, ...], Meta(max_length=limits.VOTERS_MAX)] = ()


class ChannelLayout(msgspec.Struct, frozen=True, array_like=True):
    """``plain``: half-open ranges of values, ascending and disjoint, without weight decay (07)."""

    channel: Channel
    values: Count
    plain: Annotated[tuple[tuple[Count, Count], ...], Meta(max_length=limits.PLAIN_RANGES_MAX)] = ()


class ModelDefined(msgspec.Struct, frozen=True, tag="model"):
    """The model of the run: hash of the ordered (name, shape, dtype) list, and θ⁰ by channel.

    ``roots`` are the state hashes of round 0, one per channel of ``layout``.
    """

    schema_hash: Hash
    layout: Annotated[tuple[ChannelLayout, ...], Meta(max_length=limits.CHANNELS_MAX)]
    roots: Annotated[tuple[Hash, ...], Meta(max_length=limits.CHANNELS_MAX)]
    author: Key


class DataDefined(msgspec.Struct, frozen=True, tag="data"):
    """The data that are dealt in shards (13): samples in an epoch, and a hash that names them."""

    samples: Count
    digest: Hash
    author: Key


class Contributor(msgspec.Struct, frozen=True, array_like=True):
    """One contribution admitted to an attempt; its weight is ``samples`` times ``discount``.

    ``claims``: positions in it, ascending (13).
    """

    member: Key
    root: Hash
    samples: float
    base_round: Count
    claims: Spans = ()
    discount: float = 1.0
    """Declared for one that is late, or of several phases (08 §2.8); 1 for one in time."""


class Part(msgspec.Struct, frozen=True, array_like=True):
    """A slice of whole chunks, who reduces it, and who takes over if the owner is lost."""

    first: Count
    count: Count
    owner: Key
    deputy: Key


class RoundOpened(msgspec.Struct, frozen=True, tag="opened"):
    """Everything that fixes the bytes of an attempt. Contributors are in member order.

    ``holders`` are the members whose having the result (and the state before) decides the commit.
    ``state_hash`` pins the state that this round is applied to (all zero for groups).
    """

    key: RoundKey
    contributors: Annotated[tuple[Contributor, ...], Meta(max_length=limits.MEMBERS_MAX)]
    parts: Annotated[tuple[Part, ...], Meta(max_length=limits.PARTS_MAX)]
    holders: Keys
    values: Count
    scatter_codec: Annotated[str, Meta(max_length=16)]
    gather_codec: Annotated[str, Meta(max_length=16)]
    state_hash: Hash
    phase_s: float = 0.0
    """Seconds of a phase of the faster half (08 §2.8), 0: not known. Sites aim at it."""


class Coefficient(msgspec.Struct, frozen=True, array_like=True):
    """Contributor index and its coefficient, an fp32 value."""

    index: Count
    value: float


class RoundSet(msgspec.Struct, frozen=True, tag="set"):
    """Who is summed, with which coefficients, in every part alike."""

    key: RoundKey
    coefficients: Annotated[tuple[Coefficient, ...], Meta(max_length=limits.MEMBERS_MAX)]
    norms: Annotated[tuple[float, ...], Meta(max_length=limits.MEMBERS_MAX)] = ()
    """Of the contributions in this order, as their owners measured them (15); none in groups."""


class RoundCommitted(msgspec.Struct, frozen=True, tag="committed"):
    """The one outcome of a round: Merkle root over all encoded result chunks."""

    key: RoundKey
    root: Hash
    held_by: Keys = ()


class RoundAborted(msgspec.Struct, frozen=True, tag="aborted"):
    key: RoundKey
    reason: Reason


class Paused(msgspec.Struct, frozen=True, tag="paused"):
    reason: Reason


class Resumed(msgspec.Struct, frozen=True, tag="resumed"):
    reason: Reason


class CheckpointMade(msgspec.Struct, frozen=True, tag="checkpoint"):
    channel: Channel
    round: Count
    state_hash: Hash
    holders: Keys


class Rewound(msgspec.Struct, frozen=True, tag="rewound"):
    """A new generation starts from older states: (channel, round, state hash) triples.

    ``ordered``: the founder wants it so; else data was lost.
    """

    generation: Count
    reason: Reason
    channels: Annotated[tuple[Channel, ...], Meta(max_length=limits.CHANNELS_MAX)]
    rounds: Annotated[tuple[Count, ...], Meta(max_length=limits.CHANNELS_MAX)]
    roots: Annotated[tuple[Hash, ...], Meta(max_length=limits.CHANNELS_MAX)]
    ordered: bool = False


class StageAssigned(msgspec.Struct, frozen=True, tag="stage"):
    """The stages that ``member`` serves from this entry on (pipelines, spec 11); none: empty."""

    member: Key
    stages: Annotated[tuple[Count, ...], Meta(max_length=limits.HOPS_MAX)]
    reason: Reason


class StageSum(msgspec.Struct, frozen=True, array_like=True):
    """What fixes the bytes of one stage's sum in a step; the fields are those of RoundOpened."""

    stage: Count
    contributors: Annotated[tuple[Contributor, ...], Meta(max_length=limits.MEMBERS_MAX)]
    parts: Annotated[tuple[Part, ...], Meta(max_length=limits.PARTS_MAX)]
    holders: Keys
    state_hash: Hash


class StepClosed(msgspec.Struct, frozen=True, tag="step"):
    """Closes the set of a step for all stages at once: opened and chosen in one entry.

    ``digest`` names the plan: the set of micro-batches and the owner of each at every hop.
    Every contribution is the sum of the gradients its worker owns and counts with coefficient
    1 / ``micro_batches``. ``loss`` is the mean over the set as drivers reported it, -1: unknown.
    """

    generation: Count
    step: Count
    attempt: Count
    digest: Hash
    micro_batches: Count
    loss: float
    scatter_codec: Annotated[str, Meta(max_length=16)]
    gather_codec: Annotated[str, Meta(max_length=16)]
    stages: Annotated[tuple[StageSum, ...], Meta(max_length=limits.HOPS_MAX)]


class StageOutcome(msgspec.Struct, frozen=True, array_like=True):
    """Root of a stage's result, the squared norm of its gradient before clipping, its holders."""

    stage: Count
    root: Hash
    square_norm: float
    held_by: Keys


class StepOutcome(msgspec.Struct, frozen=True, tag="step-done"):
    """Commits all stages of a step or, with no ``stages``, none. ``scale``: fp32, clips once.

    ``skip``: the block stage that the first micro-batches of the next step leave out, 0: none.
    """

    generation: Count
    step: Count
    attempt: Count
    stages: Annotated[tuple[StageOutcome, ...], Meta(max_length=limits.HOPS_MAX)]
    scale: float
    reason: Reason
    skip: Count = 0


class StageLost(msgspec.Struct, frozen=True, tag="stage-lost"):
    """Nobody who holds the state of ``stage`` is left; the step in progress is dropped everywhere.

    ``host`` rebuilds the stage from candidates.
    """

    stage: Count
    step: Count
    host: Key
    reason: Reason


class StageRecovered(msgspec.Struct, frozen=True, tag="stage-back"):
    """``stage`` lives again: candidates by name with their calibration losses, and the choice.

    ``inputs`` are the state hashes the candidates were made of, ``root`` is the new state before
    ``step``. The stage's generation grows by one: what belongs to the dead one is refused.
    """

    stage: Count
    step: Count
    host: Key
    candidates: Annotated[tuple[Annotated[str, Meta(max_length=32)], ...], Meta(max_length=16)]
    losses: Annotated[tuple[float, ...], Meta(max_length=16)]
    choice: Count
    inputs: Annotated[tuple[Hash, ...], Meta(max_length=16)]
    root: Hash


class RunEnded(msgspec.Struct, frozen=True, tag="ended"):
    reason: Reason


class ConfigChanged(msgspec.Struct, frozen=True, tag="config"):
    """From ``at_round`` on, in every state channel, run key ``key`` has ``value``.

    ``overlap``, ``off`` or ``eager``, in runs whose run key says ``auto``, is the leader's; the
    keys of ``changes.IN_FLIGHT`` are the founder's, and ``value`` is their text (05 §1.6).
    """

    at_round: Count
    key: Name
    value: Name
    reason: Reason


EntryBody = Union[  # noqa: UP007
    Genesis,
    NoOp,
    MemberJoined,
    MemberLeft,
    MemberBanned,
    MemberSuspended,
    TicketRevoked,
    AllowChanged,
    FounderChanged,
    StewardsChanged,
    ModelDefined,
    DataDefined,
    RoundOpened,
    RoundSet,
    RoundCommitted,
    RoundAborted,
    Paused,
    Resumed,
    CheckpointMade,
    Rewound,
    StageAssigned,
    StepClosed,
    StepOutcome,
    StageLost,
    StageRecovered,
    RunEnded,
    ConfigChanged,
]

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[EntryBody] = msgspec.msgpack.Decoder(EntryBody)


def encode_body(body: EntryBody) -> bytes:
    """MessagePack bytes of an entry body, the bytes that are hashed into the chain."""
    return _encoder.encode(body)


def decode_body(data: bytes) -> EntryBody:
    """Decode an entry body.

    Raises:
        PeerFault: ``malformed`` for anything outside the schema.
    """
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PeerFault("malformed", str(error)) from None
