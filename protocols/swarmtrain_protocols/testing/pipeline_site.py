"""One simulated site of a pipeline: a whole ``NodeCore`` and a device that computes toy stages.

It does what the peer process and its trainer do: hops take simulated time on a device that works in
order, the trainer may die and come back without its accumulators, large tensors go by root.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.codecs.base import F32
from swarmtrain_protocols.core import Effect, Fetch, PeerId
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.messages.member import Propose
from swarmtrain_protocols.messages.pipeline import EMPTY, HopReply, HopRequest, Tensor
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.pipeline.requests import inline_tensor
from swarmtrain_protocols.state import CanonicalState
from swarmtrain_protocols.testing.pipeline_rebuild import Rebuilds
from swarmtrain_protocols.testing.pipeline_truth import PipelineTruth
from swarmtrain_protocols.testing.site import Site, SitePart, SwarmSpec
from swarmtrain_protocols.testing.toystage import I64, Toy

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Completion, Context

TRAINER_AWAY_S = (0.2, 2.0)
TICKETS_FROM = 1 << 40
"""Fetches of tensors have tickets of their own, above those of the core."""


@dataclass(frozen=True)
class PipelineSpec(SwarmSpec):
    """A pipeline of toy stages. ``hop_s``: seconds of one hop (low, high); a backward takes three.

    ``lost`` and ``doubled``: shares of replies that are dropped and of requests that come twice.
    ``by_root``: share of tensors that travel by root. ``trainer_life_s``: mean life of a trainer
    process, 0: it lives as long as its site. ``room``: stages that fit a site.
    """

    toy: Toy = field(default_factory=lambda: Toy(0, 2, 4))
    hop_s: tuple[float, float] = (0.005, 0.02)
    lost: float = 0.0
    doubled: float = 0.0
    by_root: float = 0.0
    trainer_life_s: float = 0.0
    room: int = 2


@dataclass(frozen=True)
class PipelinePart(SitePart):
    """``drives``: the corpus is here. ``slower``: factor on the time of every hop."""

    drives: bool = False
    slower: float = 1.0


class PipelineSite(Site):
    """Satisfies ``testing.host.Node``."""

    spec: PipelineSpec
    part: PipelinePart
    truth: PipelineTruth

    def __init__(
        self, ctx: Context, spec: PipelineSpec, part: PipelinePart, truth: PipelineTruth
    ) -> None:
        self.accumulators: dict[int, I64] = {}
        self.trainer = 0
        """Counts lives of the trainer process; odd: it runs."""
        self.touched = False
        """An accumulator has changed since somebody looked."""
        self.clearing = 0
        """Clears that the device has not come to yet: its sums are those of the past."""
        self._free_at = 0.0
        self._device: deque[Callable[[float], None]] = deque()
        self._tensors: dict[bytes, bytes] = {}
        self._waiting: dict[int, tuple[PeerId, HopRequest | HopReply, Tensor]] = {}
        self._tickets = TICKETS_FROM
        self._served: tuple[int, ...] = ()
        self._trainer_at = math.inf
        self._rebuilds = Rebuilds(self)
        super().__init__(ctx, spec, part, truth)
        self._phase_at.clear()  # nobody hands over pseudo-gradients here
        if part.trains:
            self._attach(ctx.now)
        if part.drives:
            self.core.pipeline.set_driver(ctx.now, True)

    # --- the trainer process ---------------------------------------------------------------------

    @property
    def computes(self) -> bool:
        return self.trainer % 2 == 1

    def _attach(self, now: float) -> None:
        self.trainer += 1
        self._free_at = now
        self._device.clear()
        self.core.pipeline.set_worker(now, self.spec.toy.values * self.spec.room)
        self._trainer_at = self._life(now)

    def _life(self, now: float) -> float:
        life_s = self.spec.trainer_life_s
        return now + life_s * self._luck.between(0.3, 1.7) if life_s else math.inf

    def kill_trainer(self, now: float) -> None:
        """The trainer process dies: its queue and its accumulators are gone."""
        if not self.computes:
            return
        self.truth.seen["trainer:killed"] += 1
        self.trainer += 1
        self.accumulators.clear()
        self.clearing = 0
        self._trainer_at = now + self._luck.between(*TRAINER_AWAY_S)
        self.core.pipeline.set_worker(now, 0)

    def tick(self, now: float) -> None:
        super().tick(now)
        if now >= self._trainer_at:
            self._trainer_at = math.inf
            if not self.computes:
                self._attach(now)
            elif not self.truth.calm:
                self.kill_trainer(now)

    def deadline(self) -> float:
        return min(super().deadline(), self._trainer_at)

    # --- the model -------------------------------------------------------------------------------

    def _first_state(self, stage: int) -> CanonicalState:
        state = self.plane.new_state(stage_channel(stage), 0, self.spec.toy.values)
        state.theta[:] = self.spec.toy.first(stage)
        return state

    def _define_model(self, now: float) -> None:
        """Offer the first weights of all stages; whoever serves one makes it for itself."""
        ledger = self.core.ledger
        if ledger.model is not None:
            self._model_at = math.inf
            return
        if not self.core.joiner.is_member or self.core.log.leader is None:
            return
        states = [self._first_state(stage) for stage in range(self.spec.toy.stages + 1)]
        layout = tuple(e.ChannelLayout(s.channel, s.theta.size) for s in states)
        roots = tuple(state.root() for state in states)
        for state, root in zip(states, roots, strict=True):
            self.truth.models[state.channel, root] = state.theta
        body = e.ModelDefined(bytes(32), layout, roots, self.ctx.peer)
        self.core.propose(now, Propose(e.encode_body(body)))

    def _serve(self, now: float, stages: tuple[int, ...]) -> None:
        for stage in [s for s in self.accumulators if s not in stages]:
            del self.accumulators[stage]
        self._served = stages
        for stage in stages:
            channel = self.core.ledger.channels.get(stage_channel(stage))
            if channel is None or channel.round or channel.name in self.plane.states:
                continue
            state = self._first_state(stage)
            if state.root() == channel.start_hash:
                self.disk.save(state, sync=True)
                self._adopt(now, state)

    # --- tensors ---------------------------------------------------------------------------------

    def receive(self, now: float, peer: PeerId, message: Message) -> None:
        """Some hops get lost or come twice; large tensors are fetched before the core hears."""
        calm = self.truth.calm
        if not calm and isinstance(message, HopReply) and self._luck.chance(self.spec.lost):
            self.truth.seen["hop:lost"] += 1
            return
        self._resolve(now, peer, message)
        if not calm and isinstance(message, HopRequest) and self._luck.chance(self.spec.doubled):
            self.truth.seen["hop:doubled"] += 1
            self._resolve(now, peer, message)

    def _resolve(self, now: float, peer: PeerId, message: Message) -> None:
        for tensor in _tensors_of(message):
            if tensor.nbytes and not tensor.data and tensor.root not in self._tensors:
                assert isinstance(message, HopRequest | HopReply)
                self._tickets += 1
                self._waiting[self._tickets] = peer, message, tensor
                self._extra.append(Fetch(self._tickets, peer, tensor.root, 0, 1, tensor))
                return
        super().receive(now, peer, message)

    def fetched(self, now: float, ticket: int) -> None:
        if ticket < TICKETS_FROM:
            super().fetched(now, ticket)
            return
        peer, message, _ = self._waiting.pop(ticket)
        self._resolve(now, peer, message)

    def fetch_failed(self, now: float, ticket: int, reason: str) -> None:
        if ticket < TICKETS_FROM:
            super().fetch_failed(now, ticket, reason)
        else:
            del self._waiting[ticket]  # whoever waits for it has a timeout
            self.truth.seen["tensor:" + reason] += 1

    def accept(self, purpose: object, first: int, chunks: list[bytes]) -> None:
        if isinstance(purpose, Tensor):
            self._tensors[purpose.root] = chunks[0]
        else:
            super().accept(purpose, first, chunks)

    def provide(self, root: bytes) -> Blob | None:
        data = self._tensors.get(root)
        return super().provide(root) if data is None else Blob.of([data])

    def _bytes(self, tensor: Tensor) -> bytes:
        return tensor.data or self._tensors.get(tensor.root, b"")

    def _tensor(self, data: bytes) -> Tensor:
        """A tensor for a message: inline, or by root for some."""
        made = inline_tensor(data)
        if made == EMPTY or not self._luck.chance(self.spec.by_root):
            return made
        self._tensors[made.root] = data
        return Tensor(made.root, made.nbytes)

    # --- the device ------------------------------------------------------------------------------

    def execute(self, now: float, effect: Effect) -> list[Completion]:
        if self._is_late(effect):
            self.truth.seen["pipeline:late"] += 1
            return []
        if isinstance(effect, px.Compute):
            return self._compute(now, effect)
        if isinstance(effect, px.Undo):
            return self._undo(now, effect)
        if isinstance(effect, px.HandOver):
            return self._work(now, 0.002, lambda at: self._give(at, effect))
        if isinstance(effect, px.ClearGradients):
            self.clearing += self.computes
            return self._work(now, 0.0, lambda at: self._clear(effect.stages))
        if isinstance(effect, px.ServeStages):
            self._serve(now, effect.stages)
        elif isinstance(effect, px.ServeTensor):
            self._tensors[effect.tensor.root] = effect.tensor.data
        elif isinstance(effect, px.NeedTokens):
            tokens = self.spec.toy.tokens(effect.step, effect.micro_batch)
            wanted = effect.step, effect.micro_batch
            return [(0.001, lambda at: self.core.pipeline.tokens(at, *wanted, tokens))]
        elif not isinstance(effect, px.CancelCompute):
            healing = self._rebuilds.execute(now, effect)
            return super().execute(now, effect) if healing is None else healing
        return []

    def _is_late(self, effect: Effect) -> bool:
        """It is for a trainer that died while the effect waited behind a write."""
        life = self.core.pipeline.worker.life
        return isinstance(effect, px.OfTrainer) and effect.life != life

    def adopt_candidate(self, now: float, state: CanonicalState) -> None:
        """The log has chosen what was rebuilt here."""
        self.disk.save(state, sync=True)
        self._adopt(now, state)

    def _work(self, now: float, took_s: float, call: Callable[[float], None]) -> list[Completion]:
        """Something the device does after all that it was asked for before."""
        if not self.computes:
            return []
        life = self.trainer
        self._free_at = max(now, self._free_at) + took_s
        self._device.append(call)

        def done(at: float) -> None:
            if self.trainer == life:
                self._device.popleft()(at)  # in order, even if two are done at the same time

        return [(self._free_at - now, done)]

    def _took_s(self, backward: bool) -> float:
        seconds = self._luck.between(*self.spec.hop_s) * self.part.slower
        return 3.0 * seconds if backward else seconds

    def _theta(self, stage: int, kind: str = "") -> F32:
        """The weights as they are when the work is asked for."""
        trial = self._rebuilds.on_trial(stage) if kind == "evaluate" else None
        return (self.plane.states[stage_channel(stage)].theta if trial is None else trial).copy()

    def _compute(self, now: float, effect: px.Compute) -> list[Completion]:
        theta = self._theta(effect.stage, effect.kind)
        took_s = self._took_s(effect.kind == "backward")

        def done(at: float) -> None:
            toy, x = self.spec.toy, self._bytes(effect.inputs)
            if effect.kind == "evaluate" and effect.hop == toy.stages + 1:
                loss = toy.loss(theta, x, effect.tokens)
                self.core.pipeline.computed(at, effect.job, EMPTY, loss, took_s)
                return
            if effect.kind != "backward":
                output = self._tensor(toy.forward(effect.hop, theta, x, effect.tokens))
                self.core.pipeline.computed(at, effect.job, output, 0.0, took_s)
                return
            g, k = self._bytes(effect.gradient), effect.micro_batch
            made = toy.backward(effect.hop, k, theta, x, g, effect.tokens)
            if effect.accumulate:
                self._accumulate(effect.stage, made.gradient)
            output = self._tensor(made.output)
            self.core.pipeline.computed(at, effect.job, output, made.loss, took_s)

        return self._work(now, took_s, done)

    def _undo(self, now: float, effect: px.Undo) -> list[Completion]:
        theta, took_s = self._theta(effect.stage), self._took_s(True)
        request = effect.request

        def done(at: float) -> None:
            x, g = self._bytes(request.inputs), self._bytes(request.gradient)
            where = request.id.hop, request.id.micro_batch
            made = self.spec.toy.backward(*where, theta, x, g, request.tokens)
            self._accumulate(effect.stage, -made.gradient)
            self.truth.seen["pipeline:undo"] += 1
            self.core.pipeline.computed(at, effect.job, EMPTY, made.loss, took_s)

        return self._work(now, took_s, done)

    def _accumulate(self, stage: int, gradient: I64) -> None:
        known = self.accumulators.get(stage)
        self.accumulators[stage] = gradient.copy() if known is None else known + gradient
        self.touched = True

    def _clear(self, stages: tuple[int, ...]) -> None:
        self.clearing -= 1
        for stage in stages:
            self.accumulators.pop(stage, None)

    def _give(self, now: float, effect: px.HandOver) -> None:
        nothing = np.zeros(self.spec.toy.values, np.int64)
        total = self.accumulators.get(effect.stage, nothing)
        blob = self.plane.encode(total.astype(np.float32), effect.codec)
        self.truth.handed_over(self.ctx.peer, stage_channel(effect.stage), blob, total)
        self.core.pipeline.handed_over(now, effect.stage, effect.key, blob.root)


def _tensors_of(message: Message) -> tuple[Tensor, ...]:
    if isinstance(message, HopRequest):
        return message.inputs, message.gradient
    return (message.output,) if isinstance(message, HopReply) else ()
