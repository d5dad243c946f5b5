"""The worker: computes hops for drivers, and reports how it stands.

Spec 11 §2.2. A backward of a micro-batch that is in the accumulator never accumulates again,
whoever asks: it is answered from memory, or recomputed without accumulating. What the accumulators
hold and how a step is closed is in ``sums.Sums``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Effect, Emit, PeerId, Send
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.messages import pipeline as m
from swarmtrain_protocols.messages.pipeline import HopRequest, StepKey, Tensor
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.pipeline.hops import stage_of
from swarmtrain_protocols.pipeline.localsteps import LocalPolicy, LocalSteps
from swarmtrain_protocols.pipeline.paths import PathRule
from swarmtrain_protocols.pipeline.requests import (
    ANY_SIZE,
    TRAINING,
    HopSizes,
    malformed,
    trouble,
)
from swarmtrain_protocols.pipeline.sums import Sums
from swarmtrain_protocols.pipeline.workqueue import Job, WorkQueue
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.member import RoundMember

REPORT_S = 1.0
REPORT_AGAIN_S = 2.0
"""A report may be lost, or come before the leader has any use for it."""
RATE_ALPHA = 0.2


@dataclass(slots=True)
class _Running:
    """A computation that the shell was asked for."""

    peer: PeerId
    request: HopRequest
    accumulate: bool
    began: float
    waiting: list[Job] = field(default_factory=list)
    """Requests for the same gradient: they wait for this one instead of accumulating again."""


class WorkerCore:
    """All stages that this site serves. The composition sets ``leader`` and ``ledger``.

    Args:
        member: takes the encoded sums as contributions to the rounds of the stages.
        in_step: whether the state of a channel here is the one the next round is applied to.
        on_trial: whether a candidate for a lost stage is in place here, to be evaluated.
        micro_batches: of one step.
        samples: in one micro-batch.
        suppress_duplicates: off only to show that tests notice what it is for.
        slots: computations that the shell is asked for at once.
        paths: legal ones for micro-batches of steps; None: any.
        local: in mode ``diloco``, how stages step by themselves.
    """

    def __init__(
        self,
        *,
        me: PeerId,
        ledger: Ledger,
        out: list[Effect],
        member: RoundMember,
        in_step: Callable[[str], bool],
        on_trial: Callable[[int], bool] = lambda stage: False,
        micro_batches: int,
        scatter_codec: str,
        samples: int = 1,
        sizes: HopSizes = ANY_SIZE,
        generate_share: float = 0.1,
        suppress_duplicates: bool = True,
        slots: int = 2,
        paths: PathRule | None = None,
        local: LocalPolicy | None = None,
    ) -> None:
        self.values_max = 0
        self._me = me
        self._out = out
        self._in_step = in_step
        self._on_trial = on_trial
        self._micro_batches = micro_batches
        self._samples = samples
        self._sizes = sizes
        self._paths = paths
        self._suppress = suppress_duplicates
        self._slots = slots
        self._jobs = 0
        self._queue = WorkQueue(generate_share, limits.HOP_REQUESTS_QUEUED_MAX, self._deferred)
        self._running: dict[int, _Running] = {}
        self._sums: Sums | LocalSteps
        if local is not None:
            self._sums = LocalSteps(
                me=me, ledger=ledger, out=out, member=member, in_step=in_step, policy=local
            )
        else:
            self._sums = Sums(
                me=me,
                ledger=ledger,
                out=out,
                member=member,
                scatter_codec=scatter_codec,
                next_job=self._next_job,
            )
        self._serving: tuple[int, ...] = ()
        self._rates: dict[tuple[int, bool], float] = {}
        self._reported: m.WorkerReport | None = None
        self._report_at = 0.0

    @property
    def ledger(self) -> Ledger:
        return self._sums.ledger

    @ledger.setter
    def ledger(self, ledger: Ledger) -> None:
        self._sums.ledger = ledger

    @property
    def leader(self) -> PeerId | None:
        return self._sums.leader

    @leader.setter
    def leader(self, leader: PeerId | None) -> None:
        self._sums.leader = leader

    @property
    def life(self) -> int:
        """Counts lives of the trainer: effects of an earlier one are void."""
        return self._sums.life

    @property
    def _blocks(self) -> int:
        return self.ledger.pipeline.blocks

    def _next_job(self) -> int:
        self._jobs += 1
        return self._jobs

    def have(self, hop: int) -> list[int]:
        """Micro-batches whose gradient at ``hop`` is in the accumulator, ascending."""
        return self._sums.have(hop)

    def assigned(self) -> tuple[int, ...]:
        """The stages that the log assigns to this site."""
        return self.ledger.pipeline.assigned.get(self._me, ())

    # -- requests --------------------------------------------------------------------------

    def receive(self, now: float, peer: PeerId, message: object) -> None:
        """HopRequest of a driver; CloseQuery, Reopen, StepPlan of the leader."""
        if isinstance(message, HopRequest):
            self._asked(now, peer, message)
        else:
            self._sums.receive(now, peer, message)
        self._proceed(now)

    def _asked(self, now: float, peer: PeerId, request: HopRequest) -> None:
        if peer not in self.ledger.members and isinstance(self._sums, LocalSteps):
            self._refuse(peer, request, "not_ready", "not a member as far as is known here")
            return  # drivers without leases may know that they are before it is known here
        if peer not in self.ledger.members:
            # A new member may know of its entry before this node does.
            fields: dict[str, object] = {"peer": peer.hex(), "reason": "not_a_member"}
            self._out.append(Emit(fx.Notice("message_ignored", fields)))
            self._refuse(peer, request, "not_ready", "not a member here yet")
            return
        bad = malformed(request, self._blocks, self._micro_batches, self._sizes)
        if bad:
            self._fault(peer, "bad_hop")
            self._refuse(peer, request, "malformed", bad)
            return
        refused = self._trouble(request)
        if refused is None and not self._is_legal(request):
            self._fault(peer, "bad_path")
            refused = "malformed", "another path than that of the micro-batch"
        if refused is not None:
            pass
        elif self._suppress and (self._queue.has(peer, request) or self._runs(peer, request)):
            return  # the network said it twice; one answer will do
        else:
            refused = self._queue.admit(now, peer, request)
        if refused is not None:
            self._refuse(peer, request, *refused)

    def _deferred(self, peer: PeerId, share: float) -> None:
        self._out.append(Emit(fx.Notice("generate_deferred", {"peer": peer.hex(), "share": share})))

    def _is_legal(self, request: HopRequest) -> bool:
        """The request's path is the one that everybody takes with this micro-batch."""
        if self._paths is None or request.kind not in TRAINING:
            return True
        k, skip = request.id.micro_batch, self.ledger.pipeline.skip
        return self._paths.is_legal(k, request.path, skip)

    def _runs(self, peer: PeerId, request: HopRequest) -> bool:
        """It is being computed, or waits for another one that computes the same."""
        asked = [(r.peer, r.request.id) for r in self._running.values()]
        asked += [(j.peer, j.request.id) for r in self._running.values() for j in r.waiting]
        return (peer, request.id) in asked

    def _trouble(self, request: HopRequest) -> tuple[str, str] | None:
        stage = stage_of(request.id.hop, self._blocks)
        trial = request.kind == "evaluate" and self._on_trial(stage)
        served = (*self.assigned(), stage) if trial else self.assigned()
        refused = trouble(
            request, self.ledger, self._blocks, served, lambda name: trial or self._in_step(name)
        )
        if refused is None and not self.values_max:
            refused = "not_ready", "no trainer is at work here"
        if refused is None and self._sums.holds_back(request):
            refused = "closing", "what is here goes into a step or a round first"
        return refused

    def _refuse(self, peer: PeerId, request: HopRequest, code: str, reason: str) -> None:
        self._out.append(Send(peer, m.HopRefused(request.id, code, reason[:256])))

    def _fault(self, peer: PeerId, code: str) -> None:
        self._out.append(Emit(fx.Notice("peer_fault", {"peer": peer.hex(), "fault": code})))

    # -- computing -------------------------------------------------------------------------

    def _proceed(self, now: float) -> None:
        """Refuse what must not wait any longer, and fill the slots."""
        for waiting in self._queue.remove(lambda j: self._trouble(j.request) is not None):
            refused = self._trouble(waiting.request)
            assert refused is not None
            self._refuse(waiting.peer, waiting.request, *refused)
        while len(self._running) < self._slots and (job := self._queue.take(now)) is not None:
            self._start(now, job)

    def _start(self, now: float, job: Job) -> None:
        request = job.request
        hop, k = request.id.hop, request.id.micro_batch
        accumulate = request.kind == "backward"
        if accumulate and self._suppress:
            adder = self._sums.adder(hop, k)
            if adder is not None:
                self._running[adder].waiting.append(job)
                return
            claim = self._sums.claim(hop, k)
            if claim is not None and claim.output is not None and claim.same_tensors(request):
                self._reply(job.peer, request, claim.output, claim.loss, 0.0)
                return
            accumulate = claim is None
        accumulate = accumulate and self._sums.takes(stage_of(hop, self._blocks))
        number = self._next_job()
        self._running[number] = _Running(job.peer, request, accumulate, now)
        if accumulate:
            self._sums.begin(number, request)
        self._out.append(
            px.Compute(
                number,
                job.peer,
                stage_of(hop, self._blocks),
                hop,
                request.kind,
                request.id.step,
                k,
                request.inputs,
                request.gradient,
                request.tokens,
                accumulate,
                self.life,
            )
        )

    def computed(self, now: float, job: int, output: Tensor, loss: float, service_s: float) -> None:
        """The shell's answer to ``Compute`` or ``Undo``."""
        run = self._running.pop(job, None)
        if run is not None:
            # A hop of a text costs training what it holds up here, and not its arithmetic alone.
            held_s = now - run.began if run.request.kind == "generate" else 0.0
            self._queue.spent(now, run.request, max(service_s, held_s))
            self._measure(run.request, service_s)
            if run.accumulate:
                self._sums.added(job, run.peer, run.request, output, loss)
            self._answered(run, output, loss, service_s)
            self._queue.put_back(run.waiting)
        else:
            self._sums.undone(job)
        self._proceed(now)

    def _answered(self, run: _Running, output: Tensor, loss: float, service_s: float) -> None:
        if math.isfinite(loss):
            self._reply(run.peer, run.request, output, loss, service_s)
            return
        self._refuse(run.peer, run.request, "failed", "the loss is not finite")
        if run.accumulate:
            # A trainer checks before it accumulates; one that does not has spoiled the sum.
            self._sums.drop(stage_of(run.request.id.hop, self._blocks))

    def compute_failed(self, now: float, job: int, reason: str) -> None:
        """The shell could not do it; the accumulator is as it was before."""
        run = self._running.pop(job, None)
        if run is not None:
            self._sums.not_added(job)
            code = "malformed" if reason.startswith("malformed") else "failed"
            self._refuse(run.peer, run.request, code, reason)
            self._queue.put_back(run.waiting)
        else:
            self._sums.undo_failed(job, reason)
        self._proceed(now)

    def handed_over(self, now: float, stage: int, key: StepKey, root: bytes) -> None:
        """The shell's answer to ``HandOver``: the encoded sum has this root."""
        self._sums.handed_over(now, stage, key, root)

    def _reply(
        self, peer: PeerId, request: HopRequest, output: Tensor, loss: float, service_s: float
    ) -> None:
        queued = len(self._queue) + len(self._running)
        self._out.append(Send(peer, m.HopReply(request.id, output, loss, queued, service_s)))

    def _measure(self, request: HopRequest, service_s: float) -> None:
        if request.kind in TRAINING:
            slot = stage_of(request.id.hop, self._blocks), request.id.backward
            known = self._rates.get(slot, service_s)
            self._rates[slot] = known + RATE_ALPHA * (service_s - known)

    # -- what happens around it ------------------------------------------------------------

    def reconcile(self, now: float) -> None:
        """The ledger moved, or a state arrived: follow the step, serve what is assigned."""
        self._sums.reconcile(now)
        self._serve()
        self._proceed(now)
        self._report(now)

    def _serve(self) -> None:
        """A stage that was taken away is kept until the step that it has worked for is over."""
        serving = tuple(sorted({*self.assigned(), *self._sums.stages()}))
        if serving != self._serving:
            self._serving = serving
            self._rates = {slot: s for slot, s in self._rates.items() if slot[0] in serving}
            self._out.append(px.ServeStages(serving))

    def trainer(self, now: float, values_max: int) -> None:
        """A trainer is at work, with room for so many parameters; 0: none."""
        if self.values_max and not values_max:
            self.reset(now)
        self.values_max = values_max
        self._proceed(now)
        self._report(now)

    def reset(self, now: float) -> None:
        """The trainer process is lost with all that it had; the peer process goes on."""
        for run in self._running.values():
            waiting = [(job.peer, job.request) for job in run.waiting]
            for peer, request in [(run.peer, run.request), *waiting]:
                self._refuse(peer, request, "failed", "the trainer is lost")
        self.values_max = 0
        self._running.clear()
        self._sums.lost()
        self._serve()
        self._proceed(now)

    def announce(self, now: float) -> None:
        """A new leader, or a new link to it: what the old one had asked for is void."""
        self._sums.thaw()
        self._reported = None
        self._report(now)
        self._proceed(now)

    def disconnected(self, now: float, peer: PeerId) -> None:
        """Nobody waits for its answers any more."""
        self._queue.remove(lambda job: job.peer == peer)

    def report(self) -> m.WorkerReport:
        """How this worker stands; rates in seconds for forward and backward of one sample."""
        channels = {stage: stage_channel(stage) for stage in self.assigned()}
        known = {s: name for s, name in channels.items() if name in self.ledger.channels}
        stages = tuple(
            m.StageReport(
                stage,
                self.ledger.channels[name].round,
                self.values_max > 0 and self._in_step(name),
                (self._rates.get((stage, False), 0.0) + self._rates.get((stage, True), 0.0))
                / self._samples,
            )
            for stage, name in known.items()
        )
        queued = len(self._queue) + len(self._running)
        return m.WorkerReport(self.ledger.generation, stages, self.values_max, queued)

    def _report(self, now: float) -> None:
        """At once if something has become true or false, else now and then, changed or not."""
        if self.leader is None or self._me not in self.ledger.members:
            return
        report, old = self.report(), self._reported
        news = old is None or _facts(report) != _facts(old)
        if news or now >= self._next_report(report):
            self._reported, self._report_at = report, now + REPORT_S
            self._out.append(Send(self.leader, report))

    def _next_report(self, report: m.WorkerReport) -> float:
        if report != self._reported:
            return self._report_at
        works = self.values_max or report.stages
        return self._report_at - REPORT_S + REPORT_AGAIN_S if works else math.inf

    # -- time ------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        self._sums.tick(now)
        self._proceed(now)
        self._report(now)

    def deadline(self) -> float:
        alone = self.leader is None or self._me not in self.ledger.members
        report = math.inf if alone else self._next_report(self.report())
        waits = self._queue.next_at() if len(self._running) < self._slots else math.inf
        return min(self._sums.deadline(), report, waits)


def _facts(report: m.WorkerReport) -> tuple[object, ...]:
    """What others act on at once."""
    stages = tuple((s.stage, s.version, s.ready) for s in report.stages)
    return report.generation, report.values_max, stages
