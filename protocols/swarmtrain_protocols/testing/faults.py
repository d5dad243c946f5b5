"""The schedule of trouble as plain data: printed on failure, edited by hand, shrunk by machine.

| kind      | a     | b       | for ``duration_s``                                             |
| --------- | ----- | ------- | -------------------------------------------------------------- |
| crash     | site  |         | kill -9; restarts after that time                              |
| vanish    | site  |         | never comes back, disk and all; others notice only by silence  |
| pause     | site  |         | SIGSTOP; everything fires on resume                            |
| cut       | site  | site    | both directions                                                |
| cut1      | site  | site    | only a → b                                                     |
| isolate   | site  |         | all links of a, both ways                                      |
| split     | a,b,c |         | these against all others, both ways                            |
| slow      | site  |         | latency of all its links × ``SLOW_FACTOR``                     |
| lossy     | site  |         | its links lose ``LOSSY`` of what is sent (or reset)            |
| duplicate | site  |         | its links deliver ``LOSSY`` of messages twice (datagrams)      |
| slowdisk  | site  |         | syncs take up to ``SLOW_SYNC_S``                               |
| aim-crash | site  | trigger | crash right after the next effect of that kind                 |
| aim-cut   | site  | trigger | isolate right after the next effect of that kind               |
| aim-pause | site  | trigger | pause right after the next effect of that kind                 |

Triggers are ``persist``, ``synced``, ``fetch``, ``send:TAG``, ``emit:CLASS`` and ``do:CLASS``:
faults aimed at a state find in ten schedules what random times do not find in thousands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from swarmtrain_protocols.testing.draws import Stream

SLOW_FACTOR = 20.0
LOSSY = 0.3
SLOW_SYNC_S = 2.0

PLAIN_KINDS = (
    "crash",
    "crash",
    "crash",
    "pause",
    "cut",
    "cut1",
    "isolate",
    "split",
    "slow",
    "lossy",
    "duplicate",
    "slowdisk",
    "vanish",
)
AIMED_KINDS = ("aim-crash", "aim-crash", "aim-cut", "aim-pause")


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """One line of a schedule; times in simulated seconds."""

    at_s: float
    kind: str
    a: str
    b: str = ""
    duration_s: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What a generated schedule may contain.

    ``vanish_max`` bounds how many sites may be gone for good, ``vanishable`` which (empty: all).
    """

    names: tuple[str, ...]
    start_s: float = 0.0
    end_s: float = 20.0
    count: tuple[int, int] = (2, 12)
    kinds: tuple[str, ...] = PLAIN_KINDS
    triggers: tuple[str, ...] = ("persist", "synced")
    aimed_share: float = 0.4
    vanish_max: int = 0
    vanishable: tuple[str, ...] = ()
    durations_s: tuple[float, ...] = field(default=(0.3, 1.0, 3.0, 8.0))


def generate(seed: int, plan: Plan) -> list[Fault]:
    """The schedule of ``seed``, sorted by time. Each seed uses only a subset of kinds."""
    luck = Stream(seed, "faults")
    kinds = [kind for kind in plan.kinds if luck.chance(0.7)] or ["crash"]
    low, high = plan.count
    found: list[Fault] = []
    gone: list[str] = []
    for _ in range(low + luck.integer(high - low + 1)):
        item = _one(luck, plan, kinds)
        if item.kind == "vanish":
            allowed = plan.vanishable or plan.names
            if len(gone) >= plan.vanish_max or item.a not in allowed or item.a in gone:
                item = replace(item, kind="crash")
            else:
                gone.append(item.a)
        found.append(item)
    return sorted(found)


def _one(luck: Stream, plan: Plan, kinds: Sequence[str]) -> Fault:
    at_s = round(luck.between(plan.start_s, plan.end_s), 3)
    first = luck.integer(len(plan.names))
    second = (first + 1 + luck.integer(max(1, len(plan.names) - 1))) % len(plan.names)
    a, b = plan.names[first], plan.names[second]
    duration_s = plan.durations_s[luck.integer(len(plan.durations_s))]
    duration_s = round(duration_s * luck.between(0.5, 1.5), 3)
    if plan.triggers and luck.chance(plan.aimed_share):
        kind = AIMED_KINDS[luck.integer(len(AIMED_KINDS))]
        return Fault(at_s, kind, a, plan.triggers[luck.integer(len(plan.triggers))], duration_s)
    kind = kinds[luck.integer(len(kinds))]
    if kind == "split":
        group = [name for name in plan.names if luck.chance(0.5)]
        return Fault(at_s, kind, ",".join(group or [a]), "", duration_s)
    return Fault(at_s, kind, a, b if kind in {"cut", "cut1"} else "", duration_s)


def to_text(schedule: Sequence[Fault]) -> str:
    """Python source of a schedule, to paste into a regression test."""
    lines = [
        f"    Fault({f.at_s}, {f.kind!r}, {f.a!r}, {f.b!r}, {f.duration_s}),\n" for f in schedule
    ]
    return "[\n" + "".join(lines) + "]"


def shrink(
    run: Callable[[list[Fault]], str | None],
    schedule: Sequence[Fault],
    runs_max: int = 300,
) -> tuple[list[Fault], int]:
    """Delta debugging (Zeller 2002): a smallest schedule that fails in the same class.

    Args:
        run: runs a schedule; the class of its violation, or None if there is none.
        schedule: a schedule for which ``run`` is not None.
        runs_max: bound on the number of runs.

    Returns:
        The shrunk schedule, in which no single fault can be left out (unless the bound was hit),
        with durations halved as long as it still fails, and the number of runs.
    """
    wanted = run(list(schedule))
    assert wanted is not None, "nothing to shrink: the schedule does not fail"
    runs = 1

    def fails(candidate: list[Fault]) -> bool:
        nonlocal runs
        runs += 1
        return runs <= runs_max and run(candidate) == wanted

    faults = list(schedule)
    pieces = 2
    while faults:
        step = max(1, len(faults) // pieces)
        for start in range(0, len(faults), step):
            candidate = faults[:start] + faults[start + step :]
            if fails(candidate):
                faults, pieces = candidate, max(2, pieces - 1)
                break
        else:
            if step == 1:
                break
            pieces *= 2
    for index, item in enumerate(faults):
        while item.duration_s > 0.1:
            shorter = replace(item, duration_s=round(item.duration_s / 2, 3))
            if not fails([*faults[:index], shorter, *faults[index + 1 :]]):
                break
            faults[index] = item = shorter
    return faults, runs
