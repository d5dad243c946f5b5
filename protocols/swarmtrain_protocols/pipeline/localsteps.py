"""Mode ``diloco``: a worker steps its stages by itself and contributes what that has changed.

Spec 11 §2.8. Stands in the place of ``sums.Sums`` behind a ``WorkerCore``. The weights and the
optimizer are the shell's; here is counted which micro-batches are in an accumulator, when a local
step is due, and when the steps since the last round go into the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Effect, PeerId
from swarmtrain_protocols.ledger import ChannelState, Ledger
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.messages.pipeline import HopRequest, StepKey, Tensor
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.pipeline.hops import hops_of, stage_of
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.member import Offer, RoundMember

Ground = tuple[int, int]
"""(generation, era): what have-sets belong to."""
NOWHERE: Ground = (-1, -1)
Place = tuple[int, int]
"""(hop, micro-batch)."""


def first_phase(stage: int, stages: int, inner_steps: int) -> int:
    """Local steps before the first contribution of a stage: exchanges are spread over a phase.

    Args:
        stages: of the run, the ends included.
    """
    return stage * inner_steps // stages or inner_steps


def steps_before(stage: int, stages: int, inner_steps: int, round_number: int) -> int:
    """Local steps of the run before a round of a stage: where its schedule is."""
    if not round_number:
        return 0
    return first_phase(stage, stages, inner_steps) + (round_number - 1) * inner_steps


@dataclass(frozen=True, slots=True)
class LocalPolicy:
    """Run keys that local steps go by. ``samples``: sequences in one micro-batch."""

    micro_batches: int
    inner_steps: int
    samples: int
    max_rounds: int
    scatter_codec: str

    @classmethod
    def of(cls, keys: RunKeys) -> LocalPolicy | None:
        """None: the run is no pipeline, or its stages step together."""
        if not keys.stages or keys.pipeline_mode != "diloco":
            return None
        return cls(
            keys.micro_batches,
            keys.inner_steps,
            keys.batch_size,
            keys.max_rounds,
            keys.codec_scatter,
        )


@dataclass(slots=True)
class Done:
    """A micro-batch whose gradient was accumulated here, and what was answered."""

    tensors: tuple[bytes, bytes, tuple[int, ...]]
    output: Tensor | None
    loss: float

    def same_tensors(self, request: HopRequest) -> bool:
        """Asked again with the very same bytes, the same answer will do."""
        return self.tensors == _tensors(request)


def _tensors(request: HopRequest) -> tuple[bytes, bytes, tuple[int, ...]]:
    return request.inputs.root, request.gradient.root, request.path


@dataclass(slots=True)
class _Phase:
    """Local steps of one stage since it took up the state of ``round`` (-1: there is none)."""

    round: int = -1
    here: bool = False
    """The state of the round is in place."""
    steps: int = 0
    pairs: int = 0
    """(hop, micro-batch) pairs in these steps."""
    due: int = 0
    held: dict[Place, None] = field(default_factory=dict)
    """Pairs in the accumulator."""
    late: dict[int, None] = field(default_factory=dict)
    """Jobs that the device had before it was told to step: they are in the step if they succeed."""
    handing: StepKey | None = None
    root: bytes | None = None
    """What was handed over, and waits for ``late`` to be weighed."""
    offered: bool = False

    @property
    def waits(self) -> bool:
        """It has to contribute before it may step again."""
        return self.steps >= self.due


class LocalSteps:
    """All stages served here.

    Args:
        member: takes contributions, and knows which of them are undecided.
        in_step: whether the state of a channel here is the one the next round is applied to.
        next_job: as for ``Sums``; nothing is undone here.
    """

    def __init__(
        self,
        *,
        me: PeerId,
        ledger: Ledger,
        out: list[Effect],
        member: RoundMember,
        in_step: Callable[[str], bool],
        policy: LocalPolicy,
    ) -> None:
        self.ledger = ledger
        self.leader: PeerId | None = None
        self.life = 0
        """Of the trainer: counts those that were lost."""
        self._me = me
        self._out = out
        self._member = member
        self._in_step = in_step
        self._policy = policy
        self._phases: dict[int, _Phase] = {}
        self._done: dict[Place, Done] = {}
        self._cached = 0
        self._adding: dict[int, tuple[Ground, Place]] = {}
        self._stepped: dict[int, _Phase] = {}
        """Jobs under way whose gradients are in a step already."""
        self._ground: Ground = (0, 0)
        self._handings = 0
        self._now = 0.0
        """Of the latest call that said it."""

    @property
    def _blocks(self) -> int:
        return self.ledger.pipeline.blocks

    # -- have-sets -------------------------------------------------------------------------

    def have(self, hop: int) -> list[int]:
        """Micro-batches whose gradient at ``hop`` is in the accumulator, ascending."""
        phase = self._phases.get(stage_of(hop, self._blocks))
        return sorted(k for h, k in phase.held if h == hop) if phase is not None else []

    def claim(self, hop: int, k: int) -> Done | None:
        """A micro-batch that is in the accumulator of ``hop``, or was in an earlier step."""
        return self._done.get((hop, k))

    def stages(self) -> list[int]:
        """Stages to be kept although they were taken away: none, their steps are given up."""
        return []

    def adder(self, hop: int, k: int) -> int | None:
        """The job that accumulates ``k`` at ``hop`` at this moment."""
        slot = (self._ground, (hop, k))
        return next((job for job, mine in self._adding.items() if mine == slot), None)

    def begin(self, job: int, request: HopRequest) -> None:
        """``job`` accumulates from now on."""
        self._adding[job] = (self._ground, (request.id.hop, request.id.micro_batch))

    def added(
        self, job: int, peer: PeerId, request: HopRequest, output: Tensor, loss: float
    ) -> None:
        """``job`` has accumulated."""
        ground, place = self._adding.pop(job)
        stage = stage_of(place[0], self._blocks)
        phase, stepped = self._phases.get(stage), self._stepped.get(job)
        if stepped is not None:
            stepped.pairs += 1
            self._arrived(stage, job)
        if ground != self._ground or phase is None:
            return  # what it was added to is gone
        self._remember(place, Done(_tensors(request), output, loss))
        if stepped is None:
            phase.held[place] = None
            self._progress(stage, phase)

    def _arrived(self, stage: int, job: int) -> None:
        """A job of a step that was asked for before it: now its weight is known."""
        stepped = self._stepped.pop(job)
        stepped.late.pop(job)
        if stepped.root is not None and not stepped.late:
            self._offer(self._now, stage, stepped)

    def _remember(self, place: Place, done: Done) -> None:
        self._done[place] = done
        while len(self._done) > limits.LOCAL_CLAIMS_KEPT:
            del self._done[next(iter(self._done))]
        self._cached += len(done.output.data) if done.output is not None else 0
        if self._cached > limits.HOP_REPLIES_CACHED_BYTES_MAX:
            for known in self._done.values():
                known.output = None  # asked again it is recomputed, and not accumulated
            self._cached = 0

    def not_added(self, job: int) -> None:
        """``job`` has failed, and the accumulator is as it was."""
        slot = self._adding.pop(job, None)
        if slot is not None and job in self._stepped:
            self._arrived(stage_of(slot[1][0], self._blocks), job)

    def undone(self, job: int) -> bool:
        """Nothing is ever taken out here."""
        return False

    def undo_failed(self, job: int, reason: str) -> bool:
        """Nothing is ever taken out here."""
        return False

    def lost(self) -> None:
        """The trainer process is gone, and with it all local steps; what was announced is here."""
        self.life += 1
        self._forget()
        self._done.clear()
        self._adding.clear()
        self._stepped.clear()
        self._cached = 0

    def drop(self, stage: int) -> None:
        """The sum of a stage is not what it should be: what is in it does not count."""
        phase = self._phases.get(stage)
        if phase is not None:
            for place in phase.held:
                self._done.pop(place, None)
            phase.held.clear()
        hops = hops_of(stage, self._blocks)
        for job in [j for j, (_, place) in self._adding.items() if place[0] in hops]:
            if job not in self._stepped:
                self._adding[job] = (NOWHERE, self._adding[job][1])
        self._out.append(px.ClearGradients((stage,), self.life))

    # -- what is taken ---------------------------------------------------------------------

    def holds_back(self, request: HopRequest) -> bool:
        """New work would wait here for the outcome of a round: others of the stage have room."""
        stage = stage_of(request.id.hop, self._blocks)
        phase = self._phases.get(stage)
        if phase is None or not phase.waits or len(phase.held) < self.need(stage):
            return False
        return request.kind == "forward" or request.id.hop == self._blocks + 1

    def takes(self, stage: int) -> bool:
        """Gradients of the stage are still wanted: it has rounds to come."""
        channel = self.ledger.channels.get(stage_channel(stage))
        if channel is None or self.ledger.ended:
            return False
        return not self._policy.max_rounds or channel.round < self._policy.max_rounds

    def need(self, stage: int) -> int:
        """Pairs in a local step: a micro-batch of the run's step is one replica's work."""
        replicas = max(1, len(self.ledger.pipeline.serving(stage)))
        return -(-self._policy.micro_batches * len(hops_of(stage, self._blocks)) // replicas)

    # -- following the ledger --------------------------------------------------------------

    def reconcile(self, now: float) -> bool:
        """True if what was accumulated belongs to the past: it has been cleared."""
        self._now = now
        ground = (self.ledger.generation, self.ledger.pipeline.era)
        moved = ground != self._ground
        if moved:
            self._clear()
            self._ground = ground
        assigned = self.ledger.pipeline.assigned.get(self._me, ())
        for stage in [s for s in self._phases if s not in assigned]:
            self._drop_root(stage, self._phases.pop(stage))
        for stage in assigned:
            channel = self.ledger.channels.get(stage_channel(stage))
            if channel is not None:
                self._follow(stage, channel)
        return moved

    def _clear(self) -> None:
        """What is accumulated may descend from weights that are no more; steps taken stay."""
        hops = [hop for _, (hop, _) in self._adding.values()]
        under_way = {stage_of(hop, self._blocks) for hop in hops}
        stages = tuple(s for s in sorted(self._phases) if self._phases[s].held or s in under_way)
        if stages:
            self._out.append(px.ClearGradients(stages, self.life))
        for phase in self._phases.values():
            phase.held.clear()
        self._done.clear()
        self._cached = 0

    def _forget(self) -> None:
        for stage, phase in self._phases.items():
            self._drop_root(stage, phase)
        self._phases.clear()

    def _follow(self, stage: int, channel: ChannelState) -> None:
        phase = self._phases.setdefault(stage, _Phase())
        here = self._in_step(channel.name)
        if here and not (phase.here and phase.round == channel.round):
            due = self._policy.inner_steps
            if not channel.round:
                due = first_phase(stage, self._blocks + 1, due)
            # What is accumulated stays: gradients of the weights of a moment ago.
            self._drop_root(stage, phase)
            phase = self._phases[stage] = _Phase(channel.round, True, due=due, held=phase.held)
        phase.here = here
        self._progress(stage, phase)

    def _progress(self, stage: int, phase: _Phase) -> None:
        """Take the step that is due, or contribute, if that may be done now."""
        name = stage_channel(stage)
        channel = self.ledger.channels[name]
        if not phase.here or phase.round != channel.round or not self.takes(stage):
            return
        handing = phase.handing is not None or phase.root is not None
        if phase.waits and not handing and self._member.undecided(name) is None:
            if not phase.offered:
                self._hand_over(stage, phase)
                return
            phase.offered, phase.due = False, phase.steps + 1  # aborted: it goes into the next one
        if not phase.waits and len(phase.held) >= self.need(stage):
            self._step(stage, phase)

    def _step(self, stage: int, phase: _Phase) -> None:
        past = steps_before(stage, self._blocks + 1, self._policy.inner_steps, phase.round)
        self._out.append(px.LocalStep(stage, past + phase.steps, self.life))
        hops = hops_of(stage, self._blocks)
        for job, (ground, (hop, _)) in self._adding.items():
            if hop in hops and ground == self._ground and job not in self._stepped:
                self._stepped[job] = phase
                phase.late[job] = None
        phase.steps += 1
        phase.pairs += len(phase.held)
        phase.held.clear()
        if phase.waits and self._member.undecided(stage_channel(stage)) is None:
            self._hand_over(stage, phase)

    # -- contributing ----------------------------------------------------------------------

    def _hand_over(self, stage: int, phase: _Phase) -> None:
        self._handings += 1
        phase.handing = StepKey(self.ledger.generation, phase.round, self._handings)
        self._out.append(px.HandOver(stage, phase.handing, self._policy.scatter_codec, self.life))

    def handed_over(self, now: float, stage: int, key: StepKey, root: bytes) -> None:
        """The shell's answer to ``HandOver``: the encoded pseudo-gradient has this root."""
        self._now = now
        phase = self._phases.get(stage)
        if phase is None or phase.handing != key:
            self._release(stage, root)
            return
        phase.handing, phase.root = None, root
        if not phase.late:
            self._offer(now, stage, phase)

    def _release(self, stage: int, root: bytes) -> None:
        pending = self._member.undecided(stage_channel(stage))
        if pending is None or pending.root != root:
            self._out.append(fx.ReleaseContribution(stage_channel(stage), root))

    def _drop_root(self, stage: int, phase: _Phase) -> None:
        root, phase.root = phase.root, None
        if root is not None:
            self._release(stage, root)

    def _offer(self, now: float, stage: int, phase: _Phase) -> None:
        """Announce what was handed over, unless the round has gone on without it."""
        name, root = stage_channel(stage), phase.root
        assert root is not None
        if phase.round != self.ledger.channels[name].round or self._member.undecided(name):
            self._drop_root(stage, phase)
            return
        phase.root = None
        samples = phase.pairs * self._policy.samples / len(hops_of(stage, self._blocks))
        values = self.ledger.channels[name].values
        offer = Offer(name, root, values, self._policy.scatter_codec, samples, phase.round, 0)
        phase.offered = True
        self._member.offer(now, offer)

    # -- what only steps of all stages together have -----------------------------------------

    def receive(self, now: float, peer: PeerId, message: object) -> None:
        """Nobody closes a step in this mode: such messages are void."""

    def thaw(self) -> None:
        """Nothing is ever frozen."""

    def tick(self, now: float) -> None:
        self.reconcile(now)

    def deadline(self) -> float:
        return math.inf


__all__ = ["Done", "LocalPolicy", "LocalSteps", "first_phase", "steps_before"]
