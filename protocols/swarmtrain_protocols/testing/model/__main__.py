"""Look at every state of small configurations: ``python -m swarmtrain_protocols.testing.model``.

Prints states, transitions and depth of each configuration, then what happens when a guard of the
specification is taken away: the shortest way to the violation. Exit status 1 if a configuration has
a violation, or if a guard can be missing unnoticed. ``--small`` takes seconds; ``--large``, with
more members, faults and elections, hours and gigabytes; ``--traces`` prints the ways.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from swarmtrain_protocols.testing.model.configs import LARGE, MEDIUM, MUTANTS, SMALL
from swarmtrain_protocols.testing.model.explore import STATES_MAX, Found, Model, explore


def line(name: str, found: Found) -> str:
    """One configuration as a line of a table."""
    what = found.violation or ("no violation" if found.complete else "NOT COMPLETE")
    return (
        f"{name:34} {found.states:>10,} states {found.transitions:>11,} transitions "
        f"depth {found.depth:>3}  {what}"
    )


def check(configurations: Sequence[tuple[str, Model]], states_max: int) -> bool:
    """Explore each; True if all were complete and without a violation."""
    fine = True
    for name, model in configurations:
        found = explore(model, states_max)
        sys.stdout.write(line(name, found) + "\n")
        for step in found.trace:
            sys.stdout.write(f"    {step}\n")
        sys.stdout.flush()
        fine = fine and found.complete and not found.violation
    return fine


def check_mutants(states_max: int, *, traces: bool) -> bool:
    """Take away one guard after the other; True if each is missed."""
    missed = 0
    for name, model in MUTANTS:
        found = explore(model, states_max)
        steps = len(found.trace) - 1
        sys.stdout.write(line(f"without {name}", found) + f" in {steps} steps\n")
        for step in found.trace if traces else ():
            sys.stdout.write(f"    {step}\n")
        sys.stdout.flush()
        missed += bool(found.violation)
    sys.stdout.write(f"{missed} of {len(MUTANTS)} guards are missed when they are away\n")
    return missed == len(MUTANTS)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="model", description=__doc__)
    parser.add_argument("--small", action="store_true", help="only what takes seconds")
    parser.add_argument("--large", action="store_true", help="also what takes long")
    parser.add_argument("--traces", action="store_true", help="print how each guard is missed")
    parser.add_argument("--states-max", type=int, default=STATES_MAX)
    given = parser.parse_args(argv)
    configurations = [*SMALL]
    if not given.small:
        configurations += MEDIUM
    if given.large:
        configurations += LARGE
    fine = check(configurations, given.states_max)
    return 0 if check_mutants(given.states_max, traces=given.traces) and fine else 1


if __name__ == "__main__":
    sys.exit(main())
