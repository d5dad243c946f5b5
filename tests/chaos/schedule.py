"""Faults as data: what is done to whom and when. Made from a seed, printed, edited, read back.

A schedule is a JSON list of objects with ``at_s`` (seconds after the calm), ``kind``, usually
``site`` and ``for_s``, and what the kind needs. A site is a number, or ``leader``, ``newest``
(which was started last) or ``any``; the conductor writes down whom it chose.

=============  ================================================================================
``kill``       SIGKILL and a new start after ``for_s``; ``process``: both, peer, trainer; ``wipe``:
               its state is gone; ``truncate``, ``saving``: see C8
``freeze``     SIGSTOP for ``for_s``
``leave``      goes politely, for good
``join``       a new member comes
``rate``       token buckets of ``bits`` per second in both directions of a site
``cut``        ``sides`` cannot reach each other for ``for_s``; ``one_way``: only the first cannot
               reach the second; ``flap_s``: in force and not in turns
``link``       through the proxy of a site: ``how`` is reset, close or flip (one connection, after
               ``after_bytes``), reset all, silent (half-open) or dribble (one-byte writes)
``disk``       ``mode``: full, readonly, broken (EIO), slow (every sync takes ``sync_s``)
``corrupt``    killed, one bit of ``file`` flipped, started again
``clock``      its wall clock is off by ``offset_s`` from now on, and drifts by ``drift``
``old copy``   killed, its log replaced by an older copy, started again
``flood``      hostile sockets at ``per_s`` against everybody
``kill stage`` all sites of a stage killed, back after ``for_s``
=============  ================================================================================
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Fault = dict[str, Any]
Make = Callable[[random.Random, int, int], Fault]
"""A fault from (luck, its number, number of sites)."""

_PLAIN = "kill freeze leave join rate cut link disk corrupt clock flood"
KINDS = frozenset([*_PLAIN.split(), "old copy", "kill stage"])


def every(
    make: Make, period_s: float, seconds: float, seed: int, sites: int, first_s: float = 0.0
) -> list[Fault]:
    """One fault in each period, at a random moment of its middle half; the last one in time."""
    luck = random.Random(f"{seed} {period_s}")
    found = []
    for number in range(int((seconds - first_s) / period_s)):
        at_s = first_s + period_s * (number + luck.uniform(0.25, 0.75))
        found.append({"at_s": round(at_s, 2), **make(luck, number, sites)})
    return found


def read(path: Path) -> list[Fault]:
    """A schedule from a file.

    Raises:
        ValueError: it is none.
    """
    found = json.loads(path.read_text())
    for fault in found:
        if fault.get("kind") not in KINDS or not isinstance(fault.get("at_s"), int | float):
            raise ValueError(f"no fault: {fault}")
    return sorted(found, key=lambda fault: float(fault["at_s"]))


def text(schedule: Sequence[Fault]) -> str:
    """As ``read`` reads it, a fault a line."""
    return "[\n" + ",\n".join(" " + json.dumps(fault) for fault in schedule) + "\n]\n"


# --- one maker for each scenario -----------------------------------------------------------------


def kill(luck: random.Random, number: int, sites: int) -> Fault:
    """Mostly somebody at random, every fifth time whoever was started last, in mid-join or sync."""
    what = luck.choices(("both", "peer", "trainer"), (6, 2, 2))[0]
    fault: Fault = {"kind": "kill", "site": luck.randrange(sites), "process": what}
    if number % 5 == 4:
        fault |= {"site": "newest", "process": "both"}
    if number % 8 == 6:
        fault |= {"process": "both", "wipe": True}
    return {**fault, "for_s": round(luck.uniform(0.5, 4.0), 2)}


def churn(luck: random.Random, number: int, sites: int) -> Fault:
    """Spawn 60, kill 40, as PCCL's stress test; some of those who go do so politely."""
    if luck.random() < 0.6:
        return {"kind": "join"}
    if luck.random() < 0.3:
        return {"kind": "leave", "site": "any"}
    return {
        "kind": "kill",
        "site": "any",
        "process": "both",
        "for_s": round(luck.uniform(1, 20), 2),
    }


def freeze(luck: random.Random, number: int, sites: int) -> Fault:
    """Mostly short, some longer than any silence that links forgive."""
    for_s = luck.choice((1.0, 3.0, 8.0, 20.0)) * luck.uniform(0.8, 1.2)
    return {"kind": "freeze", "site": luck.randrange(sites), "for_s": round(for_s, 2)}


def long_freeze(luck: random.Random, number: int, sites: int) -> Fault:
    for_s = luck.uniform(30.0, 90.0)
    return {"kind": "freeze", "site": luck.randrange(sites), "for_s": round(for_s, 2)}


def cut(luck: random.Random, number: int, sites: int) -> Fault:
    """Halves, five against three, one way, flapping; in turn, with sides by lot."""
    names = list(range(sites))
    luck.shuffle(names)
    kind = number % 4
    small = sites // 2 if kind == 0 else (3 * sites) // 8
    sides = [sorted(names[:small]), sorted(names[small:])]
    # The end of one must not fall into the next, which begins half a period later at the least.
    fault: Fault = {"kind": "cut", "sides": sides, "for_s": round(luck.uniform(14.0, 20.0), 2)}
    if kind == 2:
        fault["one_way"] = True
    if kind == 3:
        fault["flap_s"] = 5.0
    return fault


def link(luck: random.Random, number: int, sites: int) -> Fault:
    how = ("reset", "close", "reset all", "silent", "dribble")[number % 5]
    fault: Fault = {"kind": "link", "site": luck.randrange(sites), "how": how}
    if how in ("reset", "close"):
        fault["after_bytes"] = int(10 ** luck.uniform(0, 6))
    elif how in ("silent", "dribble"):
        fault["for_s"] = round(luck.uniform(0.5, 3.0), 2)
    return fault


def disk(luck: random.Random, number: int, sites: int) -> Fault:
    mode = ("full", "broken", "slow", "readonly")[number % 4]
    site = luck.randrange(sites)
    for_s = round(luck.uniform(8.0, 14.0), 2)
    return {"kind": "disk", "site": site, "mode": mode, "sync_s": 5.0, "for_s": for_s}


def save_crash(luck: random.Random, number: int, sites: int) -> Fault:
    """Killed while a checkpoint is written; every other time its newest one is cut off too."""
    fault: Fault = {"kind": "kill", "site": 1 + number % (sites - 1), "process": "peer"}
    fault |= {"saving": round(luck.uniform(0.0, 0.05), 4), "for_s": 0.2}
    return fault | ({"truncate": round(luck.random(), 4)} if number % 2 else {})


def flip(luck: random.Random, number: int, sites: int) -> Fault:
    """On the wire twice, then in a file."""
    if number % 3 < 2:
        after = int(10 ** luck.uniform(0, 6))
        return {
            "kind": "link",
            "site": luck.randrange(sites),
            "how": "flip",
            "after_bytes": after,
        }
    file = ("checkpoint", "log", "manifest", "result")[number // 3 % 4]
    return {"kind": "corrupt", "site": 1 + luck.randrange(sites - 1), "file": file, "for_s": 0.5}


def clock(luck: random.Random, number: int, sites: int) -> Fault:
    """An hour off either way, steps of a second, and drift; always at a minority."""
    offset_s = (3600.0, 1.0, -3600.0, -1.0, 0.0)[number % 5]
    drift = 200e-6 if number % 2 else 0.0
    site = number % ((sites - 1) // 2)
    return {"kind": "clock", "site": site, "offset_s": offset_s, "drift": drift}


def leader(luck: random.Random, number: int, sites: int) -> Fault:
    """Killed, frozen and restored from an older copy, in turn; whoever leads then."""
    kind = ("kill", "freeze", "old copy")[number % 3]
    fault: Fault = {"kind": kind, "site": "leader", "for_s": round(luck.uniform(3.0, 15.0), 2)}
    return fault | ({"process": "peer"} if kind == "kill" else {})


def stage(luck: random.Random, number: int, sites: int) -> Fault:
    """A site for a moment, four times; then all sites of a stage until it is given up."""
    if number % 5 == 2:
        return {"kind": "kill stage", "stage": 2, "for_s": 60.0}
    return {"kind": "kill", "site": 1 + luck.randrange(sites - 1), "process": "both", "for_s": 3.0}
