"""The score of the simulator: ``python -m tests.mutants [--area rounds] [--shard 0/2]``.

Plants every bug of the catalogue in turn, runs the schedules that must find it, and prints for
each the first that did. Last come the survivors by name, and killed of total. Exit status 1 if
fewer than ``--bar`` were found.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

from tests.mutants.catalogue import AREAS, Mutant, catalogue
from tests.mutants.patching import planted
from tests.mutants.suites import SUITES

BAR = 0.95


SLIPS = ("NameError", "UnboundLocalError", "ImportError")
"""Of planted code that does not even run: no bug that anybody could make, and no kill."""


def hunt(item: Mutant, most: int = 1 << 30) -> tuple[str, int, str] | None:
    """(suite, seed, what was wrong) of the first schedule that finds it; None: it survives.

    ``most``: seeds to try of each suite.
    """
    with planted(*item.patches):
        for finder in item.finders:
            for seed in finder.seeds[:most]:
                wrong = SUITES[finder.suite](seed)
                if any(slip in wrong for slip in SLIPS):
                    raise RuntimeError(f"{item.name}: the planted code itself fails: {wrong}")
                if wrong:
                    return finder.suite, seed, wrong.splitlines()[0]
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__)
    parser.add_argument("--area", choices=AREAS, action="append")
    parser.add_argument("--name", help="only those whose name contains this")
    parser.add_argument("--shard", default="0/1", help="I/N: every N-th, from the I-th")
    parser.add_argument("--seeds", type=int, default=1 << 30, help="at most, of each suite")
    parser.add_argument("--bar", type=float, default=BAR, help="share that must be found")
    parser.add_argument("--json", action="store_true", help="the score as JSON; the rest to stderr")
    given = parser.parse_args(argv)
    out = sys.stderr if given.json else sys.stdout

    def say(text: str) -> None:
        out.write(text + "\n")
        out.flush()

    index, count = (int(part) for part in given.shard.split("/"))
    chosen = [
        item
        for item in catalogue()
        if (not given.area or item.area in given.area) and (given.name or "") in item.name
    ][index::count]
    survivors: list[Mutant] = []
    units = 0
    for item in chosen:
        began = time.process_time()
        found = hunt(item, given.seeds)
        took_s = time.process_time() - began
        if found is None:
            survivors.append(item)
            say(f"SURVIVES  {item.area}: {item.name} ({took_s:.1f} s)")
        else:
            suite, seed, wrong = found
            units += suite.startswith("units")
            say(f"found     {item.area}: {item.name}: {suite} {seed}: {wrong} ({took_s:.1f} s)")
    for item in survivors:
        say(f"survivor: {item.area}: {item.name} [{item.source}]")
    killed = len(chosen) - len(survivors)
    if given.json:
        names = [f"{item.area}: {item.name} [{item.source}]" for item in survivors]
        figures = {"total": len(chosen), "units": units, "survivors": names}
        sys.stdout.write(json.dumps(figures) + "\n")
        return 0
    from_specs = sum(item.from_spec for item in chosen)
    say(
        f"mutants: killed={killed}/{len(chosen)} by unit tests alone={units} "
        f"written from the specs={from_specs}"
    )
    return 0 if killed >= given.bar * len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
