"""The leader's side of a step: leases, the query for what workers have, the plan, two log entries.

Spec 11 §2.4. Volatile: a new leader starts with nothing, asks the workers, and goes on from what
they really have. Between STEP_CLOSED and STEP_OUTCOME the rounds of all stages run as any round
does, and ``rounds.leader.RoundLeader`` reports here what becomes of each.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import Effect, Emit, PeerId, Send
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.messages import pipeline as m
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.messages.pipeline import StepKey
from swarmtrain_protocols.pipeline import claims as cl
from swarmtrain_protocols.pipeline.asking import ASK_AGAIN_S, Closing, Query
from swarmtrain_protocols.pipeline.book import stage_channel, step_key
from swarmtrain_protocols.pipeline.leases import Leases, Vacancy
from swarmtrain_protocols.pipeline.step_policy import StepPolicy, clip_scale
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.leader import RoundLeader

RECHECK_S = 0.1
STEPS_MEASURED = 15
STEP_S_FIRST = 120.0
STEP_S_MIN = 10.0
QUERIES_BITS = 20
"""Queries of one leadership are numbered from its log index shifted by so many bits."""
NOWHERE = (-1, -1, -1)


@dataclass(slots=True)
class _Verdict:
    root: bytes
    held_by: tuple[bytes, ...]
    norm: float


class StepLeader:
    """Active on the node that leads the log. ``propose`` appends, False if it cannot now.

    Args:
        rounds: knows who is in step with each stage; this object becomes its ``decider``.
        valve: the hop that the next step leaves out, 0: none.
    """

    def __init__(
        self,
        *,
        me: PeerId,
        ledger: Ledger,
        out: list[Effect],
        policy: StepPolicy,
        propose: Callable[[float, e.EntryBody], bool],
        connected: Callable[[], list[PeerId]],
        rounds: RoundLeader,
        valve: Callable[[], int] = lambda: 0,
    ) -> None:
        self.ledger = ledger
        self.policy = policy
        self.active = False
        self.vacancy = Vacancy()
        self._me = me
        self._out = out
        self._propose = propose
        self._connected = connected
        self._rounds = rounds
        self._valve = valve
        rounds.decider = self
        self._reset(0.0)

    def _reset(self, now: float) -> None:
        self._now = now
        self._ground = NOWHERE
        self._key = StepKey(0, 0, 0)
        self._leases = Leases(0, self.policy.lease_ttl_s, now)
        self._from = self.vacancy.over_at(now, self.policy.lease_ttl_s)
        self._began = now
        self._durations: deque[float] = deque(maxlen=STEPS_MEASURED)
        self._queries = max(0, self.ledger.index) << QUERIES_BITS
        self._query: Query | None = None
        self._closing: Closing | None = None
        self._failures = 0
        self._verdicts: dict[RoundKey, _Verdict] = {}
        self._reasons: dict[RoundKey, str] = {}
        self._decided = ""
        self._ask = True

    def activate(self, now: float, active: bool) -> None:
        """Leadership of the log begins or ends; everything volatile is dropped."""
        self.active = active
        self._reset(now)
        if active:
            self.reconcile(now)

    @property
    def _blocks(self) -> int:
        return self.ledger.pipeline.blocks

    def _present(self) -> list[PeerId]:
        return [PeerId(k) for k in self._rounds.present()]

    def _drivers(self) -> list[PeerId]:
        return [PeerId(k) for k in self._rounds.here()]

    # -- following the ledger --------------------------------------------------------------

    def reconcile(self, now: float) -> None:
        """The ledger moved: a step is over, or closed, or dropped."""
        if not self.active:
            return
        state, key = self.ledger.pipeline, step_key(self.ledger)
        ground = (key.generation, key.step, state.era)
        if ground != self._ground:
            if self._ground != NOWHERE:
                self._ask = False  # it begins under this leader: there is nothing to be found
            if self._ground[::2] == ground[::2]:
                self._durations.append(now - self._began)
            self._ground, self._began = ground, now
            count, ttl_s = self.policy.micro_batches, self.policy.lease_ttl_s
            self._leases = Leases(count, ttl_s, self._from)
        elif key != self._key:
            self._ask = True  # an attempt failed, and everything is there, or nearly
        if key != self._key:
            self._key = key
            self._query = self._closing = None
            self._failures, self._decided = 0, ""
        for known in (self._verdicts, self._reasons):
            for old in [k for k in known if not self._is_closed(k)]:
                del known[old]
        if state.closed is not None:
            self._query = self._closing = None
        self.step(now)

    def disconnected(self, now: float, peer: PeerId) -> None:
        """What a worker was asked on that link is void: it takes backwards again."""
        self._leases.gone(peer)
        if self._query is not None and peer in self._query.asked:
            self._query.asked.remove(peer)
            self._query.answers.pop(peer, None)
        closing = self._closing
        if closing is not None and not closing.proposed and peer in closing.plan.members:
            self._again(now)
        self.step(now)

    def _asking(self) -> Query | None:
        return self._closing.query if self._closing is not None else self._query

    def _again(self, now: float) -> None:
        """The plan cannot be carried out: see what is there now."""
        self._failures += 1
        self._query_all(now)

    # -- messages --------------------------------------------------------------------------

    def receive(self, now: float, peer: PeerId, message: object) -> None:
        """LeaseRequest, MicroBatchDone, CloseAnswer, StepReady."""
        if not self.active or peer not in self.ledger.members or not self.ledger.pipeline.stages:
            return
        if isinstance(message, m.LeaseRequest):
            if (message.generation, message.step) == self._ground[:2]:
                self._leases.asked(now, peer, message.room, message.working)
                self._deal(now, asking=peer)
        elif isinstance(message, m.MicroBatchDone):
            self._done(peer, message)
        elif isinstance(message, m.CloseAnswer):
            self._answered(now, peer, message)
        elif isinstance(message, m.StepReady):
            self._readied(peer, message)
        self.step(now)

    def _done(self, peer: PeerId, message: m.MicroBatchDone) -> None:
        if (message.generation, message.step) != self._ground[:2]:
            return
        if message.micro_batch >= self.policy.micro_batches or not math.isfinite(message.loss):
            self._fault(peer, "bad_micro_batch")
        elif message.abandoned:
            self._leases.abandoned(peer, message.micro_batch)
        else:
            self._leases.finished(peer, message.micro_batch, message.loss)

    def _fault(self, peer: bytes, code: str) -> None:
        self._out.append(Emit(fx.Notice("peer_fault", {"peer": peer.hex(), "fault": code})))

    # -- leases ----------------------------------------------------------------------------

    def _deal(self, now: float, asking: PeerId | None = None) -> None:
        """Lease what is free, and tell whoever has something to send again."""
        if not self._runs() or self._query is not None or self._closing is not None:
            grants, redoers = {}, []
        else:
            grants, redoers = self._leases.deal(now, self._drivers()), self._leases.redoers()
        told = list(grants)
        if asking is not None:
            told += [asking, *(d for d in redoers if d == asking)]
        for driver in dict.fromkeys(told):
            numbers = grants[driver].micro_batches if driver in grants else []
            redo = self._leases.redo_of(driver) if driver in redoers else []
            self._lease(driver, numbers, redo)

    def _lease(self, driver: PeerId, numbers: list[int], redo: list[tuple[int, int]]) -> None:
        generation, step, _ = self._ground
        ttl_s = self.policy.lease_ttl_s
        self._out.append(
            Send(driver, m.Lease(generation, step, tuple(numbers), ttl_s, tuple(redo)))
        )

    # -- from open to closed ---------------------------------------------------------------

    def _runs(self) -> bool:
        """Steps of this run can make progress."""
        ledger, state = self.ledger, self.ledger.pipeline
        return (
            self.active
            and state.mode == "sync"
            and ledger.model is not None
            and not (ledger.ended or ledger.paused or state.lost())
        )

    def step(self, now: float) -> None:
        self._now = now
        if not self.active:
            return
        if self.ledger.pipeline.closed is not None:
            self._decide(now)
        elif not self._runs():
            self._reopen()
        elif self._closing is not None:
            self._close(now, self._closing)
        elif self._query is not None:
            self._settle(now, self._query)
        else:
            self._deal(now)
            self._maybe_ask(now)

    def late_at(self) -> float:
        """From then on the step may be closed without all of its micro-batches."""
        if self.policy.step_timeout_s:
            return self._began + self.policy.step_timeout_s
        if not self._durations:
            return self._began + STEP_S_FIRST
        return self._began + max(STEP_S_MIN, 3.0 * statistics.median(self._durations))

    def _maybe_ask(self, now: float) -> None:
        done = self._leases.done()
        everything = done == self.policy.micro_batches
        enough = now >= self.late_at() and done >= self.policy.least
        if self._ask or everything or enough:
            self._query_all(now)

    def _query_all(self, now: float) -> None:
        """Ask all that are in step with any stage; with a stage missing there is no point."""
        self._query = self._closing = None
        standing = []
        for stage in range(len(self.ledger.pipeline.stages)):
            known = self._rounds.standing(now, stage_channel(stage))
            if known is None:
                self._ask = True
                return
            standing.append(known)
        people = sorted({member for holders, _ in standing for member in holders})
        asked = [PeerId(member) for member in people]
        self._queries += 1
        patience = self.policy.answer_timeout_s * 2 ** min(self._failures, 3)
        self._query = Query(self._queries, standing, asked, now + patience, now + ASK_AGAIN_S)
        for peer in asked:
            self._out.append(Send(peer, m.CloseQuery(self._key, self._queries)))

    def _answered(self, now: float, peer: PeerId, answer: m.CloseAnswer) -> None:
        query = self._asking()
        if query is None and answer.key == self._key and self._runs():
            self._out.append(Send(peer, m.Reopen(answer.key, answer.query)))  # it missed the word
        if query is None or (answer.key, answer.query) != (self._key, query.number):
            return
        if peer not in query.asked:
            return
        believed = [s for s, (holders, _) in enumerate(query.standing) if peer in holders]
        count, legal = self.policy.micro_batches, (self.ledger.pipeline.skip, self.policy.skips)
        claims = cl.decode_claims(answer.claims, believed, self._blocks, count, *legal)
        if claims is None:
            self._fault(peer, "bad_claims")
        if self._closing is None:
            query.answers[peer] = claims or {}
        elif not self._closing.proposed and claims != query.answers.get(peer):
            self._again(now)  # what the plan asks for is not there any more

    def _settle(self, now: float, query: Query) -> None:
        present = self._present()
        waiting = query.waiting(present)
        if waiting and now < query.deadline:
            for peer in query.overdue(now, present):
                self._out.append(Send(peer, m.CloseQuery(self._key, query.number)))
            return
        for peer in waiting:
            fields: dict[str, object] = {"what": "claims", "why": "no answer", "using": peer.hex()}
            self._out.append(Emit(fx.Notice("fallback", fields)))
        answers = {peer: query.answers[peer] for peer in query.answers if peer in present}
        settled = cl.settle(answers, self._blocks, self.policy.micro_batches)
        self._leases.settle(now, settled, self._drivers())
        self._ask = False
        count = len(settled.micro_batches)
        late = now >= self.late_at()
        if count < self.policy.micro_batches and not (late and count >= self.policy.least):
            self._reopen()
            self._redo()
            self._deal(now)
            return
        self._plan(now, query, settled)

    def _reopen(self) -> None:
        """Workers take backwards again."""
        query = self._asking()
        self._query = self._closing = None
        if query is not None:
            self._ask = self._ask or not self._runs()
            for peer in query.asked:
                self._out.append(Send(peer, m.Reopen(self._key, query.number)))

    def _redo(self) -> None:
        for driver in self._leases.redoers():
            self._lease(driver, [], self._leases.redo_of(driver))

    def _plan(self, now: float, query: Query, settled: cl.Settlement) -> None:
        plan = cl.plan_of(self._key, query.number, settled, self._blocks)
        due: dict[tuple[int, PeerId], int] = {}
        for member in plan.members:
            shares = cl.by_stage(cl.owned(plan, member, self._blocks) or {}, self._blocks)
            for stage, hops in shares.items():
                due[stage, PeerId(member)] = sum(mask.bit_count() for mask in hops.values())
        patience = self.policy.answer_timeout_s * 2 ** min(self._failures, 3)
        self._query = None
        self._closing = Closing(
            query, plan, cl.plan_digest(plan), due, now + patience, now + ASK_AGAIN_S
        )
        for member in plan.members:
            self._out.append(Send(PeerId(member), plan))

    def _readied(self, peer: PeerId, ready: m.StepReady) -> None:
        closing = self._closing
        if closing is None or (ready.key, ready.digest) != (self._key, closing.digest):
            return
        if closing.due.get((ready.stage, peer)) != ready.owned:
            self._fault(peer, "bad_sum")
            return
        closing.ready[ready.stage, peer] = ready.root

    def _close(self, now: float, closing: Closing) -> None:
        if closing.proposed:
            return
        present = self._present()
        lost = any(peer not in present for _, peer in closing.due)
        if lost or now >= closing.deadline:
            self._again(now)
            return
        if not closing.complete:
            for peer in closing.overdue(now):
                self._out.append(Send(peer, closing.plan))
            return
        body = self._closed(now, closing)
        if body is not None and self._propose(now, body):
            closing.proposed = True

    def _closed(self, now: float, closing: Closing) -> e.StepClosed | None:
        """The entry that closes the step; None: a stage has nobody in step at the moment."""
        sums = []
        present = self._rounds.present()
        for stage in range(len(self.ledger.pipeline.stages)):
            channel = stage_channel(stage)
            standing = self._rounds.standing(now, channel)
            if standing is None or standing[1] != closing.query.standing[stage][1]:
                self._query_all(now)
                return None
            people = sorted(peer for s, peer in closing.due if s == stage)
            contributors = tuple(
                e.Contributor(
                    peer,
                    closing.ready[stage, PeerId(peer)],
                    float(closing.due[stage, PeerId(peer)]),
                    self._key.step,
                )
                for peer in people
            )
            values = self.ledger.channels[channel].values
            preferred = list(standing[0])
            parts = self._rounds.parts(values, preferred, present, self._key.step)
            sums.append(e.StageSum(stage, contributors, parts, standing[0], standing[1]))
        numbers = closing.plan.micro_batches
        losses = self._leases.losses(numbers)
        loss = math.fsum(losses) / len(losses) if losses else -1.0
        return e.StepClosed(
            *(self._key.generation, self._key.step, self._key.attempt),
            closing.digest,
            len(numbers),
            loss,
            self.policy.scatter_codec,
            self.policy.gather_codec,
            tuple(sums),
        )

    # -- the outcome -----------------------------------------------------------------------

    def _is_closed(self, key: RoundKey) -> bool:
        """The attempt is one of the step that is closed at this moment."""
        closed = self.ledger.pipeline.closed
        return closed is not None and (key.generation, key.round, key.attempt) == (
            closed.generation,
            closed.step,
            closed.attempt,
        )

    def committable(
        self, now: float, key: RoundKey, root: bytes, held_by: tuple[bytes, ...], norm: float
    ) -> None:
        """Enough members hold this result of a stage."""
        if self.active and self._is_closed(key):
            self._verdicts[key] = _Verdict(root, held_by, norm)
            self._decide(now)

    def cannot(self, now: float, key: RoundKey, reason: str) -> None:
        """A stage's attempt has failed, and so has the step's."""
        if self.active and self._is_closed(key):
            self._reasons.setdefault(key, reason)
            self._decide(now)

    def _decide(self, now: float) -> None:
        closed = self.ledger.pipeline.closed
        if closed is None or self._decided:
            return
        if self._reasons:
            key, reason = next(iter(self._reasons.items()))
            body = self._outcome(closed, (), 1.0, f"{key.channel}: {reason}"[:256], 0)
            if self._propose(now, body):
                self._decided = "aborted"
            return
        if len(self._verdicts) < len(closed.stages):
            return
        by_channel = {key.channel: verdict for key, verdict in self._verdicts.items()}
        stages = []
        for item in closed.stages:
            verdict = by_channel[stage_channel(item.stage)]
            stages.append(e.StageOutcome(item.stage, verdict.root, verdict.norm, verdict.held_by))
        scale = clip_scale([item.square_norm for item in stages], self.policy.clip)
        if self._propose(now, self._outcome(closed, tuple(stages), scale, "", self._valve())):
            self._decided = "committed"

    @staticmethod
    def _outcome(
        closed: e.StepClosed, stages: tuple[e.StageOutcome, ...], scale: float, why: str, skip: int
    ) -> e.StepOutcome:
        c = closed
        return e.StepOutcome(c.generation, c.step, c.attempt, stages, scale, why, skip)

    # -- time ------------------------------------------------------------------------------

    def deadline(self) -> float:
        if not self.active or not self.ledger.pipeline.stages:
            return math.inf
        if self.ledger.pipeline.closed is not None:
            waits = not self._decided and bool(self._reasons or self._complete())
            return self._now + RECHECK_S if waits else math.inf
        if not self._runs():
            return math.inf
        times: list[float] = []
        if self._closing is not None and not self._closing.proposed:
            closing = self._closing
            times.append(self._now if closing.complete else min(closing.deadline, closing.again_at))
        elif self._query is not None:
            times.append(min(self._query.deadline, self._query.again_at))
        elif self._closing is None:
            times.append(self._leases.deadline(self._now))
            done = self._leases.done()
            if self._ask or done == self.policy.micro_batches:
                times.append(self._now)
            elif done >= self.policy.least:
                times.append(self.late_at())
        # What is due already waits for somebody else: look again soon.
        return min((max(t, self._now + RECHECK_S) for t in times), default=math.inf)

    def _complete(self) -> bool:
        return len(self._verdicts) == len(self.ledger.pipeline.stages)
