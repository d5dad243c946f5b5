"""One fault at every moment of a clean run: ``python -m swarmtrain_protocols.testing.sweep``.

A moment is an effect that a site carries out: a message sent, a record made durable, a part summed.
The clean run is counted first; then there is one run for each moment in which a site crashes (loses
power, stops, is cut off) right after it. ``--victim @actor`` is the site whose effect it is.

With ``--pairs`` there are two faults: the first right after one of the effects that ``--pairs``
names, the second after a later one of them, at most ``--within`` seconds from it in the run that
has only the first. By default these are the steps of an election, begun by the loss of the leader
(``--base FILE`` for another beginning). What fails is shrunk and printed as a schedule file.
"""

from __future__ import annotations

import argparse
import fileinput
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from swarmtrain_protocols.testing.checks.base import Checker
from swarmtrain_protocols.testing.faults import Fault
from swarmtrain_protocols.testing.nightly import KINDS, Run, explain
from swarmtrain_protocols.testing.schedules import from_json

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host
    from swarmtrain_protocols.testing.world import World

NEVER = 1 << 40
VOTES = ("persist:vote", "send:vote?", "receive:vote?", "send:vote", "receive:vote")
LEADER_LOST = (Fault(4.0, "crash", "@leader", "", 1.5),)
FAULTS = ("crash", "power", "pause", "isolate")
FROM_S = 1.0
"""Before that nobody is in the log but the founder."""


class Counted(Checker):
    """How often each label was seen, and when: aims at it that are never met count for us."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.aims = [Fault(0.0, "aim-crash", "@actor", f"*/{x}#{NEVER}") for x in labels]
        self.times_s: dict[str, list[float]] = {label: [] for label in labels}
        self.healed_s = 0.0

    def always(self, world: World, host: Host) -> None:
        for aim in world.trouble.aims:
            if aim.label in self.times_s and aim.left > NEVER // 2:
                known = self.times_s[aim.label]
                known += [world.now] * (NEVER - aim.left - len(known))


@dataclass
class Swept:
    """What came of a sweep."""

    runs: int = 0
    moments: int = 0
    violations: list[str] = field(default_factory=list)


def moments(run: Run, seed: int, base: Sequence[Fault], labels: Sequence[str]) -> list[Moment]:
    """Every time that one of ``labels`` occurs in a run with the faults of ``base``, in order."""
    counted = Counted(labels)
    run(seed, [*base, *counted.aims], counted)
    found = [
        (at_s, label, number)
        for label, times_s in counted.times_s.items()
        for number, at_s in enumerate(times_s, 1)
    ]
    return sorted(found)


Moment = tuple[float, str, int]
"""(when, label, how many of that label until then, itself included)."""


def at_moment(kind: str, victim: str, moment: Moment, duration_s: float) -> Fault:
    """A fault of that kind right after a moment."""
    _, label, number = moment
    return Fault(0.0, "aim-" + kind, victim, f"*/{label}#{number}", duration_s)


def singles(
    run: Run, seed: int, kinds: Sequence[str], victim: str, duration_s: float
) -> Iterator[list[Fault]]:
    """One schedule for each kind and each moment of the clean run."""
    found = [m for m in moments(run, seed, (), ("effect",)) if m[0] >= FROM_S]
    for moment in found:
        for kind in kinds:
            yield [at_moment(kind, victim, moment, duration_s)]


def pairs(
    run: Run,
    seed: int,
    base: Sequence[Fault],
    labels: Sequence[str],
    kinds: Sequence[str],
    duration_s: float,
    within_s: float,
) -> Iterator[list[Fault]]:
    """Two faults around the moments of ``labels`` after the faults of ``base`` have begun."""
    since_s = min((fault.at_s for fault in base), default=FROM_S)
    for first in moments(run, seed, base, labels):
        if first[0] < since_s:
            continue
        for kind in kinds:
            begun = [*base, at_moment(kind, "@actor", first, duration_s)]
            for second in moments(run, seed, begun, labels):
                if not first[0] < second[0] <= first[0] + within_s:
                    continue
                for other in kinds:
                    yield [*begun, at_moment(other, "@actor", second, duration_s)]


def sweep(
    run: Run,
    seed: int,
    schedules: Iterator[list[Fault]],
    *,
    stride: int = 1,
    offset: int = 0,
    tell: Callable[[str], None] = lambda text: None,
) -> Swept:
    """Run every ``stride``-th of these schedules."""
    swept = Swept()
    for number, faults in enumerate(schedules):
        swept.moments += 1
        if number % stride != offset:
            continue
        outcome = run(seed, faults)
        swept.runs += 1
        if outcome.violation:
            swept.violations.append(outcome.violation)
            tell(explain(outcome, shrunk=True, run=run))
    return swept


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="sweep", description=__doc__)
    parser.add_argument("--kind", choices=sorted(KINDS), default="small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", default=",".join(FAULTS), help="kinds, with commas")
    parser.add_argument("--victim", default="@actor", help="a site, @actor or @leader")
    parser.add_argument("--duration", type=float, default=1.5, help="seconds of each fault")
    parser.add_argument("--stride", type=int, default=1, help="only every N-th schedule")
    parser.add_argument("--offset", type=int, default=0, help="of these, beginning with this one")
    parser.add_argument("--pairs", nargs="?", const=",".join(VOTES), help="two faults; labels")
    parser.add_argument("--within", type=float, default=0.5, help="seconds between the two")
    parser.add_argument("--base", metavar="FILE", help="a schedule that both faults come on top of")
    given = parser.parse_args(argv)
    run, seed, kinds = KINDS[given.kind][0], given.seed, given.faults.split(",")
    base: Sequence[Fault] = LEADER_LOST
    if given.base:
        with fileinput.input(given.base) as lines:
            base = from_json("".join(lines)).listed() or ()
    if given.pairs:
        labels = given.pairs.split(",")
        planned = pairs(run, seed, base, labels, kinds, given.duration, given.within)
    else:
        planned = singles(run, seed, kinds, given.victim, given.duration)

    def tell(text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    swept = sweep(run, seed, planned, stride=given.stride, offset=given.offset, tell=tell)
    tell(
        f"{given.kind} {seed}: {swept.moments} schedules with a fault at a moment, "
        f"{swept.runs} run, {len(swept.violations)} violations"
    )
    return 1 if swept.violations or not swept.runs else 0


if __name__ == "__main__":
    sys.exit(main())
