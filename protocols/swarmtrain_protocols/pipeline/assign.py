"""Who serves which stage: pure functions over a table of workers and stages. Spec 11.

Joiners go to the most endangered, then to the slowest stage. Workers move only if the throughput
gains by it, and pay for their download. Beside its block stage a worker may serve the ends, and
more block stages where there are too few workers for ``replicas_min`` of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from swarmtrain_protocols import limits
from swarmtrain_protocols.pipeline.capacity import throughput
from swarmtrain_protocols.pipeline.hops import ENDS

GAIN_MIN = 0.10
"""A move must raise the throughput by this much."""
LOSS_MAX = 0.05
"""A worker stops to serve a stage in addition if that costs no more than this."""
PERIODS_IN_PLACE = 2
"""Periods that a worker stays where it came to, so that nobody moves back and forth."""
OVERLOADED_GAIN = 1.5
"""A stage is overloaded if without it the others could do so many times as much."""
MOVES_PLANNED_MAX = 8
"""Moves that are looked ahead: stages that are equally slow gain only when each has gained."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: ``values`` parameters, ``cost`` units of work per micro-batch."""

    number: int
    values: int
    cost: float
    replicas_min: int


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker: what it serves, ``speed`` in units of work per second, ``room`` in parameters.

    ``since``: when it last came to a stage. ``ready``: the stages it is in step with. ``leaving``:
    it serves on until others do. ``kept``: stages whose earlier state it has on disk.
    """

    id: bytes
    stages: tuple[int, ...]
    speed: float
    room: int
    since: float = -math.inf
    ready: tuple[int, ...] = ()
    leaving: bool = False
    kept: tuple[int, ...] = ()

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(stage for stage in self.stages if stage != ENDS)


@dataclass(frozen=True, slots=True)
class Change:
    """``member`` is to serve ``stages`` from now on. ``moves``: it leaves a stage for another."""

    member: bytes
    stages: tuple[int, ...]
    reason: str
    moves: bool = False


@dataclass(frozen=True, slots=True)
class Pace:
    """What a move is weighed with. All in seconds, but ``seconds_per_value`` of a download."""

    now: float
    period_s: float
    horizon_s: float
    seconds_per_value: float


class Table:
    """Workers and stages at one moment. Workers that are leaving are there, but do not count."""

    def __init__(self, stages: Iterable[Stage], workers: Iterable[Worker]) -> None:
        self.stages = {stage.number: stage for stage in sorted(stages, key=lambda s: s.number)}
        self.workers = {worker.id: worker for worker in sorted(workers, key=lambda w: w.id)}
        self._live = dict.fromkeys(self.stages, 0)
        self._rate = dict.fromkeys(self.stages, 0.0)
        self._ready = dict.fromkeys(self.stages, 0)
        for worker in self.staying():
            for number in worker.stages:
                self._live[number] += 1
                self._rate[number] += worker.speed / self.work(worker.stages)
                self._ready[number] += number in worker.ready

    def staying(self) -> list[Worker]:
        return [worker for worker in self.workers.values() if not worker.leaving]

    def live(self, stage: int) -> int:
        """Workers that serve ``stage`` and stay; those that are still fetching it count."""
        return self._live[stage]

    def rate(self, stage: int) -> float:
        """Micro-batches per second if every worker serves all its stages equally often."""
        return self._rate[stage]

    def work(self, stages: Iterable[int]) -> float:
        """Units of work of one micro-batch at these stages."""
        return sum(self.stages[number].cost for number in stages)

    def values(self, stages: Iterable[int]) -> int:
        return sum(self.stages[number].values for number in stages)

    def fits(self, worker: Worker, stages: tuple[int, ...]) -> bool:
        """Room for the parameters, and for the number, of these stages."""
        few = len(stages) <= limits.CHANNELS_SERVED_MAX
        return few and self.values(stages) <= worker.room

    def ready_besides(self, stage: int, member: bytes) -> int:
        """Workers other than ``member`` that are in step with ``stage`` and stay."""
        own = self.workers[member]
        counted = not own.leaving and stage in own.stages and stage in own.ready
        return self._ready[stage] - counted

    def endangered(self) -> list[int]:
        """Stages below their minimum, the most endangered first."""
        short = [n for n, stage in self.stages.items() if self.live(n) < stage.replicas_min]
        return sorted(short, key=self.danger)

    def danger(self, stage: int) -> tuple[int, float, int]:
        return self.live(stage), self.rate(stage), stage

    def capacity(self) -> tuple[float, tuple[int, ...]]:
        """Micro-batches per second through all stages, and the stages that hold it down."""
        speeds: dict[tuple[int, ...], float] = {}
        for worker in self.staying():
            if worker.stages:
                speeds[worker.stages] = speeds.get(worker.stages, 0.0) + worker.speed
        return throughput(speeds, {n: stage.cost for n, stage in self.stages.items()})

    def served_now(self) -> Table:
        """Only what workers are in step with."""
        workers = [
            replace(w, stages=tuple(s for s in w.stages if s in w.ready), leaving=False)
            for w in self.workers.values()
        ]
        return Table(self.stages.values(), workers)

    def changed(self, member: bytes, stages: Iterable[int], now: float = math.nan) -> Table:
        """This table after ``member`` was given ``stages``; ``now``: it came to a stage."""
        worker = self.workers[member]
        kept = tuple(sorted(stages))
        ready = tuple(s for s in worker.ready if s in kept)
        since = worker.since if math.isnan(now) else now
        workers = {**self.workers, member: replace(worker, stages=kept, ready=ready, since=since)}
        return Table(self.stages.values(), workers.values())


def overloaded(table: Table) -> int:
    """The block stage without which the swarm would be much faster; 0: none stands out."""
    served = table.served_now()
    rate, tight = served.capacity()
    best, stage = OVERLOADED_GAIN * rate, ENDS
    for number in (n for n in tight if n != ENDS):
        others = [s for s in served.stages.values() if s.number != number]
        workers = [
            replace(w, stages=tuple(s for s in w.stages if s != number))
            for w in served.workers.values()
        ]
        without, _ = Table(others, workers).capacity()
        if rate > 0.0 and without > best:
            best, stage = without, number
    return stage


# --- joining --------------------------------------------------------------------------------------


def place(table: Table, member: bytes) -> Change | None:
    """Where a worker without a stage goes; None: it has no room for any.

    One block stage: the one with the fewest workers, then the slowest, of those that lack workers;
    else the slowest. Among equals one whose earlier state it has on disk. And the ends beside it
    while they lack workers; the ends alone only if nobody can serve them beside a block stage.
    """
    worker = table.workers[member]
    blocks = [n for n in table.stages if n != ENDS and table.fits(worker, (n,))]
    wants_ends = _lacks_ends(table) and table.fits(worker, (ENDS,))
    if not blocks:
        return Change(member, (ENDS,), "join") if wants_ends else None

    def order(number: int) -> tuple[int, bool, float, int]:
        short = table.live(number) < table.stages[number].replicas_min
        danger = table.live(number) if short else table.stages[number].replicas_min
        return danger, short and number not in worker.kept, table.rate(number), number

    block = min(blocks, key=order)
    if wants_ends and table.fits(worker, (ENDS, block)):
        return Change(member, (ENDS, block), "join")
    alone = wants_ends and table.live(ENDS) == 0 and order(block)[0] > 0
    if alone and not any(_beside(table, other) for other in table.staying()):
        return Change(member, (ENDS,), "join")
    return Change(member, (block,), "join")


def _lacks_ends(table: Table) -> bool:
    return ENDS in table.stages and table.live(ENDS) < table.stages[ENDS].replicas_min


def _beside(table: Table, worker: Worker) -> bool:
    """The worker could serve the ends beside its block stages."""
    blocks = worker.blocks
    return bool(blocks) and ENDS not in worker.stages and table.fits(worker, (ENDS, *blocks))


# --- stages that lack workers ---------------------------------------------------------------------


def cover(table: Table) -> Change | None:
    """Somebody for a stage that nobody serves: beside its own stage, or instead of it."""
    for number in table.endangered():
        if table.live(number) > 0:
            return None
        change = _add(table, number, "cover")
        if change is None:
            change = _take(table, number)
        if change is not None:
            return change
    return None


def protect(table: Table) -> Change | None:
    """Another replica for a stage below its minimum, by a worker that has room for one more."""
    for number in table.endangered():
        if table.live(number) > 0:
            change = _add(table, number, "protect")
            if change is not None:
                return change
    return None


def _add(table: Table, number: int, reason: str) -> Change | None:
    """Somebody to serve ``number`` beside its own stages.

    First from stages that have more workers than they need, then whoever can help fewest other
    stages (not if nobody serves this one: speed matters more), then whose stages are left richest.
    """
    short = table.endangered() if table.live(number) else []
    able = [
        w
        for w in table.staying()
        if w.stages and number not in w.stages and table.fits(w, (number, *w.stages))
    ]
    if not able:
        return None

    def order(worker: Worker) -> tuple[bool, int, float, float, bytes]:
        needed = any(table.live(s) <= table.stages[s].replicas_min for s in worker.stages)
        others = (s for s in short if s not in worker.stages)
        choices = sum(table.fits(worker, (s, *worker.stages)) for s in others)
        share = worker.speed / table.work((number, *worker.stages))
        given = worker.speed / table.work(worker.stages) - share
        left = min(table.rate(s) - given for s in worker.stages)
        return needed, choices if needed else 0, -left, -share, worker.id

    best = min(able, key=order)
    return Change(best.id, tuple(sorted((number, *best.stages))), reason)


def _take(table: Table, number: int) -> Change | None:
    """A worker of the stage that has most, if another one is in step there."""
    best: tuple[tuple[int, float, float, bytes], Change] | None = None
    for worker in table.staying():
        for own in worker.blocks or worker.stages:
            stages = tuple(sorted({number} | {s for s in worker.stages if s != own}))
            if number in worker.stages or not table.fits(worker, stages):
                continue
            if table.live(own) > 1 and table.ready_besides(own, worker.id) > 0:
                key = (-table.live(own), -table.rate(own), worker.speed, worker.id)
                if best is None or key < best[0]:
                    best = key, Change(worker.id, stages, "cover", moves=True)
    return None if best is None else best[1]


# --- moving ---------------------------------------------------------------------------------------


def rebalance(table: Table, pace: Pace) -> Change | None:
    """The next move, if there is one that is worth it.

    A stage below its minimum gets a worker from one above. Otherwise moves are planned ahead from
    rich stages to those that hold the throughput down, until it has risen by ``GAIN_MIN``: the
    gain over the horizon must exceed what is lost while the workers download.
    """
    for number in table.endangered():
        step = _best_move(table, number, pace)
        if step is not None:
            return replace(step, reason="endangered")
    before, tight = table.capacity()
    trial, first, cost = table, None, 0.0
    for count in range(1, MOVES_PLANNED_MAX + 1):
        step = _towards(trial, tight, pace)
        if step is None:
            return None
        cost += _price(table, trial, step, pace)
        first = first or step
        trial = trial.changed(step.member, step.stages, pace.now)
        after, tight = trial.capacity()
        if after >= (1.0 + GAIN_MIN) * before * (1.0 - 1e-9):
            seconds = pace.horizon_s - (count - 1) * pace.period_s
            return first if (after - before) * seconds > cost else None
    return None


def _towards(table: Table, tight: tuple[int, ...], pace: Pace) -> Change | None:
    """The best step for the slowest of the stages that hold the throughput down."""
    for number in sorted(tight, key=table.rate):
        step = _more_ends(table) if number == ENDS else _best_move(table, number, pace)
        if step is not None:
            return step
    return None


def _best_move(table: Table, target: int, pace: Pace) -> Change | None:
    """The move to ``target`` that leaves the poorer of the two stages best off."""
    best: tuple[tuple[float, float, bool, float, bytes], Change] | None = None
    for worker in table.staying():
        for own in worker.blocks:
            if target in worker.stages or not _may_leave(table, worker, own, pace):
                continue
            stages = tuple(sorted(target if s == own else s for s in worker.stages))
            if target == ENDS or not table.fits(worker, stages):
                continue
            left = table.rate(own) - worker.speed / table.work(worker.stages)
            there = table.rate(target) + worker.speed / table.work(stages)
            poorer = min(left, there)
            short = table.live(target) < table.stages[target].replicas_min
            if poorer <= table.rate(target) and not short:
                continue
            key = (-poorer, -table.rate(own), own in worker.ready, worker.speed, worker.id)
            if best is None or key < best[0]:
                best = key, Change(worker.id, stages, "move", moves=True)
    return None if best is None else best[1]


def _may_leave(table: Table, worker: Worker, stage: int, pace: Pace) -> bool:
    enough = table.ready_besides(stage, worker.id) >= table.stages[stage].replicas_min
    return enough and pace.now - worker.since >= PERIODS_IN_PLACE * pace.period_s


def _more_ends(table: Table) -> Change | None:
    """The ends are too slow: the worker with whom the throughput is best serves them, too."""
    best: tuple[tuple[float, bytes], Change] | None = None
    fastest: dict[tuple[int, ...], Worker] = {}
    for worker in table.staying():
        known = fastest.get(worker.stages)
        if _beside(table, worker) and (known is None or worker.speed > known.speed):
            fastest[worker.stages] = worker
    for worker in fastest.values():
        stages = (ENDS, *worker.stages)
        after, _ = table.changed(worker.id, stages).capacity()
        key = (-after, worker.id)
        if best is None or key < best[0]:
            best = key, Change(worker.id, stages, "ends")
    return None if best is None else best[1]


def _price(table: Table, trial: Table, step: Change, pace: Pace) -> float:
    """Micro-batches that are lost while the worker of ``step`` fetches its new stage.

    ``table`` is what there is now, ``trial`` what is planned before the step.
    """
    new = [s for s in step.stages if s not in trial.workers[step.member].stages]
    now = table.served_now()
    kept = [s for s in step.stages if s in now.workers[step.member].stages]
    lost = now.capacity()[0] - now.changed(step.member, kept).capacity()[0]
    return lost * table.values(new) * pace.seconds_per_value


# --- serving less ---------------------------------------------------------------------------------


def shed(table: Table) -> Change | None:
    """A worker with several stages gives one up that has enough others, if little is lost by it."""
    before, _ = table.capacity()
    best: tuple[tuple[float, bytes], Change] | None = None
    for worker in table.staying():
        if any(s not in worker.ready for s in worker.stages):
            continue
        spare = worker.blocks if len(worker.blocks) > 1 else ()
        ends = (ENDS,) if ENDS in worker.stages and worker.blocks else ()
        for number in (*ends, *spare):
            least = max(1, table.stages[number].replicas_min)
            if table.ready_besides(number, worker.id) < least:
                continue
            stages = tuple(s for s in worker.stages if s != number)
            after, _ = table.changed(worker.id, stages).capacity()
            key = (-after, worker.id)
            if after >= (1.0 - LOSS_MAX) * before and (best is None or key < best[0]):
                best = key, Change(worker.id, stages, "shed")
    return None if best is None else best[1]


def may_go(table: Table, member: bytes) -> bool:
    """A leaving worker is not needed any more: others are in step with all it serves."""
    worker = table.workers[member]
    return all(table.ready_besides(stage, member) > 0 for stage in worker.stages)
