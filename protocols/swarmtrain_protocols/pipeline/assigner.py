"""The leader's side of stage assignment: joins, cover, moves, drains, one entry each. Spec 11.

Active on the leader of the log. Volatile: a new leader places joiners at once, and moves nobody
before it has heard everybody for a report interval. The ledger's ``pipeline.assigned`` is the only
outcome; what was proposed and is not in it yet counts as if it were.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import Effect, Emit, PeerId
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.messages.pipeline import WorkerReport
from swarmtrain_protocols.pipeline import assign
from swarmtrain_protocols.pipeline.assign import Change, Pace, Table
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.pipeline.census import LIFETIME_S, AssignPolicy, Census
from swarmtrain_protocols.rounds import effects as fx

PERIOD_S_MIN = 5.0
PERIOD_S_MAX = 300.0
PERIOD_STEPS = 30
PERIOD_DOWNLOADS = 2
PROPOSAL_PATIENCE_S = 10.0
"""A proposal that is not in the ledger by then is lost, and made again if it still makes sense."""
DRAIN_S_MIN = 60.0
DRAIN_DOWNLOADS = 4
CHANGES_PER_LOOK_MAX = 64
LOOK_S_MIN = 0.05
"""However many joiners report, the table is made at most this often."""
SLOW_SHARE = 0.1
"""A worker below this share of the median speed is named in the events."""


OLD_NEWS = ("stale_generation", "not_a_member")
"""What an honest member may say whose news is older or newer than this node's."""


@dataclass(frozen=True, slots=True)
class _Proposed:
    stages: tuple[int, ...]
    at: float


class Assigner:
    """Says who serves which stage; ``propose`` appends to the log, False if it cannot now."""

    def __init__(
        self,
        *,
        me: PeerId,
        ledger: Ledger,
        out: list[Effect],
        policy: AssignPolicy,
        propose: Callable[[float, e.EntryBody], bool],
        connected: Callable[[], list[PeerId]],
    ) -> None:
        self._ledger = ledger
        self.active = False
        self._me = me
        self._out = out
        self._policy = policy
        self._propose = propose
        self._connected = connected
        self._reset(0.0)

    def _reset(self, now: float) -> None:
        self._census = Census(self._me, self._ledger, self._policy, now)
        self._proposed: dict[bytes, _Proposed] = {}
        self._leaving: dict[bytes, float] = {}
        self._told: dict[bytes, str] = {}
        self._patient_until = now + self._policy.report_s
        self._last_move = now
        self._next_look = now
        self._last_look = -math.inf

    @property
    def ledger(self) -> Ledger:
        return self._ledger

    @ledger.setter
    def ledger(self, ledger: Ledger) -> None:
        """A snapshot has replaced the ledger."""
        self._ledger = self._census.ledger = ledger

    def activate(self, now: float, active: bool) -> None:
        """Leadership of the log begins or ends; everything volatile is dropped."""
        self.active = active
        self._reset(now)

    # -- messages --------------------------------------------------------------------------

    def receive(self, now: float, peer: PeerId, message: WorkerReport) -> None:
        """A worker says how it stands; one without a stage gets one at once."""
        if not self._works():
            return
        fault = self._census.reported(now, peer, message)
        if fault in OLD_NEWS:
            return  # it reports again
        if fault:
            fields: dict[str, object] = {"peer": peer.hex(), "fault": fault}
            self._out.append(Emit(fx.Notice("peer_fault", fields)))
        elif message.values_max and not self._stages_of(peer):
            self._next_look = min(self._next_look, self._last_look + LOOK_S_MIN)
            self.step(now)

    def leaving(self, now: float, member: PeerId) -> None:
        """The member wants to go: it serves on until others do. See ``may_leave``."""
        self._leaving.setdefault(member, now)
        self._next_look = min(self._next_look, now)

    def returned(self, member: PeerId) -> None:
        """The member asks to be in again."""
        self._leaving.pop(member, None)

    def may_leave(self, member: PeerId) -> bool:
        """No stage counts on this member any more."""
        return member not in self._ledger.pipeline.assigned

    def able(self, stage: int) -> list[PeerId]:
        """Members with a link and a trainer that the log has given ``stage``, in member order."""
        serving = self._ledger.pipeline.serving(stage)
        return [PeerId(k) for k in serving if self._census.at_work(k)]

    def overloaded(self) -> int:
        """The block stage that holds all others up; 0: none, or nothing is known about it."""
        known = self._works() and math.isfinite(self._last_look)
        return assign.overloaded(self.table(self._last_look)) if known else 0

    def disconnected(self, now: float, peer: PeerId) -> None:
        self._next_look = min(self._next_look, now)

    def reconcile(self, now: float) -> None:
        """The ledger moved."""
        if not self._works():
            return
        for member in self._census.reconcile(now):
            self._proposed.pop(member, None)
        for member in [k for k in self._leaving if k not in self._ledger.members]:
            del self._leaving[member]
        for member in [k for k in self._told if k not in self._ledger.members]:
            del self._told[member]

    def _works(self) -> bool:
        """There is something to assign: the log is led here, and the model is known."""
        state = self._ledger.pipeline
        known = bool(state.stages) and stage_channel(0) in self._ledger.channels
        return self.active and known and not self._ledger.ended

    def _stages_of(self, member: bytes) -> tuple[int, ...]:
        proposed = self._proposed.get(member)
        if proposed is not None:
            return proposed.stages
        return self._ledger.pipeline.assigned.get(member, ())

    # -- deciding --------------------------------------------------------------------------

    def step(self, now: float) -> None:
        if self._works() and now >= self._next_look:
            self.look(now)

    def deadline(self) -> float:
        return self._next_look if self._works() else math.inf

    def look(self, now: float) -> None:
        """Look at everybody and propose what is due."""
        self._last_look, self._next_look = now, now + self._policy.report_s
        for member in [k for k, p in self._proposed.items() if now > p.at + PROPOSAL_PATIENCE_S]:
            del self._proposed[member]
        self._census.look(now, self._connected())
        table = self.table(now)
        table = self._place(now, table)
        if now < self._patient_until:
            self._next_look = min(self._next_look, self._patient_until)
            return
        table = self._repeat(now, table, assign.cover)
        table = self._repeat(now, table, assign.protect)
        table = self._drain(now, table)
        if not self._proposed:
            self._improve(now, table)
        self._name_slow(table)

    def table(self, now: float) -> Table:
        """Who serves what, as far as the leader knows."""
        proposed = {member: item.stages for member, item in self._proposed.items()}
        return self._census.table(now, proposed, dict.fromkeys(self._leaving))

    def pace(self, now: float, table: Table) -> Pace:
        """What moves are weighed with at this moment."""
        each = self._census.seconds_per_value
        period = self._policy.period_s
        if not period:
            download = each * max(stage.values for stage in table.stages.values())
            period = min(max(PERIOD_STEPS * self._census.step_s, PERIOD_S_MIN), PERIOD_S_MAX)
            period = max(period, PERIOD_DOWNLOADS * download)
        horizon = min(LIFETIME_S, self._census.lifetime_s())
        return Pace(now, period, horizon, each)

    def _place(self, now: float, table: Table) -> Table:
        """Joiners get a stage at once; at the very beginning as many as the run starts with."""
        joiners = [w for w in table.staying() if not w.stages and w.room]
        few = len(joiners) < self._policy.start_peers
        if few and not self._proposed and not self._census.started():
            return table
        for worker in joiners:
            change = assign.place(table, worker.id)
            if change is None:
                self._tell(worker.id, "a worker without a stage", "no stage fits into its memory")
            elif self._log(now, change):
                table = table.changed(change.member, change.stages, now)
                # Others may be about to join, too: they are better than a second stage for one.
                self._patient_until = max(self._patient_until, now + self._policy.report_s)
        return table

    def _repeat(self, now: float, table: Table, rule: Callable[[Table], Change | None]) -> Table:
        for _ in range(CHANGES_PER_LOOK_MAX):
            change = rule(table)
            if change is None or not self._log(now, change):
                break
            table = table.changed(change.member, change.stages, now)
        return table

    def _drain(self, now: float, table: Table) -> Table:
        """Let those go that nobody needs any more, or that have waited for long enough."""
        for member, since in list(self._leaving.items()):
            stages = self._stages_of(member)
            if not stages:
                continue
            gone = Change(member, (), "drain")
            if member not in table.workers:
                self._log(now, gone)
                continue
            coming = all(table.live(s) for s in stages)
            patience = DRAIN_DOWNLOADS * self._census.seconds_per_value * table.values(stages)
            if assign.may_go(table, member):
                self._log(now, gone)
            elif not coming or now >= since + max(DRAIN_S_MIN, patience):
                self._tell(member, "a stage without its last worker", "nobody took it over in time")
                self._log(now, gone)
        return table

    def _improve(self, now: float, table: Table) -> None:
        """One thing at a time that makes the swarm faster or leaner."""
        change = assign.shed(table)
        if change is not None:
            self._log(now, change)
            return
        pace = self.pace(now, table)
        if now < self._last_move + pace.period_s:
            return
        change = assign.rebalance(table, pace)
        if change is not None and self._log(now, change):
            self._last_move = now

    def _log(self, now: float, change: Change) -> bool:
        done = self._propose(now, e.StageAssigned(change.member, change.stages, change.reason))
        if done:
            self._proposed[change.member] = _Proposed(change.stages, now)
        return done

    def _name_slow(self, table: Table) -> None:
        speeds = sorted(w.speed for w in table.workers.values())
        for worker in table.workers.values():
            if worker.speed < SLOW_SHARE * speeds[len(speeds) // 2]:
                self._tell(worker.id, "a slow worker", "a tenth of the usual speed or less")

    def _tell(self, member: bytes, what: str, why: str) -> None:
        """Say it once per member."""
        if self._told.get(member) != what:
            self._told[member] = what
            fields: dict[str, object] = {"what": what, "why": why, "using": member.hex()}
            self._out.append(Emit(fx.Notice("fallback", fields)))
