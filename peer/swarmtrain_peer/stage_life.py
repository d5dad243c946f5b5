"""A peer process's part in a pipeline run beside the hops: evaluation, figures, the end.

Has what ``backend.py`` and ``process.py`` need of a desk, for runs whose trainers compute stages.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path

from swarmtrain_peer import host
from swarmtrain_peer.figures import Figures
from swarmtrain_peer.runtime import PeerRuntime
from swarmtrain_peer.stage_board import StageBoard
from swarmtrain_peer.stage_desk import StageDesk
from swarmtrain_peer.step_book import STEPS
from swarmtrain_peer.tensors import TensorStore
from swarmtrain_protocols import entries as e
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.messages import RoundKey
from swarmtrain_protocols.messages.pipeline import Kind
from swarmtrain_protocols.node_events import LedgerChanged
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.pipeline.errands import ErrandDone, ErrandFailed
from swarmtrain_protocols.pipeline.freedriver import MICRO_BATCH_S
from swarmtrain_protocols.rounds import effects as fx

EVALUATION_BATCHES = 8
EVALUATE_EVERY_STEPS = 20
ERRAND_TIMEOUT_S = 30.0
EVALUATION_TRIES = 8
"""Until all batches were scored at one version: a short step is over before they are."""
END_TIMEOUT_S = 60.0
TENSOR_BYTES_MAX = 4 << 30
BEAT_S = 0.5
LOSSES_MAX = 4096
FETCH_S = 30.0
"""By how long a tensor outlives the longest micro-batch (``diloco``)."""


class StageLife:
    """One per peer process of a pipeline run."""

    def __init__(self, runtime: PeerRuntime, stages_path: Path) -> None:
        """Call it from ``PeerRuntime.on_node``: effects of the first moment are carried out."""
        self._runtime = runtime
        self.figures = Figures(runtime)
        self._local = runtime.manifest.keys.pipeline_mode == "diloco"
        clock = (lambda: int(host.mono_s())) if self._local else None
        self.tensors = TensorStore(runtime.transport, runtime.data, TENSOR_BYTES_MAX, clock)
        self.desk = StageDesk(runtime, stages_path, self.tensors)
        self.board = StageBoard(runtime)
        self.desk.worked = self.board.work.worked
        self.figures.on_stages = self.board.heard
        runtime.driver.stages = self.desk
        self._errands: dict[int, asyncio.Future[ErrandDone | ErrandFailed]] = {}
        self._evaluating: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._ended = False
        self._losses: list[float] = []
        """Of micro-batches driven here since this site's figures were last told (``diloco``)."""
        self._version = 0
        self.last_loss = math.nan
        self.steps = 0
        self.samples = 0.0
        runtime.listeners.append(self._on_core_event)

    # -- what the control socket shows ---------------------------------------------------------

    @property
    def attached(self) -> bool:
        return self.desk.attached

    @property
    def device(self) -> str:
        return self.desk.device

    def utilization(self) -> float:
        """Share of the time since the first attach in which the trainer computed; 0 before."""
        wall_s = host.mono_s() - self.desk.attached_at_s
        return min(1.0, self.desk.busy_s / wall_s) if wall_s > 0 else 0.0

    # -- events of the core ----------------------------------------------------------------------

    def _on_core_event(self, event: object) -> None:
        if isinstance(event, ErrandDone | ErrandFailed):
            waiting = self._errands.pop(event.handle, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(event)
        elif isinstance(event, px.StepDone):
            self._stepped(event)
        elif isinstance(event, px.MicroBatchPassed):
            self._losses = [*self._losses[-LOSSES_MAX:], event.loss]
            self.samples += self._runtime.manifest.keys.batch_size
            self.last_loss = event.loss
        elif isinstance(event, fx.ContributionDecided) and self._local:
            self._decided(event)
        elif isinstance(event, LedgerChanged):
            if self._local:
                self._rounds_moved()
            for _, body, accepted in event.entries:
                if accepted and isinstance(body, e.RunEnded) and not self._ended:
                    self._ended = True
                    self._ending = asyncio.ensure_future(self._end(body.reason))

    def _stepped(self, event: px.StepDone) -> None:
        self._report(event)
        if not event.committed:
            return
        self.tensors.over(event.step)
        self.steps = event.step + 1
        self.samples += event.micro_batches * self._runtime.manifest.keys.batch_size
        if event.loss >= 0:
            self.last_loss = event.loss
        if self.steps == 1 or self.steps % EVALUATE_EVERY_STEPS == 0:
            self._maybe_evaluate()

    def _maybe_evaluate(self) -> None:
        if self._is_evaluator() and not self._ended and self._evaluating is None:
            self._evaluating = asyncio.ensure_future(self._evaluate())
            self._evaluating.add_done_callback(self._evaluated)

    def _rounds_moved(self) -> None:
        """Mode ``diloco``: what all stages have reached is the run's round."""
        version = self._runtime.node.pipeline.version_of_all()
        if version == self._version:
            return
        inner_steps = self._runtime.manifest.keys.inner_steps
        self._version, self.steps = version, version * inner_steps
        if version == 1 or version % max(1, EVALUATE_EVERY_STEPS // inner_steps) == 0:
            self._maybe_evaluate()

    def _decided(self, event: fx.ContributionDecided) -> None:
        """Mode ``diloco``: this site's figures of a stage's round, with the losses it drove."""
        losses, self._losses = self._losses, []
        figures = {
            "loss": math.fsum(losses) / len(losses) if losses else None,
            "compute_utilization": round(self.utilization(), 6),
        }
        self.figures.report(event.key, event.outcome, figures)

    def _report(self, event: px.StepDone) -> None:
        """This site's figures of an attempt at a step, in all stages together."""
        node = self._runtime.node
        if not node.ledger.pipeline.assigned.get(node.me, ()):
            return
        names = [STEPS, *(stage_channel(s) for s in range(len(node.ledger.pipeline.stages)))]
        key, *parts = (
            RoundKey(node.ledger.generation, name, event.step, event.attempt) for name in names
        )
        figures = {
            "loss": event.loss if event.loss >= 0 else None,
            "compute_utilization": round(self.utilization(), 6),
            **self.board.step_figures(event.step, event.attempt),
        }
        outcome = "committed" if event.committed else "aborted"
        self.figures.report(key, outcome, figures, parts=parts)

    def _evaluated(self, task: asyncio.Task[None]) -> None:
        self._evaluating = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self._runtime.fail(error)

    # -- evaluation ------------------------------------------------------------------------------

    def _is_evaluator(self) -> bool:
        """The lowest id among the workers in reach, so that one member does it."""
        node = self._runtime.node
        here = {node.me, *node.linked()}
        workers = [k for k in sorted(node.ledger.pipeline.assigned) if k in here]
        return self.attached and bool(workers) and workers[0] == node.me

    async def _evaluate(self) -> None:
        """The loss of θ on the held-out set, all batches at one version."""
        why = "the weights moved on each time"
        for _ in range(EVALUATION_TRIES):
            found = await asyncio.gather(*(self._loss(n) for n in range(EVALUATION_BATCHES)))
            failed = [one for one in found if isinstance(one, str)]
            if failed:
                why = failed[0]
                continue
            done = [one for one in found if not isinstance(one, str)]
            versions = {version for version, _ in done}
            if len(versions) == 1:
                loss = math.fsum(loss for _, loss in done) / len(done)
                self.figures.evaluated(versions.pop(), loss)
                return
        self._runtime.events.emit("fallback", what="evaluation through the stages", why=why)

    async def _loss(self, number: int) -> tuple[int, float] | str:
        """(version, loss) of a held-out batch, or why there is none."""
        tokens = await self.desk.held_out(number)
        if tokens is None:
            return "no trainer is attached"
        done = await self.errand("evaluate", tokens)
        return done.reason if isinstance(done, ErrandFailed) else (done.version, done.loss)

    async def errand(self, kind: Kind, tokens: bytes) -> ErrandDone | ErrandFailed:
        """A forward pass through the stages, outside of steps."""
        runtime = self._runtime

        def start(now: float) -> int:
            pipeline = runtime.node.pipeline
            return pipeline.errand(now, kind, tokens, timeout_s=ERRAND_TIMEOUT_S)

        try:
            handle: int = runtime.driver.run(start)
        except LocalProtocolError as error:
            return ErrandFailed(-1, str(error))
        waiting: asyncio.Future[ErrandDone | ErrandFailed]
        self._errands[handle] = waiting = asyncio.get_running_loop().create_future()
        return await waiting

    # -- the end -----------------------------------------------------------------------------------

    async def _end(self, reason: str) -> None:
        """The run is over: evaluate the last θ once, then let the trainer go."""
        runtime = self._runtime
        if self._evaluating is not None:
            await asyncio.wait([self._evaluating])
        step = runtime.node.pipeline.version_of_all()
        if step:
            if self._is_evaluator() and not self.figures.has_loss(step):
                await self._evaluate()
            # Others need the stages here until the last evaluation is done.
            if not await runtime.until(lambda: self.figures.has_loss(step), END_TIMEOUT_S):
                runtime.events.emit("fallback", what="final evaluation", why="nobody told one")
        await self.desk.end(reason)

    @property
    def over(self) -> bool:
        """The run has ended and the trainer is gone."""
        ending = self._ending
        return self._ended and ending is not None and ending.done() and not self.attached

    async def dismiss(self, timeout_s: float, hurry: Callable[[], bool]) -> None:
        """This site leaves: let the trainer end."""
        leaving = asyncio.ensure_future(self.desk.end("this site leaves the run"))
        await self._runtime.until(lambda: not self.attached or hurry(), timeout_s)
        leaving.cancel()

    async def beat(self) -> None:
        """For ever. A trainer of stages needs no heartbeat: its line breaks when this ends."""
        while True:
            await asyncio.sleep(BEAT_S)
            if self._local:
                self.tensors.over(int(host.mono_s() - MICRO_BATCH_S - FETCH_S))
            self.board.tell(self.desk.device)
            self._runtime.changed()

    def close(self) -> None:
        for task in (self._evaluating, self._ending):
            if task is not None:
                task.cancel()
        self.desk.close()
        self.figures.close()
