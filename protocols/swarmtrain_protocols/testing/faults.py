"""The schedule of trouble as plain data: printed on failure, edited by hand, shrunk by machine.

| kind      | a     | b       | for ``duration_s``                                             |
| --------- | ----- | ------- | -------------------------------------------------------------- |
| crash     | site  |         | kill -9; restarts after that time                              |
| power     | site  |         | power cut: nothing unsynced survives, nobody is told; restarts |
| vanish    | site  |         | never comes back, disk and all; others notice only by silence  |
| pause     | site  |         | SIGSTOP; everything fires on resume                            |
| sleep     | site  |         | the same, and its monotonic clock stands still                 |
| cut       | site  | site    | both directions                                                |
| cut1      | site  | site    | only a → b                                                     |
| isolate   | site  |         | all links of a, both ways                                      |
| split     | a,b,c |         | these against all others, both ways                            |
| flap      | site  |         | all its links go down and up, ``FLAP_S`` each                  |
| slow      | site  |         | latency of all its links × ``SLOW_FACTOR``                     |
| slownode  | site  |         | each event takes ``SLOW_EVENT_S`` of its only processor        |
| lossy     | site  |         | its links lose ``LOSSY`` of what is sent (or reset)            |
| duplicate | site  |         | its links deliver ``LOSSY`` of messages twice (datagrams)      |
| reorder   | site  |         | its links hold ``LOSSY`` of messages back (datagrams)          |
| tail      | site  |         | heavy-tailed delays on its links (Pareto, ``TAIL_SHAPE``)      |
| noisy     | site  |         | bits flip on its links: a chunk is corrupt, a message a reset  |
| slowdisk  | site  |         | syncs take up to ``SLOW_SYNC_S``                               |
| diskfull  | site  |         | nothing can be written                                         |
| rot       | site  |         | a bit flips in one of its stored files (no time)               |
| flip      | site  |         | a bit flips in the state that it holds in memory (no time)     |
| wall      | site  | seconds | its wall clock is set by so much (no time)                     |
| drift     | site  | rate    | its monotonic clock runs at that rate                          |
| jump      | site  |         | its monotonic clock jumps ahead by ``duration_s``              |
| aim-KIND  | site  | trigger | any kind of one site, right after the trigger                  |

Instead of the name of a site, ``a`` may be a role: ``@leader``, ``@owner0`` (of part 0 of the open
attempt), ``@steward``, ``@member``: the first site that has it then. ``aims`` says what a
trigger is. Faults aimed at a state find in ten schedules what random times do not find in
thousands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from swarmtrain_protocols.testing.draws import Stream

SLOW_FACTOR = 20.0
LOSSY = 0.3
SLOW_SYNC_S = 2.0
SLOW_EVENT_S = (0.01, 0.1)
FLAP_S = (0.1, 2.0)
REORDER_S = 3.0
NOISY = 0.1
TAIL_SHAPE = 1.1
TAIL_SCALE_S = 0.05
TAIL_MAX_S = 8.0
WALL_STEPS_S = (-3600.0, -1.0, 1.0, 3600.0)
DRIFT_RATES = (0.8, 0.99, 1.01, 1.25)

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
MORE_KINDS = (
    *("power", "sleep", "flap", "slownode", "reorder", "tail", "noisy"),
    *("wall", "drift", "jump"),
)
"""Kinds that any world can have; drawn beside ``Plan.kinds``, from a row of draws of their own."""
STRIKES = ("crash", "power", "isolate", "pause")
"""What an aimed fault of a role may be."""
KINDS = tuple(dict.fromkeys((*PLAIN_KINDS, *MORE_KINDS, "diskfull", "rot", "flip")))
"""All that are drawn."""
BY_HAND = ("misstep",)
"""More, for schedules made by hand; see ``flips``."""


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
    more: tuple[str, ...] = ()
    more_max: int = 4
    aims: tuple[tuple[str, str], ...] = ()
    """(role, trigger) of aimed faults at a state; drawn with ``more``."""
    aims_share: float = 0.3


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
    return sorted(found + _more(seed, plan, bool(gone)))


def _more(seed: int, plan: Plan, gone: bool) -> list[Fault]:
    """Faults of the kinds in ``plan.more`` and of ``plan.aims``.

    Their draws are their own: the older part of a seed's schedule stays what it always was. One
    site at most loses data, so ``rot`` and ``flip`` exclude each other and ``vanish``.
    """
    luck = Stream(seed, "more faults")
    kinds = [kind for kind in plan.more if luck.chance(0.5)]
    found: list[Fault] = []
    for _ in range(luck.integer(plan.more_max + 1)):
        item = _another(luck, plan, kinds)
        spoils = item is not None and item.kind in {"rot", "flip"}
        if item is None or (spoils and gone):
            continue
        gone = gone or spoils
        found.append(item)
    return found


def _another(luck: Stream, plan: Plan, kinds: Sequence[str]) -> Fault | None:
    at_s = round(luck.between(plan.start_s, plan.end_s), 3)
    duration_s = plan.durations_s[luck.integer(len(plan.durations_s))]
    duration_s = round(duration_s * luck.between(0.5, 1.5), 3)
    name = plan.names[luck.integer(len(plan.names))]
    choice, number = luck.uniform(), luck.uniform()
    if plan.aims and choice < plan.aims_share:
        role, trigger = plan.aims[int(number * len(plan.aims))]
        kind = "aim-" + STRIKES[luck.integer(len(STRIKES))]
        return Fault(at_s, kind, role, trigger, duration_s)
    if not kinds:
        return None
    kind, value = kinds[int(number * len(kinds))], ""
    if kind == "wall":
        value = str(WALL_STEPS_S[luck.integer(len(WALL_STEPS_S))])
    elif kind == "drift":
        value = str(DRIFT_RATES[luck.integer(len(DRIFT_RATES))])
    return Fault(at_s, kind, name, value, duration_s)


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
