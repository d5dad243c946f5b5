"""The driver of mode ``diloco``: it deals itself micro-batches, without leases and without an end.

Spec 11 §2.8. Nothing has to agree on a set of micro-batches, so nobody hands them out: each driver
numbers its own from where it begins, keeps its window full, and forgets what is done or too old.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Effect, Emit, PeerId
from swarmtrain_protocols.messages.pipeline import HopId, HopRefused
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.driver import (
    RETRY_S_MAX,
    RETRY_S_MIN,
    DriverCore,
    _Issue,
    _Task,
)
from swarmtrain_protocols.pipeline.envelope import View
from swarmtrain_protocols.pipeline.microbatch import Hop, MicroBatch
from swarmtrain_protocols.pipeline.paths import PathPlan
from swarmtrain_protocols.rounds.effects import Notice

NUMBERS_FROM = 1 << 31
"""Numbers begin below this, and stay below those of errands for two thousand million more."""
MICRO_BATCH_S = 120.0
"""A micro-batch that takes longer is given up, and its tensors are forgotten everywhere."""
WAITING = ("not_ready", "stale", "closing", "busy")
"""Refusals through which a backward stays with the worker of its forward."""


class FreeDriver(DriverCore):
    """All micro-batches of one driver. ``passed`` counts those that were done."""

    def __init__(
        self,
        *,
        rng: random.Random,
        out: list[Effect],
        stages: int,
        view: Callable[[], View | None],
        workers: Callable[[int], Sequence[PeerId]],
        version: Callable[[int], int],
        paths: PathPlan,
    ) -> None:
        super().__init__(
            rng=rng,
            out=out,
            stages=stages,
            view=view,
            workers=workers,
            version=version,
            paths=paths,
            sticky=True,
        )
        self.passed = 0
        self._next = rng.randrange(NUMBERS_FROM)
        self._began: dict[int, float] = {}
        self._failed: dict[tuple[int, Hop], dict[PeerId, None]] = {}

    def leader_changed(self, now: float, leader: PeerId | None) -> None:
        """Leaders have nothing to do with micro-batches here."""
        self.leader = leader

    def deadline(self) -> float:
        oldest = min(self._began.values(), default=math.inf)
        return min(super().deadline(), oldest + MICRO_BATCH_S)

    # -- micro-batches ---------------------------------------------------------------------

    def _step(self, now: float) -> None:
        """Forget what is over, and begin as many as there is room for."""
        self._ask_at = math.inf
        view = self._view
        if view is None:
            return
        for k in [k for k, batch in self.batches.items() if batch.done]:
            self._drop(k)
        for k in [k for k, began in self._began.items() if now >= began + MICRO_BATCH_S]:
            self._tell_old(k)
            self._drop(k)
        kept = sum(batch.nbytes for batch in self.batches.values())
        while len(self.batches) < self.window.size and kept < limits.DRIVER_KEPT_BYTES_MAX:
            k, self._next = self._next, self._next + 1
            batch = MicroBatch(k, self._paths.path(k, self._load))
            batch.begun = True
            self.batches[k], self._began[k] = batch, now
            self._out.append(px.NeedTokens(view.step, k))

    def _drop(self, k: int) -> None:
        del self.batches[k]
        self._began.pop(k, None)
        for slot in [slot for slot in self._tasks if slot[0] == k]:
            del self._tasks[slot]
        for slot in [slot for slot in self._failed if slot[0] == k]:
            del self._failed[slot]

    def _tell_old(self, k: int) -> None:
        why = f"not done in {MICRO_BATCH_S:g} s, now at (hop, backward) {self.batches[k].now}"
        self._out.append(Emit(Notice("fallback", {"what": "micro-batch given up", "why": why})))

    def _forget(self) -> None:
        super()._forget()
        self._began.clear()
        self._failed.clear()

    def _tell_done(self, batch: MicroBatch) -> None:
        self.passed += 1
        self._out.append(Emit(px.MicroBatchPassed(batch.k, batch.loss)))

    # -- whom to ask -----------------------------------------------------------------------

    def _maker(self, task: _Task) -> PeerId | None:
        """The worker that a backward belongs to; None: it belongs to nobody."""
        hop, backward = task.hop
        if not backward or hop == task.batch.path[-1]:
            return None
        return task.batch.makers.get((hop, False))

    def _preferred(self, now: float, task: _Task, workers: Sequence[PeerId]) -> PeerId | None:
        """The worker of the forward, unless it is gone or has failed at this very task."""
        hop, backward = task.hop
        if not backward or hop == task.batch.path[-1]:
            return None
        maker = self._maker(task)
        failed = self._failed.get((task.batch.k, task.hop), {})
        if maker is None or maker not in workers or maker in failed or maker in task.live.values():
            self.not_sticky += 1
            return None
        return maker

    def _refused(self, now: float, peer: PeerId, refusal: HopRefused) -> None:
        issue = self._issues.get(refusal.id)
        mine = issue is not None and issue.peer == peer and self._maker(issue.task) == peer
        if issue is None or not mine or refusal.code not in WAITING:
            if issue is not None and mine:
                self._blame(issue)  # it has failed, or serves the stage no more
            super()._refused(now, peer, refusal)
            return
        task, (hop, backward) = issue.task, issue.task.hop
        del self._issues[refusal.id]
        if not issue.late:
            self.router.dropped(issue.ticket)
        self._out.append(Emit(px.HopDone(peer, hop, backward, 0.0, refusal.code)))
        task.live.pop(refusal.id.attempt, None)
        if self._tasks.get((task.batch.k, task.hop)) is task and not task.live:
            task.refusals += 1
            breath_s = RETRY_S_MIN * 2 ** min(task.refusals - 1, 10)
            task.retry_at = now + min(RETRY_S_MAX, breath_s)

    def _lost(self, now: float, identity: HopId, issue: _Issue, why: str) -> None:
        self._blame(issue)
        super()._lost(now, identity, issue, why)

    def _timed_out(self, now: float, identity: HopId, issue: _Issue) -> None:
        self._blame(issue)
        super()._timed_out(now, identity, issue)

    def _hedge(self, now: float, issue: _Issue) -> None:
        """A second worker would count a gradient twice; a slow forward harms nobody."""
        if not issue.task.hop[1]:
            super()._hedge(now, issue)

    def _blame(self, issue: _Issue) -> None:
        slot = (issue.task.batch.k, issue.task.hop)
        if self._maker(issue.task) == issue.peer and slot[0] in self.batches:
            self._failed.setdefault(slot, {})[issue.peer] = None
