"""What the log says about a pipeline: who serves which stage, which step is next, what is lost.

The ledger's part for spec 11. In ``sync`` mode every stage channel moves with the step: its round
is the step, its attempt the step's attempt, and only STEP_CLOSED and STEP_OUTCOME open and decide
it. In ``diloco`` mode stage channels have ordinary rounds, and the step stays 0.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.messages.pipeline import StepKey

if TYPE_CHECKING:
    from swarmtrain_protocols.channels import ChannelState
    from swarmtrain_protocols.ledger import Ledger

KEPT = "kept"
"""The candidate that is the lost state itself, come back with its optimizer."""
NORM_STEPS = 20.0
"""Time constant of the running square norm, in steps."""


class StageState(msgspec.Struct):
    """One stage. ``generation`` counts its recoveries; ``host`` rebuilds it while it is lost."""

    generation: int = 0
    host: bytes = b""
    square_norm: float = 0.0
    """Running mean of the squared norm of its gradient before clipping; 0: no step yet."""
    recovered_step: int = -1
    """The step before which it was last rebuilt with an optimizer that starts anew, -1: never."""


class PipelineState(msgspec.Struct):
    """``stages`` by number, the ends first; none: the run is no pipeline. See the module."""

    mode: str = ""
    stages: list[StageState] = []
    step: int = 0
    attempt: int = 0
    era: int = 0
    """Counts stages lost. What was computed for a step in another era counts for nothing."""
    assigned: dict[bytes, tuple[int, ...]] = {}
    closed: e.StepClosed | None = None
    skip: int = 0
    """The block stage that some micro-batches of this step leave out (``paths``), 0: none."""
    loss: float = -1.0
    """Mean over the micro-batches of the latest committed step; below 0: nobody has said it."""
    micro_batches: int = 0
    """Those in the latest committed step."""
    aborted: int = 0
    last_abort: str = ""

    @property
    def blocks(self) -> int:
        """Number of block stages."""
        return max(0, len(self.stages) - 1)

    def lost(self) -> list[int]:
        """Stages that nobody holds the state of."""
        return [number for number, stage in enumerate(self.stages) if stage.host]

    def serving(self, stage: int) -> list[bytes]:
        """Members that the stage is assigned to, in member order."""
        return [k for k in sorted(self.assigned) if stage in self.assigned[k]]

    def follows(self, member: bytes, channel: str) -> bool:
        """Whether ``member`` is to hold the state of ``channel``: one of a stage it serves."""
        return channel in [stage_channel(s) for s in self.assigned.get(member, ())]

    def recovered_step(self, channel: str) -> int:
        """The step that the latest recovery of a stage came before; -1: never."""
        return self.stages[int(channel.split("/")[1])].recovered_step

    def fits(self, body: e.ModelDefined) -> bool:
        """Whether a model has exactly the channels of this run's stages."""
        names = [item.channel for item in body.layout]
        return not self.stages or names == [stage_channel(s) for s in range(len(self.stages))]


def pipeline_state(stages: int, mode: str) -> PipelineState:
    """The beginning of a run with that many block stages; 0: no pipeline."""
    if not stages:
        return PipelineState()
    return PipelineState(mode=mode, stages=[StageState() for _ in range(stages + 1)])


def stage_channel(stage: int) -> str:
    """The channel whose canonical state is that of ``stage``."""
    return f"train/{stage}/0"


def step_key(ledger: Ledger) -> StepKey:
    """The attempt at a step that can be closed next, or is."""
    state = ledger.pipeline
    return StepKey(ledger.generation, state.step, state.attempt)


def may_rewind(ledger: Ledger, body: e.Rewound) -> bool:
    """In sync mode all stages go back to the same step, or none does."""
    if ledger.pipeline.mode != "sync":
        return True
    wanted = [stage_channel(s) for s in range(len(ledger.pipeline.stages))]
    named = [name for name in body.channels if name.startswith("train/")]
    rounds = {r for name, r in zip(body.channels, body.rounds, strict=True) if name in wanted}
    return sorted(named) == sorted(wanted) and len(rounds) == 1


def rewound(ledger: Ledger) -> None:
    """The channels went back: so does the step, and no stage is lost any more."""
    state = ledger.pipeline
    if not state.stages:
        return
    state.attempt, state.closed, state.skip = 0, None, 0
    if state.mode == "sync":
        state.step = ledger.channels[stage_channel(0)].round
    for stage in state.stages:
        stage.host = b""
        if stage.recovered_step > state.step:
            stage.recovered_step = -1


def _channel(ledger: Ledger, stage: int) -> ChannelState | None:
    return ledger.channels.get(stage_channel(stage))


def _assigned(ledger: Ledger, index: int, body: e.StageAssigned) -> bool:
    state, stages = ledger.pipeline, body.stages
    if body.member not in ledger.members or list(stages) != sorted(set(stages)):
        return False
    if len(stages) > limits.CHANNELS_SERVED_MAX or any(s >= len(state.stages) for s in stages):
        return False
    state.assigned.pop(body.member, None)
    if stages:
        state.assigned[body.member] = stages
    return True


def _sum_fits(ledger: Ledger, item: e.StageSum) -> bool:
    members = [c.member for c in item.contributors]
    weights = [c.samples for c in item.contributors]
    return (
        len(members) > 0
        and members == sorted(set(members))
        and all(0 < w <= limits.SAMPLES_MAX for w in weights)
        and len(item.parts) > 0
        and len(item.holders) > 0
        and _channel(ledger, item.stage) is not None
    )


def _closed(ledger: Ledger, index: int, body: e.StepClosed) -> bool:
    state = ledger.pipeline
    if state.mode != "sync" or ledger.ended or ledger.paused:
        return False
    if state.closed is not None or state.lost():
        return False
    if (body.generation, body.step, body.attempt) != msgspec.structs.astuple(step_key(ledger)):
        return False
    if [item.stage for item in body.stages] != list(range(len(state.stages))):
        return False
    if not 0 < body.micro_batches <= limits.MICRO_BATCHES_MAX or not math.isfinite(body.loss):
        return False
    if not all(_sum_fits(ledger, item) for item in body.stages):
        return False
    share = _fp32(1.0 / body.micro_batches)
    for item in body.stages:
        channel = ledger.channels[stage_channel(item.stage)]
        key = RoundKey(body.generation, channel.name, body.step, body.attempt)
        assert (channel.round, channel.attempt) == (body.step, body.attempt), key
        opened = e.RoundOpened(
            key,
            item.contributors,
            item.parts,
            item.holders,
            channel.values,
            body.scatter_codec,
            body.gather_codec,
            item.state_hash,
        )
        channel.begin(index, opened, limits.HISTORY_RECORDS_MAX // len(ledger.channels))
        everybody = range(len(item.contributors))
        channel.chosen = e.RoundSet(key, tuple(e.Coefficient(i, share) for i in everybody))
    state.closed = body
    return True


def _outcome(ledger: Ledger, index: int, body: e.StepOutcome) -> bool:
    state, closed = ledger.pipeline, ledger.pipeline.closed
    if closed is None:
        return False
    if (body.generation, body.step, body.attempt) != msgspec.structs.astuple(step_key(ledger)):
        return False
    if not body.stages:
        _drop_attempt(ledger, body.reason)
        return True
    if [item.stage for item in body.stages] != list(range(len(state.stages))):
        return False
    norms = [item.square_norm for item in body.stages]
    if not all(0.0 <= value < math.inf for value in norms):
        return False
    if not 0.0 < body.scale <= 1.0 or body.scale != _fp32(body.scale) or body.skip > state.blocks:
        return False
    for item in body.stages:
        channel = ledger.channels[stage_channel(item.stage)]
        channel.commit(index, item.root, item.held_by, len(ledger.channels), body.scale)
        stage = state.stages[item.stage]
        known = stage.square_norm or item.square_norm
        stage.square_norm = known + (item.square_norm - known) / NORM_STEPS
    state.loss, state.micro_batches = closed.loss, closed.micro_batches
    state.step, state.attempt, state.closed = state.step + 1, 0, None
    state.skip = body.skip
    ledger.rounds_committed += 1
    return True


def _drop_attempt(ledger: Ledger, reason: str) -> None:
    """The next attempt at the same step, in all stages alike."""
    state = ledger.pipeline
    if state.closed is not None:
        ledger.rounds_aborted += 1
        state.aborted += 1
        state.last_abort = reason
    state.closed = None
    state.attempt += 1
    for stage in range(len(state.stages)):
        channel = _channel(ledger, stage)
        if channel is not None and channel.open is not None:
            channel.abort(reason)
        elif channel is not None:
            channel.attempt += 1


def _lost(ledger: Ledger, index: int, body: e.StageLost) -> bool:
    """Loses a stage, or names another host for one that is lost."""
    state = ledger.pipeline
    if body.stage >= len(state.stages) or body.host not in ledger.members or ledger.ended:
        return False
    channel, stage = _channel(ledger, body.stage), state.stages[body.stage]
    if channel is None or body.step != channel.round or body.host == stage.host:
        return False
    if not stage.host:
        state.era += 1
        if state.mode == "sync":
            _drop_attempt(ledger, f"stage {body.stage} is lost")
        elif channel.open is not None:
            channel.abort("the stage is lost")
            ledger.rounds_aborted += 1
    stage.host = body.host
    return True


def _recovered(ledger: Ledger, index: int, body: e.StageRecovered) -> bool:
    state = ledger.pipeline
    if body.stage >= len(state.stages):
        return False
    channel, stage = _channel(ledger, body.stage), state.stages[body.stage]
    if channel is None or not stage.host:
        return False
    if (body.step, body.host) != (channel.round, stage.host):
        return False
    if len(body.candidates) != len(body.losses) or body.choice >= len(body.candidates):
        return False
    attempt = channel.attempt
    channel.restart(body.step, body.root)
    channel.attempt = attempt
    # Whoever holds an older state cannot reach the new one by results: it takes a snapshot.
    channel.history.clear()
    stage.host, stage.generation = b"", stage.generation + 1
    if body.candidates[body.choice] != KEPT:
        stage.recovered_step = body.step
    return True


def _fp32(value: float) -> float:
    """The nearest fp32 value, ties to even (IEEE 754)."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


HANDLERS: dict[type, Callable[[Ledger, int, Any], bool]] = {
    e.StageAssigned: _assigned,
    e.StepClosed: _closed,
    e.StepOutcome: _outcome,
    e.StageLost: _lost,
    e.StageRecovered: _recovered,
}
