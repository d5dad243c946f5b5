"""Work that the pipeline cores ask their shell for. Cores see references, never values.

A shell (or the simulator) has one compute device per site. It answers every ``Compute`` and
``Undo`` with ``computed`` or ``compute_failed`` of ``pipeline.core.PipelineCore``, and every
``HandOver`` with ``handed_over``. An accumulator sees ``Compute``, ``Undo``, ``HandOver`` and
``ClearGradients`` in the order of these effects: what was asked for before it was cleared never
touches it afterwards.

Effects wait behind writes that others rely on. Meanwhile the trainer may die and another one come:
what was asked of the last one is void. So those effects carry ``life``, which counts lives of the
trainer (``WorkerCore.life``), and a shell drops those of a life that is over.
"""

from __future__ import annotations

from dataclasses import dataclass

from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.messages.pipeline import HopRequest, Kind, StepKey, Tensor
from swarmtrain_protocols.rounds.effects import Snapshot


@dataclass(frozen=True, slots=True)
class Compute:
    """Run one hop. ``accumulate``: add the gradient of the weights to the stage's accumulator.

    Answer ``computed(now, job, output, loss, service_s)``; with ``accumulate`` the accumulator has
    changed if and only if that answer comes.
    """

    job: int
    peer: PeerId
    stage: int
    hop: int
    kind: Kind
    step: int
    micro_batch: int
    inputs: Tensor
    gradient: Tensor
    tokens: bytes
    accumulate: bool
    life: int = 0


@dataclass(frozen=True, slots=True)
class Undo:
    """Recompute a backward and subtract its gradient from the accumulator. Answer ``computed``.

    ``peer`` sent the request and serves its tensors until the step is over.
    """

    job: int
    request: HopRequest
    stage: int
    peer: PeerId
    life: int = 0


@dataclass(frozen=True, slots=True)
class CancelCompute:
    """Forget a job that has not begun; if it has, its answer is ignored by the core."""

    job: int


@dataclass(frozen=True, slots=True)
class HandOver:
    """Encode the stage's accumulator as a contribution; the accumulator stays as it is.

    In mode ``diloco``: encode what local steps have changed since the state was taken up, θᵣ - θ.
    Answer ``handed_over(now, stage, key, root)``.
    """

    stage: int
    key: StepKey
    codec: str
    life: int = 0


@dataclass(frozen=True, slots=True)
class LocalStep:
    """Mode ``diloco``: step the stage's own weights with its accumulator, then clear that.

    The gradient is the mean over what was accumulated: each backward of one of the stage's hops is
    that share of a micro-batch. ``step`` counts local steps of the run, for the learning rate. In
    the order of the effects of an accumulator: what was asked for before is in it. No answer.
    """

    stage: int
    step: int
    life: int = 0


@dataclass(frozen=True, slots=True)
class ClearGradients:
    """Set the accumulators of these stages to zero: the step is over or dropped."""

    stages: tuple[int, ...]
    life: int = 0


OfTrainer = Compute | Undo | HandOver | LocalStep | ClearGradients
"""What changes, reads or clears the accumulators of one life of the trainer."""


@dataclass(frozen=True, slots=True)
class ServeStages:
    """What this site serves from now on: build modules, drop others. No answer.

    The state of a newly served stage arrives by the catch-up of its channel.
    """

    stages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NeedTokens:
    """The driver needs the tokens of a micro-batch: answer ``tokens(now, step, micro_batch, …)``.

    They are a pure function of (seed, step, micro_batch).
    """

    step: int
    micro_batch: int


@dataclass(frozen=True, slots=True)
class ServeTensor:
    """A message of ``step`` names this tensor by its root only, for want of room: serve its bytes.

    Comes before that message. No answer.
    """

    step: int
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class KeepCopy:
    """All chunks of another stage's snapshot are in place: offer it, instead of an older copy.

    It never becomes a state of this node. No answer.
    """

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class DropCopy:
    """The copy of this channel is not needed here any more. No answer."""

    channel: str


@dataclass(frozen=True, slots=True)
class CandidateInput:
    """A state that candidates for a lost stage are made of.

    ``what``: ``snapshot`` (an older state of the stage), ``left`` or ``right`` (of a neighbour).
    ``here``: it is this node's own canonical state of that channel; else its chunks were fetched.
    """

    what: str
    snapshot: Snapshot
    here: bool


@dataclass(frozen=True, slots=True)
class BuildCandidates:
    """Find out which weights a lost stage could get (``candidates``), from ``inputs``.

    ``norms``: of the last gradients of the left and the right stage, 0: unknown. Answer
    ``candidates_built(now, stage, names)``, at most 16 names; a snapshot's is ``snapshot``.
    """

    stage: int
    inputs: tuple[CandidateInput, ...]
    norms: tuple[float, float]


@dataclass(frozen=True, slots=True)
class TryCandidate:
    """Give the module of the stage the weights of a candidate, for ``evaluate`` hops alone.

    Answer ``candidate_ready(now, stage, name, root)`` with the hash of the state before ``round``
    that has these weights and an optimizer that starts anew, or ``candidate_failed(now, stage,
    name, reason)``.
    """

    stage: int
    name: str
    round: int


@dataclass(frozen=True, slots=True)
class AdoptCandidate:
    """The log has chosen: the state of ``TryCandidate`` becomes the canonical one, on disk too.

    The shell calls ``NodeCore.restore`` with it.
    """

    stage: int
    name: str
    round: int
    root: bytes


@dataclass(frozen=True, slots=True)
class DropCandidates:
    """Forget the inputs (``rebuild.use_of(stage)``) and candidates of a stage. No answer."""

    stage: int


@dataclass(frozen=True, slots=True)
class NeedCalibration:
    """Tokens of ``count`` held-out micro-batches, the same ones every time.

    Answer ``calibration(now, stage, batches)``; none if the corpus is not here.
    """

    stage: int
    count: int


@dataclass(frozen=True, slots=True)
class HopDone:
    """Event: figures of one hop seen by the driver, for the log of events and the dashboard."""

    peer: PeerId
    hop: int
    backward: bool
    seconds: float
    outcome: str


@dataclass(frozen=True, slots=True)
class MicroBatchPassed:
    """Event of mode ``diloco``: a driver here has brought a micro-batch through all its hops."""

    micro_batch: int
    loss: float


@dataclass(frozen=True, slots=True)
class StepDone:
    """Event: a step was committed (or dropped: ``committed`` is false) by the log."""

    step: int
    attempt: int
    committed: bool
    micro_batches: int
    loss: float
    reason: str
