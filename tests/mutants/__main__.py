"""The score of the simulator: ``python -m tests.mutants [--area rounds] [--shard 0/2]``.

Plants every bug of the catalogue in turn, runs the schedules that must find it, the pinned one
(``pins``) first, and prints for each the first that did. Last come the pins that have moved, the
survivors by name, and killed of total. Exit status 1 if fewer than ``--bar`` were found.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.mutants import pins
from tests.mutants.catalogue import AREAS, Mutant, catalogue
from tests.mutants.patching import planted
from tests.mutants.suites import SUITES, YARDSTICKS

BAR = 0.95


SLIPS = ("NameError", "UnboundLocalError", "ImportError")
"""Of planted code that does not even run: no bug that anybody could make, and no kill."""


def hunt(
    item: Mutant, most: int = 1 << 30, pin: pins.Schedule | None = None
) -> tuple[str, int, str] | None:
    """(suite, seed, what was wrong) of the first schedule that finds it; None: it survives.

    ``most``: seeds to try of each suite. ``pin``: a schedule to try before all others. A schedule
    that complains without the bug as well has found nothing.
    """
    for suite, seed in pins.order(item, most, pin):
        YARDSTICKS.get(suite, str)()
        with planted(*item.patches):
            wrong = SUITES[suite](seed)
        if any(slip in wrong for slip in SLIPS):
            raise RuntimeError(f"{item.name}: the planted code itself fails: {wrong}")
        if wrong and not unplanted(suite, seed):
            return suite, seed, wrong.splitlines()[0]
    return None


@functools.cache
def unplanted(suite: str, seed: int) -> str:
    """What a schedule says of the code as it is: nothing, or a real bug is there."""
    return SUITES[suite](seed)


@dataclass
class Score:
    """What came of a hunt, told as it goes on."""

    say: Callable[[str], None]
    chosen: Sequence[Mutant]
    survivors: list[Mutant] = field(default_factory=list)
    finds: dict[str, pins.Schedule] = field(default_factory=dict)
    moved: list[str] = field(default_factory=list)

    def run(self, pinned: Mapping[str, pins.Schedule], most: int) -> None:
        """Hunt all that were chosen; ``most``: seeds to try of each suite."""
        for item in self.chosen:
            began = time.process_time()
            found = hunt(item, most, pinned.get(item.name))
            self._note(item, found, pinned.get(item.name), time.process_time() - began)
        for name in self.moved:
            self.say(f"pin moved: {name}")
        for item in self.survivors:
            self.say(f"survivor: {item.area}: {item.name} [{item.source}]")

    def _note(
        self,
        item: Mutant,
        found: tuple[str, int, str] | None,
        pin: pins.Schedule | None,
        took_s: float,
    ) -> None:
        if found is None:
            self.survivors.append(item)
            self.say(f"SURVIVES  {item.area}: {item.name} ({took_s:.1f} s)")
            return
        suite, seed, wrong = found
        self.finds[item.name] = suite, seed
        if pin not in (None, (suite, seed)):
            self.moved.append(item.name)
            self.say(f"moved     {item.area}: {item.name}: {pin} does not find it any more")
        self.say(f"found     {item.area}: {item.name}: {suite} {seed}: {wrong} ({took_s:.1f} s)")

    @property
    def killed(self) -> int:
        return len(self.chosen) - len(self.survivors)

    def figures(self) -> dict[str, Any]:
        """For whoever adds up shards."""
        return {
            "total": len(self.chosen),
            "from_specs": sum(item.from_spec for item in self.chosen),
            "units": [name for name, (suite, _) in self.finds.items() if suite.startswith("units")],
            "moved": self.moved,
            "survivors": [f"{item.area}: {item.name} [{item.source}]" for item in self.survivors],
            "areas": Counter(item.area for item in self.chosen),
            "killed_by_area": Counter(i.area for i in self.chosen if i.name in self.finds),
        }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__)
    parser.add_argument("--area", choices=AREAS, action="append")
    parser.add_argument("--name", help="only those whose name contains this")
    parser.add_argument("--shard", default="0/1", help="I/N: every N-th, from the I-th")
    parser.add_argument("--seeds", type=int, default=1 << 30, help="at most, of each suite")
    parser.add_argument("--bar", type=float, default=BAR, help="share that must be found")
    parser.add_argument("--no-pins", action="store_true", help="search all anew")
    parser.add_argument("--write-pins", action="store_true", help="keep what is found as pins")
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
    score = Score(say, chosen)
    score.run({} if given.no_pins else pins.read(), given.seeds)
    if given.write_pins:
        pins.renew(score.finds, [item.name for item in catalogue()])
    figures = score.figures()
    if given.json:
        sys.stdout.write(json.dumps(figures) + "\n")
        return 0
    say(
        f"mutants: killed={score.killed}/{len(chosen)} by unit tests alone={len(figures['units'])} "
        f"written from the specs={figures['from_specs']} pins moved={len(score.moved)}"
    )
    return 0 if score.killed >= given.bar * len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
