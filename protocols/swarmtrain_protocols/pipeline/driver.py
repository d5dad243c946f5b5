"""The driver: pulls micro-batches through the stages, hop by hop, and keeps all it has sent.

Spec 11. It holds no weights and is never needed for correctness: what counts is what workers have
accumulated. Per micro-batch: leased, forwards, backwards, done; a request without an answer is sent
to another worker, for as long as the lease lives; with nobody to ask it is parked.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Effect, Emit, PeerId, Send
from swarmtrain_protocols.messages.pipeline import (
    HopId,
    HopRefused,
    HopReply,
    Lease,
    LeaseRequest,
    MicroBatchDone,
)
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.envelope import View, hop_request
from swarmtrain_protocols.pipeline.hops import stage_of
from swarmtrain_protocols.pipeline.microbatch import Hop, MicroBatch
from swarmtrain_protocols.pipeline.paths import PathPlan
from swarmtrain_protocols.pipeline.routing import Router
from swarmtrain_protocols.pipeline.window import Window
from swarmtrain_protocols.rounds.effects import Notice

LEASE_POLL_S = 0.5
LEASE_TTL_S = (0.5, 600.0)
"""Bounds of what a leader may say, in seconds."""
RETRY_S_MIN = 0.02
RETRY_S_MAX = 0.5
BUSY_S = 0.2
NOT_SERVED_S = 5.0
HEDGES_MAX = 1
BAD_INPUT_WITNESSES = 2
"""Workers that must call the same request malformed before its input is doubted."""
PATIENT = ("closing", "not_ready", "stale", "busy", "not_served", "malformed")
"""Refusals that say nothing against the worker; any other code does."""


@dataclass(slots=True, eq=False)
class _Task:
    """One request until it is answered. ``redo``: asked for again by the leader."""

    batch: MicroBatch
    hop: Hop
    redo: bool = False
    live: dict[int, PeerId] = field(default_factory=dict)
    """Workers that may still answer in time, by number of issue."""
    retry_at: float = math.inf
    refusals: int = 0
    hedges: int = 0
    doubters: dict[PeerId, None] = field(default_factory=dict)
    parked: bool = False


@dataclass(slots=True, eq=False)
class _Issue:
    ticket: int
    peer: PeerId
    task: _Task
    due: float
    hedge_at: float
    late: bool = False


class DriverCore:
    """All micro-batches of one driver.

    Args:
        stages: block stages of the run.
        view: the step in progress, or None while none can make progress.
        workers: members that serve a stage and can be reached, this node included.
        version: optimizer steps (or rounds) that the weights of a stage must have.
        paths: which hops a micro-batch visits.
        sticky: a backward goes to the worker of its forward if that is alive (``diloco``).
    """

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
        sticky: bool = False,
        router: Router | None = None,
    ) -> None:
        self.leader: PeerId | None = None
        self.active = False
        self.router = router or Router(rng)
        self.window = Window(stages)
        self.batches: dict[int, MicroBatch] = {}
        self.not_sticky = 0
        self._out = out
        self._stages = stages
        self._view_now = view
        self._view: View | None = None
        self._workers = workers
        self._version = version
        self._paths = paths
        self._sticky = sticky
        self._tasks: dict[tuple[int, Hop], _Task] = {}
        self._issues: dict[HopId, _Issue] = {}
        self._tickets = 0
        self._ask_at = math.inf
        self._expires = math.inf

    # -- what the node tells ---------------------------------------------------------------

    def set_active(self, now: float, active: bool) -> None:
        """This site may drive (its corpus is here), or may not any more."""
        if active != self.active:
            self.active = active
            self._forget()
            self._view = None
            self.reconcile(now)

    def reconcile(self, now: float) -> None:
        """The ledger moved: a step that is over, or was dropped, takes everything with it."""
        view = self._view_now() if self.active else None
        if view != self._view:
            self._forget()
            self._view = view
            self._ask_at = now if view is not None else math.inf
        self._wake(now)
        self._step(now)

    def leader_changed(self, now: float, leader: PeerId | None) -> None:
        """A new leader knows nothing: it hears what is done and what is under way."""
        self.leader = leader
        if self._view is None or leader is None:
            return
        for batch in self.batches.values():
            if batch.done:
                self._tell_done(batch)
        self._ask_at = now
        self._step(now)

    def connected(self, now: float, peer: PeerId) -> None:
        self.router.pardon(peer)
        self._wake(now)
        self._step(now)

    def disconnected(self, now: float, peer: PeerId) -> None:
        """Whatever the peer had to answer goes elsewhere at once."""
        for identity, issue in list(self._issues.items()):
            if issue.peer == peer:
                self._lost(now, identity, issue, "disconnected")
        self._step(now)

    def tokens(self, now: float, step: int, micro_batch: int, tokens: bytes) -> None:
        """The answer to ``NeedTokens``; late ones are ignored."""
        batch = self.batches.get(micro_batch)
        if self._view is None or step != self._view.step or batch is None:
            return
        if batch.tokens is None:
            batch.tokens = tokens
            self._begin(now, batch, batch.at(0))

    # -- messages --------------------------------------------------------------------------

    def receive(self, now: float, peer: PeerId, message: object) -> None:
        """A lease of the leader, or the answer of a worker with its tensor at hand."""
        if isinstance(message, Lease):
            self._leased(now, peer, message)
        elif isinstance(message, HopReply):
            self._replied(now, peer, message)
        elif isinstance(message, HopRefused):
            self._refused(now, peer, message)
        self._step(now)

    def _leased(self, now: float, peer: PeerId, lease: Lease) -> None:
        view = self._view
        if view is None or peer != self.leader:
            return
        if (lease.generation, lease.step) != (view.generation, view.step):
            return
        low, high = LEASE_TTL_S
        ttl_s = min(max(lease.ttl_s, low), high) if lease.ttl_s == lease.ttl_s else low
        self._expires = now + ttl_s
        self._ask_at = min(max(self._ask_at, now), now + min(LEASE_POLL_S, ttl_s / 3))
        for k in lease.micro_batches:
            batch = self.batches.get(k)
            if batch is None:
                self.batches[k] = MicroBatch(k, self._paths.rule.of_step(k, view.skip))
            elif batch.done:
                self._tell_done(batch)
        for hop, k in lease.redo:
            self._redo(now, hop, k)

    def _redo(self, now: float, hop: int, k: int) -> None:
        """A backward that nobody alive has any more: again, from what was kept."""
        batch = self.batches.get(k)
        if batch is None:
            self._say(k, 0.0, abandoned=True)  # the leader must lease it as a whole
        elif batch.passed(hop) and hop not in batch.redone:
            batch.redone[hop] = None  # it is asked for until all of them are done
            self._begin(now, batch, (hop, True), redo=True)

    def _replied(self, now: float, peer: PeerId, reply: HopReply) -> None:
        issue = self._issues.get(reply.id)
        if issue is None:
            return  # of a step that is over
        if issue.peer != peer:
            # It may answer a request of an earlier life of this driver, which numbered it alike.
            fields: dict[str, object] = {"peer": peer.hex(), "reason": "unexpected"}
            self._out.append(Emit(Notice("message_ignored", fields)))
            return
        batch, (hop, backward) = issue.task.batch, issue.task.hop
        empty = reply.output.nbytes == 0 and (hop != batch.path[0] or not backward)
        if empty or not math.isfinite(reply.loss):
            self._notice(peer, "bad_reply")
            self._lost(now, reply.id, issue, "bad reply")
            return
        del self._issues[reply.id]
        seconds = reply.service_s
        if issue.late:
            self.router.late(now, peer)
        else:
            seconds = self.router.replied(now, issue.ticket)
            self._hasten(now, issue.task.hop)
        self._out.append(Emit(px.HopDone(peer, hop, backward, seconds, "ok")))
        task = issue.task
        if self._tasks.get((batch.k, task.hop)) is not task:
            return  # another worker was faster
        del self._tasks[batch.k, task.hop]
        if not task.redo:
            batch.answered(reply.output, reply.loss, peer)
            if batch.done:
                self.window.grow()
        following = batch.now
        if following is not None and not task.redo:
            self._begin(now, batch, following)
        elif following is None and not any(k == batch.k for k, _ in self._tasks):
            self._tell_done(batch)  # again, if hops had to be done again
            self._ask_at = now

    def _hasten(self, now: float, hop: Hop) -> None:
        """Whoever was asked when less was known of such a hop gets no more time for it."""
        due = now + self.router.timeout_s(hop)
        for issue in self._issues.values():
            if issue.task.hop == hop:
                issue.due = min(issue.due, due)

    def _refused(self, now: float, peer: PeerId, refusal: HopRefused) -> None:
        issue = self._issues.get(refusal.id)
        if issue is None or issue.peer != peer:
            return
        task, code = issue.task, refusal.code
        if code not in PATIENT:
            self._lost(now, refusal.id, issue, code)
            return
        del self._issues[refusal.id]
        if not issue.late:
            self.router.dropped(issue.ticket)
        if code == "busy":
            self.window.shrink(now)
        self.router.avoid(now, peer, NOT_SERVED_S if code == "not_served" else BUSY_S)
        self._out.append(Emit(px.HopDone(peer, task.hop[0], task.hop[1], 0.0, code)))
        self._again(now, issue, refusal.id.attempt)
        if code == "malformed":
            self._doubt(now, task, peer)

    def _doubt(self, now: float, task: _Task, peer: PeerId) -> None:
        """The request itself may be bad: then whoever made its newest tensor is asked again."""
        task.doubters[peer] = None
        batch = task.batch
        current = self._tasks.get((batch.k, task.hop)) is task and not task.redo
        serving = len(self._workers(stage_of(task.hop[0], self._stages)))
        if not current or len(task.doubters) < min(BAD_INPUT_WITNESSES, max(1, serving)):
            return
        del self._tasks[batch.k, task.hop]
        maker = batch.step_back()
        if maker is not None:
            self._notice(maker, "bad_tensor")
            self.router.avoid(now, maker, NOT_SERVED_S)
        following = batch.now
        assert following is not None
        self._begin(now, batch, following)

    # -- requests --------------------------------------------------------------------------

    def _begin(self, now: float, batch: MicroBatch, hop: Hop, *, redo: bool = False) -> None:
        task = self._tasks[batch.k, hop] = _Task(batch, hop, redo)
        self._issue(now, task)

    def _issue(self, now: float, task: _Task) -> None:
        """Send the request to whoever will be done with it first."""
        view = self._view
        assert view is not None
        task.retry_at = math.inf
        stage = stage_of(task.hop[0], self._stages)
        workers = self._workers(stage)
        peer = self._preferred(now, task, workers)
        if peer is None:
            peer = self.router.choose(now, task.hop, workers, exclude=task.live.values())
        task.parked = peer is None
        if peer is None or len(self._issues) >= limits.DRIVER_ISSUES_MAX:
            task.retry_at = now + RETRY_S_MAX
            return
        batch, (hop, backward) = task.batch, task.hop
        attempt = batch.issues.get(task.hop, 0)
        batch.issues[task.hop] = attempt + 1
        self._tickets += 1
        identity = HopId(view.generation, view.step, batch.k, hop, backward, attempt)
        hedge_s = self.router.hedge_s(task.hop)
        self._issues[identity] = _Issue(
            self._tickets,
            peer,
            task,
            now + self.router.timeout_s(task.hop),
            math.inf if hedge_s is None else now + hedge_s,
        )
        self.router.sent(now, self._tickets, peer, task.hop)
        task.live[attempt] = peer
        version = self._version(stage)
        request = hop_request(view, version, identity, batch, self._stages, self._out)
        self._out.append(Send(peer, request))

    def _preferred(self, now: float, task: _Task, workers: Sequence[PeerId]) -> PeerId | None:
        """In ``diloco`` replicas differ: a backward belongs to the weights of its forward."""
        hop, backward = task.hop
        if not self._sticky or not backward or hop == task.batch.path[-1]:
            return None
        maker = task.batch.makers.get((hop, False))
        bad = maker is None or maker in task.live.values() or self.router.is_banned(now, maker)
        if maker is None or bad or maker not in workers:
            self.not_sticky += 1
            return None
        return maker

    def _lost(self, now: float, identity: HopId, issue: _Issue, why: str) -> None:
        """This issue will bring nothing, and the worker or its link is to blame."""
        del self._issues[identity]
        if not issue.late:
            self.router.failed(now, issue.ticket)
        hop, backward = issue.task.hop
        self._out.append(Emit(px.HopDone(issue.peer, hop, backward, 0.0, why)))
        self._again(now, issue, identity.attempt)

    def _again(self, now: float, issue: _Issue, attempt: int) -> None:
        """Ask another worker: at once if there is a good one, else after a breath."""
        task = issue.task
        task.live.pop(attempt, None)
        if self._tasks.get((task.batch.k, task.hop)) is not task or task.live:
            return
        task.refusals += 1
        workers = self._workers(stage_of(task.hop[0], self._stages))
        if any(not self.router.is_banned(now, w) and w != issue.peer for w in workers):
            self._issue(now, task)
        else:
            breath_s = RETRY_S_MIN * 2 ** min(task.refusals - 1, 10)
            task.retry_at = now + min(RETRY_S_MAX, breath_s)

    # -- time ------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        for identity, issue in list(self._issues.items()):
            if not issue.late and issue.due <= now:
                self._timed_out(now, identity, issue)
            elif issue.hedge_at <= now:
                issue.hedge_at = math.inf
                self._hedge(now, issue)
        for task in list(self._tasks.values()):
            if task.retry_at <= now:
                self._issue(now, task)
        self._step(now)

    def deadline(self) -> float:
        times = [self._ask_at, self._expires if self._working() else math.inf]
        times += [min(i.due, i.hedge_at) for i in self._issues.values() if not i.late]
        times += [task.retry_at for task in self._tasks.values()]
        return min(times)

    def _timed_out(self, now: float, identity: HopId, issue: _Issue) -> None:
        """Its answer is still welcome, but others are asked."""
        issue.late, issue.hedge_at = True, math.inf
        self.router.timed_out(now, issue.ticket)
        self.window.shrink(now)
        hop, backward = issue.task.hop
        self._out.append(Emit(px.HopDone(issue.peer, hop, backward, 0.0, "timeout")))
        self._again(now, issue, identity.attempt)
        late = [i for i, other in self._issues.items() if other.late]
        for old in late[: -limits.DRIVER_ISSUES_MAX // 2]:
            del self._issues[old]

    def _hedge(self, now: float, issue: _Issue) -> None:
        """Much slower than usual, and somebody has nothing to do: two are asked, one counts."""
        task = issue.task
        current = self._tasks.get((task.batch.k, task.hop)) is task
        workers = self._workers(stage_of(task.hop[0], self._stages))
        idle = [w for w in workers if self.router.idle(now, w) and w not in task.live.values()]
        if current and idle and task.hedges < HEDGES_MAX:
            task.hedges += 1
            self._issue(now, task)

    def _step(self, now: float) -> None:
        """Leases: begin what there is room for, ask for more, give up those that have run out."""
        if self._view is None:
            return
        if self._expires <= now:
            self._abandon()
        under_way = sum(batch.begun and not batch.done for batch in self.batches.values())
        for k, batch in self.batches.items():
            if not batch.begun and under_way < self.window.size:
                batch.begun, under_way = True, under_way + 1
                self._out.append(px.NeedTokens(self._view.step, k))
        if self._ask_at <= now and self.leader is not None:
            self._ask_at = now + LEASE_POLL_S
            message = LeaseRequest(
                self._view.generation, self._view.step, self.room(), tuple(self._working())
            )
            self._out.append(Send(self.leader, message))
        elif self._ask_at <= now:
            self._ask_at = now + LEASE_POLL_S

    def room(self) -> int:
        """How many more micro-batches this driver can take now: back-pressure."""
        if sum(b.nbytes for b in self.batches.values()) >= limits.DRIVER_KEPT_BYTES_MAX:
            return 0
        return max(0, self.window.size - len(self._working()))

    def _working(self) -> list[int]:
        return [k for k, batch in self.batches.items() if not batch.done]

    def _abandon(self) -> None:
        """The leases have run out: the leader may have given the work to others."""
        self._expires = math.inf
        for k in self._working():
            batch = self.batches.pop(k)
            for key in [key for key, task in self._tasks.items() if task.batch is batch]:
                del self._tasks[key]
            self._say(k, 0.0, abandoned=True)

    def _forget(self) -> None:
        """Everything of the step is void. Answers that are under way will be strangers."""
        for issue in self._issues.values():
            if not issue.late:
                self.router.dropped(issue.ticket)
        self._issues.clear()
        self._tasks.clear()
        self.batches.clear()
        self._ask_at = self._expires = math.inf

    def _wake(self, now: float) -> None:
        """There may be somebody to ask now."""
        for task in list(self._tasks.values()):
            if task.parked and not task.live:
                self._issue(now, task)

    # -- messages to the leader ------------------------------------------------------------

    def _tell_done(self, batch: MicroBatch) -> None:
        batch.redone.clear()
        self._say(batch.k, batch.loss, abandoned=False)

    def _say(self, k: int, loss: float, *, abandoned: bool) -> None:
        if self.leader is not None and self._view is not None:
            view = self._view
            done = MicroBatchDone(view.generation, view.step, k, loss, abandoned)
            self._out.append(Send(self.leader, done))

    def _notice(self, peer: PeerId, fault: str) -> None:
        self._out.append(Emit(Notice("peer_fault", {"peer": peer.hex(), "fault": fault})))

    def _load(self, hop: int) -> float:
        """Seconds until one more backward of ``hop`` would be done, at the best worker."""
        return self.router.finish_s((hop, True), self._workers(stage_of(hop, self._stages)))

    # -- figures ---------------------------------------------------------------------------

    def issues(self) -> list[tuple[HopId, PeerId]]:
        """Requests that are waited for, and who has them."""
        return [(identity, issue.peer) for identity, issue in self._issues.items()]

    def figures(self) -> dict[str, int]:
        """Micro-batches by state, for the dashboard."""
        parked = len({t.batch.k for t in self._tasks.values() if t.parked})
        done = sum(batch.done for batch in self.batches.values())
        redo = sum(task.redo for task in self._tasks.values())
        active = len(self.batches) - done
        return {"active": active, "parked": parked, "done": done, "redo": redo}
