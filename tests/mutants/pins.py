"""Pins: for each planted bug the schedule that found it last, in ``pins.json``.

A hunt tries the pinned schedule first. Which schedule meets a bug depends on the timing of the
cores, so a pin goes stale when that changes; then the schedules that the catalogue names are
searched, and the hunt says that the pin has moved. A stale pin is news, not a failure; a bug that
none of the named schedules finds survives. ``python -m tests.mutants --write-pins`` renews the
file, ``--no-pins`` hunts without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tests.mutants.catalogue import Mutant

FILE = Path(__file__).with_name("pins.json")

Schedule = tuple[str, int]
"""(suite, seed)"""


def read() -> dict[str, Schedule]:
    """The pinned schedule of each planted bug that has one, by the bug's name."""
    return {
        name: (suite, int(seed)) for name, (suite, seed) in json.loads(FILE.read_text()).items()
    }


def written(pins: Mapping[str, Schedule]) -> str:
    """The text of the file."""
    lines = [f" {json.dumps(name)}: {json.dumps([*pins[name]])}" for name in sorted(pins)]
    return "{\n" + ",\n".join(lines) + "\n}\n" if lines else "{}\n"


def renew(found: Mapping[str, Schedule], known: Iterable[str]) -> None:
    """Write down what a hunt has found; pins of bugs that are no longer ``known`` go."""
    pins = {**read(), **found}
    FILE.write_text(written({name: pins[name] for name in known if name in pins}), encoding="utf-8")


def order(item: Mutant, most: int, pin: Schedule | None) -> Iterator[Schedule]:
    """The schedules to try for a planted bug: its pin, then ``most`` of each suite named for it."""
    if pin is not None:
        yield pin
    for finder in item.finders:
        yield from ((finder.suite, seed) for seed in finder.seeds[:most])
