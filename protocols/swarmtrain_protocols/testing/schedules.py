"""Schedules as files: printed when one fails, edited by hand, run again, kept for ever.

A file is JSON: the kind of swarm, the seed that decides all luck, what it is about, and one fault a
line as [at_s, kind, a, b, duration_s] (``faults``, ``aims``):

    {
      "kind": "rounds",
      "seed": 260,
      "about": "its only address was gone",
      "faults": [
        [5.44, "isolate", "b", "", 1.274],
        [7.966, "vanish", "a", "", 0.082]
      ]
    }
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import msgspec

from swarmtrain_protocols.errors import ConfigError
from swarmtrain_protocols.testing.faults import BY_HAND, KINDS, Fault


class Schedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run of one kind of swarm. ``faults`` None: those of the seed."""

    kind: str
    seed: int
    faults: tuple[tuple[float, str, str, str, float], ...] | None = None
    about: str = ""

    def listed(self) -> list[Fault] | None:
        """The faults in the order of their times."""
        return None if self.faults is None else sorted(Fault(*item) for item in self.faults)


def to_json(kind: str, seed: int, faults: Sequence[Fault], about: str = "") -> str:
    """The file of a schedule, with its last line ended."""
    rows = [json.dumps([f.at_s, f.kind, f.a, f.b, f.duration_s]) for f in faults]
    listed = "[\n    " + ",\n    ".join(rows) + "\n  ]" if rows else "[]"
    return (
        f'{{\n  "kind": {json.dumps(kind)},\n  "seed": {seed},\n'
        f'  "about": {json.dumps(about)},\n  "faults": {listed}\n}}\n'
    )


def from_json(text: str | bytes) -> Schedule:
    """Read the file of a schedule.

    Raises:
        ConfigError: it is none, or names a fault that does not exist.
    """
    try:
        found = msgspec.json.decode(text, type=Schedule)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError("no schedule", str(error), "see testing/schedules.py") from None
    for fault in found.listed() or ():
        if fault.kind.removeprefix("aim-") not in (*KINDS, *BY_HAND):
            names = ", ".join((*KINDS, *BY_HAND))
            raise ConfigError(f"fault {fault.kind!r}", "no such kind", f"one of {names}")
    return found
