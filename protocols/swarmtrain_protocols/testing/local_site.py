"""A simulated site whose stages step by themselves (mode ``diloco``, spec 11 §2.8).

The trainer keeps, per stage, the state that it took up and what its local steps have changed since:
whole numbers, so that a contribution says exactly which gradients made it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from swarmtrain_protocols.codecs.base import F32
from swarmtrain_protocols.core import Effect
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.pipeline.hops import hops_of
from swarmtrain_protocols.state import CanonicalState
from swarmtrain_protocols.testing.pipeline_site import PipelineSite
from swarmtrain_protocols.testing.pipeline_truth import PipelineTruth
from swarmtrain_protocols.testing.toystage import I64

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Completion

RATE = np.float32(1 / 64)
"""What a local step takes of a gradient."""


@dataclass(frozen=True)
class LocalWork:
    """What one contribution was made of."""

    member: bytes
    stage: int
    base_round: int
    steps: int
    pairs: tuple[tuple[int, int], ...]


@dataclass
class LocalTruth(PipelineTruth):
    """``work`` by root of the contribution; ``wrong``: what a trainer was asked and must not be."""

    work: dict[bytes, LocalWork] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    handed: int = 0


@dataclass
class _Trained:
    """The trainer's own copy of a stage. ``pairs``: (hop, micro-batch) in its local steps."""

    round: int
    anchor: F32
    progress: I64
    steps: int = 0
    pairs: list[tuple[int, int]] = field(default_factory=list)

    @property
    def theta(self) -> F32:
        moved = self.progress.astype(np.float32) * RATE
        return np.asarray(self.anchor - moved, np.float32)


class LocalSite(PipelineSite):
    """Satisfies ``testing.host.Node``."""

    truth: LocalTruth

    def __init__(self, *args: object) -> None:
        self.trained: dict[int, _Trained] = {}
        self.sums: dict[int, list[tuple[int, int]]] = {}
        """Pairs in each accumulator."""
        self.seen: dict[tuple[int, int], None] = {}
        """Pairs that this trainer has accumulated in its life."""
        self._loads: list[tuple[int, int, int, F32]] = []
        self._orders = 0
        super().__init__(*args)  # type: ignore[arg-type]

    # --- the trainer process ---------------------------------------------------------------------

    def _attach(self, now: float) -> None:
        super()._attach(now)
        for stage in self._served:
            self._load(stage)

    def kill_trainer(self, now: float) -> None:
        self.trained.clear()
        self.sums.clear()
        self.seen.clear()
        self._loads.clear()
        super().kill_trainer(now)

    def _serve(self, now: float, stages: tuple[int, ...]) -> None:
        before = self._served
        for stage in [s for s in before if s not in stages]:
            self.trained.pop(stage, None)
            self.sums.pop(stage, None)
        super()._serve(now, stages)
        for stage in [s for s in stages if s not in before]:
            self._load(stage)

    def _load(self, stage: int) -> None:
        """The state goes to the trainer, behind all that it was asked for before."""
        state = self.plane.states.get(stage_channel(stage))
        if self.computes and state is not None and stage in self._served:
            self._orders += 1
            self._loads.append((self._orders, stage, state.round, state.theta.copy()))

    def _moved(
        self, now: float, channel: str, round_number: int, state_hash: bytes, installed: bool
    ) -> None:
        self._load(int(channel.split("/")[1]))
        super()._moved(now, channel, round_number, state_hash, installed)

    def _adopt(self, now: float, state: CanonicalState) -> None:
        self.plane.states[state.channel] = state
        self._load(int(state.channel.split("/")[1]))
        super()._adopt(now, state)

    def _work(self, now: float, took_s: float, call: Callable[[float], None]) -> list[Completion]:
        self._orders += 1
        order = self._orders

        def done(at: float) -> None:
            while self._loads and self._loads[0][0] < order:
                _, stage, number, theta = self._loads.pop(0)
                nothing = np.zeros(theta.size, np.int64)
                self.trained[stage] = _Trained(number, theta, nothing)
            call(at)

        return super()._work(now, took_s, done)

    # --- the device ------------------------------------------------------------------------------

    def execute(self, now: float, effect: Effect) -> list[Completion]:
        if isinstance(effect, px.LocalStep) and not self._is_late(effect):
            return self._work(now, 0.001, lambda at: self._step(effect))
        return super().execute(now, effect)

    def _compute(self, now: float, effect: px.Compute) -> list[Completion]:
        if effect.kind not in ("forward", "backward"):
            return super()._compute(now, effect)
        took_s = self._took_s(effect.kind == "backward")

        def done(at: float) -> None:
            pipeline, toy = self.core.pipeline, self.spec.toy
            mine = self.trained.get(effect.stage)
            if mine is None:
                pipeline.compute_failed(at, effect.job, "not_served")
                return
            x, g = self._bytes(effect.inputs), self._bytes(effect.gradient)
            if effect.kind == "forward":
                output = self._tensor(toy.forward(effect.hop, mine.theta, x, effect.tokens))
                pipeline.computed(at, effect.job, output, 0.0, took_s)
                return
            k = effect.micro_batch % toy.micro_batches  # the toy counts no further
            made = toy.backward(effect.hop, k, mine.theta, x, g, effect.tokens)
            if effect.accumulate:
                self._count(effect, made.gradient)
            output = self._tensor(made.output)
            pipeline.computed(at, effect.job, output, made.loss, took_s)

        return self._work(now, took_s, done)

    def _count(self, effect: px.Compute, gradient: I64) -> None:
        pair = (effect.hop, effect.micro_batch)
        if pair in self.seen:
            self.truth.wrong.append(f"{self.ctx.name} accumulates {pair} twice")
        self.seen[pair] = None
        self._accumulate(effect.stage, gradient)
        self.sums.setdefault(effect.stage, []).append(pair)

    def _clear(self, stages: tuple[int, ...]) -> None:
        super()._clear(stages)
        for stage in stages:
            for pair in self.sums.pop(stage, []):
                del self.seen[pair]

    def _step(self, effect: px.LocalStep) -> None:
        mine, pairs = self.trained.get(effect.stage), self.sums.pop(effect.stage, [])
        gradient = self.accumulators.pop(effect.stage, None)
        if mine is None:
            return  # the stage was taken away meanwhile
        if gradient is None:
            self.truth.wrong.append(f"{self.ctx.name}: {effect} with an empty accumulator")
            return
        mine.progress += gradient
        mine.pairs += pairs
        mine.steps += 1
        self.truth.seen["local:step"] += 1

    def _give(self, now: float, effect: px.HandOver) -> None:
        mine, channel = self.trained.get(effect.stage), stage_channel(effect.stage)
        if mine is None:
            return
        self.truth.handed += 1
        delta: F32 = np.asarray(mine.progress.astype(np.float32) * RATE, np.float32)
        delta[-1] += np.float32(self.truth.handed)  # contributions of the simulator are unique
        blob = self.plane.encode(delta, effect.codec)
        hops = len(hops_of(effect.stage, self.spec.toy.stages))
        samples = len(mine.pairs) * self.spec.manifest.keys.batch_size / hops
        made = samples, delta.size, effect.codec, mine.round
        self.truth.offered(self.ctx.peer, channel, blob, *made)
        self.truth.work[blob.root] = LocalWork(
            self.ctx.peer, effect.stage, mine.round, mine.steps, tuple(mine.pairs)
        )
        self.core.pipeline.handed_over(now, effect.stage, effect.key, blob.root)


__all__ = ["LocalSite", "LocalTruth", "LocalWork"]
