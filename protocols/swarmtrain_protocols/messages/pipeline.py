"""Messages of pipelines: hops of a micro-batch, leases, and the close of a step (spec 11).

Tensors travel as references: small ones inline, larger ones are fetched by Merkle root from the
sender of the message (spec 09). What a driver kept as sent is what a retry carries again.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from swarmtrain_protocols import limits
from swarmtrain_protocols.messages.common import Count, Hash, Key, Name, Reason

Path = Annotated[tuple[Count, ...], Meta(min_length=1, max_length=limits.HOPS_MAX)]
Tokens = Annotated[bytes, Meta(max_length=limits.HOP_INLINE_BYTES_MAX)]
Kind = Literal["forward", "backward", "evaluate", "generate"]
"""``forward`` keeps nothing; ``backward`` recomputes, accumulates once and answers the gradient of
the hop's input (the head's does forward and backward in one); ``evaluate`` is a forward that is not
part of a step (the head answers the loss); ``generate`` answers logits of the last position."""


class StepKey(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Names one attempt at closing a step; ``generation`` is the run's."""

    generation: Count
    step: Count
    attempt: Count


class Tensor(msgspec.Struct, frozen=True, array_like=True):
    """An encoded activation or gradient: ``data`` if it is small, else ``root`` to fetch it by.

    ``root`` is the Merkle root of the bytes cut in chunks of 1 MiB; all zero for an empty tensor.
    """

    root: Hash
    nbytes: Annotated[int, Meta(ge=0, le=limits.ACTIVATION_BYTES_MAX)]
    data: Annotated[bytes, Meta(max_length=limits.HOP_INLINE_BYTES_MAX)] = b""


EMPTY = Tensor(bytes(32), 0)


class HopId(msgspec.Struct, frozen=True, array_like=True, order=True):
    """One issue of one hop of one micro-batch. ``attempt`` numbers a driver's issues of it."""

    generation: Count
    step: Count
    micro_batch: Count
    hop: Count
    backward: bool
    attempt: Count


class HopRequest(msgspec.Struct, frozen=True, tag="hop?"):
    """Driver -> worker. ``tokens``: encoded ids [batch, time + 1] (spec 06 §1.2; of
    ``generate`` [batch, time]), for embedding and head only.

    ``version``: the number of optimizer steps that the stage must have applied.
    ``stage_generation`` is the era of the ledger, which grows when any stage is lost: a gradient
    also descends from the weights of the other stages of its path.
    """

    id: HopId
    kind: Kind
    version: Count
    stage_generation: Count
    path: Path
    inputs: Tensor
    gradient: Tensor
    tokens: Tokens = b""


class HopReply(msgspec.Struct, frozen=True, tag="hop"):
    """Worker -> driver. ``output``: activation, or gradient of the hop's input.

    ``queued`` requests wait at the worker; ``service_s`` went into the computation.
    """

    id: HopId
    output: Tensor
    loss: float
    queued: Count
    service_s: float


class HopRefused(msgspec.Struct, frozen=True, tag="hop-refused"):
    """not_served, not_ready, stale (the worker is further), closing, busy, malformed, failed.

    ``share``: generation has had its share of the worker's time.
    """

    id: HopId
    code: Name
    reason: Reason = ""


class LeaseRequest(msgspec.Struct, frozen=True, tag="lease?"):
    """Driver -> leader: room for so many more micro-batches of this step.

    ``working`` are those that the driver is at: a leader that is new takes them as leased to it.
    """

    generation: Count
    step: Count
    room: Annotated[int, Meta(ge=0, le=limits.MICRO_BATCHES_MAX)]
    working: Annotated[tuple[Count, ...], Meta(max_length=limits.MICRO_BATCHES_MAX)] = ()


class Lease(msgspec.Struct, frozen=True, tag="lease"):
    """Leader -> driver: these micro-batches are yours for ``ttl_s``, renewed by every request.

    ``redo`` lists (hop, micro-batch) pairs whose backward is in no living accumulator any more:
    a driver that still keeps their tensors sends only those again.
    """

    generation: Count
    step: Count
    micro_batches: Annotated[tuple[Count, ...], Meta(max_length=limits.MICRO_BATCHES_MAX)]
    ttl_s: float
    redo: Annotated[tuple[tuple[Count, Count], ...], Meta(max_length=limits.REDO_MAX)] = ()


class MicroBatchDone(msgspec.Struct, frozen=True, tag="mb-done"):
    """Driver -> leader: all hops answered. Pacing and figures only, never correctness."""

    generation: Count
    step: Count
    micro_batch: Count
    loss: float
    abandoned: bool = False


class HopClaims(msgspec.Struct, frozen=True, array_like=True):
    """Micro-batches of one hop in an accumulator: a bitmap (bit k % 8 of byte k // 8).

    ``skipped`` is the inner hop that their paths leave out, 0: none. Claims of two paths are two
    lists, since the hops of a micro-batch must descend from each other.
    """

    hop: Count
    micro_batches: Annotated[bytes, Meta(max_length=limits.MICRO_BATCHES_MAX // 8)]
    skipped: Count = 0


class CloseQuery(msgspec.Struct, frozen=True, tag="close?"):
    """Leader -> workers: take no more backwards of this step, and say what you have."""

    key: StepKey
    query: Count


class CloseAnswer(msgspec.Struct, frozen=True, tag="close"):
    """Worker -> leader: the have-set of each hop.

    Also the answer to a ``StepPlan`` that asks for what the sender does not have (any more).
    """

    key: StepKey
    query: Count
    claims: Annotated[tuple[HopClaims, ...], Meta(max_length=limits.CLAIMS_MAX)]


class Reopen(msgspec.Struct, frozen=True, tag="reopen"):
    """Leader -> workers: the set was not complete; go on. Answers to older queries are void."""

    key: StepKey
    query: Count


class HopOwners(msgspec.Struct, frozen=True, array_like=True):
    """Owner of each micro-batch of the set at one hop, as an index into ``StepPlan.members``."""

    hop: Count
    owners: Annotated[tuple[Count, ...], Meta(max_length=limits.MICRO_BATCHES_MAX)]


class StepPlan(msgspec.Struct, frozen=True, tag="plan"):
    """Leader -> workers: the set of the step and one owner per hop and micro-batch.

    Whoever has accumulated what it does not own takes it out again, encodes the rest and answers
    ``StepReady``. STEP_CLOSED names this message by the BLAKE3 hash of its MessagePack bytes.
    """

    key: StepKey
    query: Count
    members: Annotated[tuple[Key, ...], Meta(max_length=limits.MEMBERS_MAX)]
    micro_batches: Annotated[tuple[Count, ...], Meta(max_length=limits.MICRO_BATCHES_MAX)]
    owners: Annotated[tuple[HopOwners, ...], Meta(max_length=limits.HOPS_MAX)]


class StepReady(msgspec.Struct, frozen=True, tag="step-ready"):
    """Worker -> leader: the encoded sum of the owned gradients of ``stage`` has this root.

    ``digest`` is the plan's. ``owned`` counts owned (hop, micro-batch) pairs.
    """

    key: StepKey
    digest: Hash
    stage: Count
    root: Hash
    owned: Count


class StageReport(msgspec.Struct, frozen=True, array_like=True):
    """How a worker stands in one stage it serves; rates are measured, 0 while unknown."""

    stage: Count
    version: Count
    ready: bool
    seconds_per_sample: float


class WorkerReport(msgspec.Struct, frozen=True, tag="worker"):
    """Worker -> leader, and to drivers that ask: what it serves, whether it may be given more.

    ``values_max`` is the room for parameters that the site offers (0: it has no trainer now).
    """

    generation: Count
    stages: Annotated[tuple[StageReport, ...], Meta(max_length=limits.HOPS_MAX)]
    values_max: Count
    queued: Count
