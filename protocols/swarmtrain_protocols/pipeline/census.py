"""Who works in the pipeline, as its leader sees it: reports, links, speeds, downloads, losses.

Volatile: a new leader begins with the assignments in the ledger and hears the rest within a report
interval. ``Census.table`` is what the planner (``assign``) decides on.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.messages.pipeline import StageReport, WorkerReport
from swarmtrain_protocols.pipeline.assign import Stage, Table, Worker
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.pipeline.hops import ENDS

LIFETIME_S = 3600.0
"""How long a worker is expected to stay before anything is known."""
SECONDS_PER_VALUE = 12 / 25e6
"""Of a download before one was seen: weights and two moments in fp32 at 200 Mb/s."""
DOWNLOAD_ALPHA = 0.3
STEP_ALPHA = 0.3


@dataclass(frozen=True, slots=True)
class AssignPolicy:
    """What stages are assigned by: run keys, and times that are not. ``period_s`` 0: derived."""

    replicas_min: int = 2
    ends_replicas: int = 3
    start_peers: int = 1
    period_s: float = 0.0
    report_s: float = 2.0
    """Workers report when something changes, and this often."""
    grace_s: float = 10.0
    """A worker whose link (or trainer) is away for longer is lost."""


@dataclass(slots=True)
class _Known:
    """What one worker said, and since when it does what it does."""

    report: WorkerReport | None = None
    here: float = -math.inf
    """When it was last seen at work, link and trainer."""
    since: float = -math.inf
    fetching: dict[int, float] = field(default_factory=dict)
    """Stages that it has been given, and when."""


class Census:
    """One leadership's view of all workers."""

    def __init__(self, me: PeerId, ledger: Ledger, policy: AssignPolicy, now: float) -> None:
        self.ledger = ledger
        self.seconds_per_value = SECONDS_PER_VALUE
        self.step_s = 0.0
        self._policy = policy
        self._me = me
        self._started = now
        # Whoever serves a stage has the grace time to be heard again, and may have come just now.
        self._known = {k: _Known(here=now, since=now) for k in ledger.pipeline.assigned}
        self._assigned: dict[bytes, tuple[int, ...]] = dict(ledger.pipeline.assigned)
        self._worker_seconds = 0.0
        self._losses = 0
        self._counted = now
        self._progress = (-1, math.nan)
        self._here: list[bytes] = []

    # -- what is heard ---------------------------------------------------------------------

    def reported(self, now: float, peer: PeerId, message: WorkerReport) -> str:
        """Take in a report; returns a stable code if something is wrong with it."""
        state = self.ledger.pipeline
        if message.generation != self.ledger.generation:
            return "stale_generation"
        if peer not in self.ledger.members:
            return "not_a_member"
        numbers = [item.stage for item in message.stages]
        rates = [item.seconds_per_sample for item in message.stages]
        if numbers != sorted(set(numbers)) or any(n >= len(state.stages) for n in numbers):
            return "bad_stage"
        if not all(0.0 <= rate < math.inf for rate in rates):
            return "bad_rate"
        known = self._known.setdefault(peer, _Known())
        known.report = message
        for item in message.stages:
            if item.ready and item.stage in known.fetching:
                self._downloaded(now - known.fetching.pop(item.stage), item.stage)
        return ""

    def _downloaded(self, seconds: float, stage: int) -> None:
        channel = self.ledger.channels[stage_channel(stage)]
        if channel.round:  # before the first step there is nothing to fetch
            found = seconds / channel.values
            self.seconds_per_value += DOWNLOAD_ALPHA * (found - self.seconds_per_value)

    def reconcile(self, now: float) -> list[bytes]:
        """The ledger moved; returns the members whose assignment changed."""
        assigned = self.ledger.pipeline.assigned
        moved = []
        for member in sorted({*assigned, *self._assigned}):
            stages = assigned.get(member, ())
            new = [s for s in stages if s not in self._assigned.get(member, ())]
            if stages == self._assigned.get(member, ()):
                continue
            moved.append(member)
            known = self._known.setdefault(member, _Known())
            if any(s != ENDS for s in new):
                known.since = now
            known.fetching = {s: t for s, t in known.fetching.items() if s in stages}
            known.fetching.update(dict.fromkeys(new, now))
        self._assigned = dict(assigned)
        for member in [k for k in self._known if k not in self.ledger.members]:
            del self._known[member]
        self._time_steps(now)
        return moved

    def _time_steps(self, now: float) -> None:
        """Seconds per step, from how fast the slowest stage channel moves."""
        count = len(self.ledger.pipeline.stages)
        rounds = [self.ledger.channels[stage_channel(s)].round for s in range(count)]
        done, since = self._progress
        if min(rounds) != done:
            gap = (now - since) / max(1, min(rounds) - done)
            if not math.isnan(since):
                self.step_s = (
                    gap if not self.step_s else self.step_s + STEP_ALPHA * (gap - self.step_s)
                )
            self._progress = min(rounds), now

    def look(self, now: float, linked: list[PeerId]) -> None:
        """See who is at work at this moment."""
        present = {*linked, self._me}
        self._worker_seconds += (now - self._counted) * len(self._here)
        self._counted = now
        for member in sorted(self.ledger.members):
            known = self._known.setdefault(member, _Known())
            said = known.report
            new = now < self._started + 2 * self._policy.report_s
            at_work = said.values_max > 0 if said is not None else new and member in self._assigned
            if member in present and at_work:
                known.here = now
        here = [k for k in sorted(self._known) if self._is_here(k, now)]
        self._losses += sum(k not in here for k in self._here)
        self._here = here

    def at_work(self, member: bytes) -> bool:
        """It had a link and a trainer when somebody last looked, and has said so itself."""
        known = self._known.get(member)
        return known is not None and known.report is not None and known.here == self._counted

    def _is_here(self, member: bytes, now: float) -> bool:
        known = self._known[member]
        return member in self.ledger.members and now <= known.here + self._policy.grace_s

    # -- what follows ----------------------------------------------------------------------

    def table(
        self, now: float, proposed: dict[bytes, tuple[int, ...]], leaving: dict[bytes, None]
    ) -> Table:
        """All workers that are here, with what they serve once ``proposed`` is in the ledger."""
        costs = self._costs()
        stages = [
            Stage(
                number,
                self.ledger.channels[stage_channel(number)].values,
                costs[number],
                self._policy.ends_replicas if number == ENDS else self._policy.replicas_min,
            )
            for number in range(len(costs))
        ]
        speeds = {k: self._speed(self._known[k].report, costs) for k in self._here}
        measured = [speed for speed in speeds.values() if speed > 0.0]
        usual = statistics.median(measured) if measured else 1.0
        workers = [
            self._worker(k, now, proposed, speeds[k] or usual, k in leaving) for k in self._here
        ]
        return Table(stages, workers)

    def _worker(
        self,
        member: bytes,
        now: float,
        proposed: dict[bytes, tuple[int, ...]],
        speed: float,
        leaving: bool,
    ) -> Worker:
        known = self._known[member]
        logged = self._assigned.get(member, ())
        stages = proposed.get(member, logged)
        said: tuple[StageReport, ...] = known.report.stages if known.report is not None else ()
        if now > known.here:
            ready: tuple[int, ...] = ()  # nobody waits for it, but it may be back at any moment
        elif known.report is None:
            ready = logged
        else:
            ready = tuple(item.stage for item in said if item.ready and item.stage in logged)
        return Worker(
            id=member,
            stages=stages,
            speed=speed,
            room=known.report.values_max if known.report is not None else 0,
            since=known.since if stages == logged else now,
            ready=tuple(s for s in ready if s in stages),
            leaving=leaving,
            kept=tuple(i.stage for i in said if i.version > 0 and i.stage not in logged),
        )

    def _costs(self) -> list[float]:
        """Units of work of each stage: an average block stage has one, the ends are measured."""
        count = len(self.ledger.pipeline.stages)
        values = [self.ledger.channels[stage_channel(s)].values for s in range(count)]
        usual = statistics.mean(values[1:])
        costs = [v / usual for v in values]
        ratios = []
        for known in self._known.values():
            rates = {i.stage: i.seconds_per_sample for i in _measured(known.report)}
            ends = rates.pop(ENDS, 0.0)
            if ends and rates:
                ratios.append(ends * sum(costs[s] for s in rates) / sum(rates.values()))
        if ratios:
            costs[ENDS] = statistics.median(ratios)
        return costs

    def _speed(self, report: WorkerReport | None, costs: list[float]) -> float:
        items = _measured(report)
        seconds = sum(item.seconds_per_sample for item in items)
        return sum(costs[item.stage] for item in items) / seconds if seconds else 0.0

    def lifetime_s(self) -> float:
        """Expected seconds until a worker is lost: what was seen, and one prior loss per hour."""
        return (self._worker_seconds + LIFETIME_S) / (self._losses + 1)

    def started(self) -> bool:
        """Somebody has served a stage in this run."""
        return bool(self.ledger.pipeline.assigned) or any(
            c.round for c in self.ledger.train_channels()
        )


def _measured(report: WorkerReport | None) -> list[StageReport]:
    return [] if report is None else [i for i in report.stages if i.seconds_per_sample > 0.0]
