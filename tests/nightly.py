"""A night of the simulator: ``python -m tests.nightly --schedules 10000`` (``make sim-nightly``).

Schedules of rounds, and in proportion of every other kind, shared by ``--workers`` processes; then
the hunt for planted bugs. Prints violations as they are found, shrunk and as files that replay
them; at the end, for each kind, schedules, violations and in which share of the schedules each
"sometimes" point fired, and the score of the mutants with the survivors by name. Exit status 1 if
there was a violation, a point was too rare, or fewer than 95 % of the planted bugs were found.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swarmtrain_protocols.testing.checks.base import SOMETIMES_SHARE
from swarmtrain_protocols.testing.nightly import KINDS
from tests.mutants.__main__ import BAR

SHARES = {
    "rounds": 1.0,
    "small": 0.2,
    "pipelines": 0.3,
    "local": 0.03,
    "losses": 0.015,
    "data": 0.03,
    "unlike": 0.03,
}
"""Schedules of each kind, for one of rounds; a schedule of the others takes up to three times as
long."""


def shards(module: str, workers: int, *flags: str) -> list[dict[str, Any]]:
    """What ``workers`` processes of a module said, each of which did its part."""
    command = [sys.executable, "-m", module, "--json", *flags]
    running = [
        subprocess.Popen([*command, "--shard", f"{i}/{workers}"], stdout=subprocess.PIPE, text=True)
        for i in range(workers)
    ]
    answers = [process.communicate()[0] for process in running]
    for process, answer in zip(running, answers, strict=True):
        if not answer.strip():
            raise RuntimeError(f"{module} ended with status {process.returncode} and no figures")
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


def added(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The sum of shards of one kind."""
    total = dict(reports[0])
    fired: Counter[str] = Counter()
    for report in reports:
        fired.update(report["fired"])
    for name in ("schedules", "committed", "aborted", "simulated_s"):
        total[name] = sum(report[name] for report in reports)
    total["violations"] = [item for report in reports for item in report["violations"]]
    total["recovery_s_max"] = max(report["recovery_s_max"] for report in reports)
    return {**total, "fired": dict(fired)}


def rare(report: dict[str, Any]) -> list[str]:
    """Points that fired in fewer than one of a hundred schedules, rounded up."""
    least = max(1, math.ceil(SOMETIMES_SHARE * report["schedules"]))
    return [name for name in report["sometimes"] if report["fired"].get(name, 0) < least]


def tell(report: dict[str, Any]) -> None:
    """Print what came of one kind."""
    count = report["schedules"]
    for name in report["sometimes"]:
        share = 100 * report["fired"].get(name, 0) / count
        sys.stdout.write(f"  {share:5.1f} %  {name}\n")
    for name in rare(report):
        sys.stdout.write(f"  too rare: {name}\n")
    for seed, kind in report["violations"]:
        sys.stdout.write(f"  violation: seed {seed}: {kind}\n")
    sys.stdout.write(
        f"{report['kind']}: schedules={count} violations={len(report['violations'])} "
        f"committed={report['committed']} aborted={report['aborted']} "
        f"simulated_s={report['simulated_s']:.0f} recovery_s_max={report['recovery_s_max']:.1f}\n"
    )
    sys.stdout.flush()


def night(kind: str, schedules: int, workers: int, seed: int) -> dict[str, Any]:
    """All schedules of one kind, printed; what came of them, ``good`` if nothing is wrong."""
    flags = ("--shrink", "--kind", kind, "--schedules", str(schedules), "--seed", str(seed))
    report = added(shards("swarmtrain_protocols.testing.nightly", workers, *flags))
    tell(report)
    return {**report, "good": not report["violations"] and not rare(report)}


def hunt(workers: int, *flags: str) -> dict[str, Any]:
    """All planted bugs; ``good`` if enough are found."""
    found = shards("tests.mutants", workers, *flags)
    total = sum(item["total"] for item in found)
    survivors = [name for item in found for name in item["survivors"]]
    for name in survivors:
        sys.stdout.write(f"  survivor: {name}\n")
    units = sum(item["units"] for item in found)
    killed = total - len(survivors)
    sys.stdout.write(f"mutants: killed={killed}/{total} by unit tests alone={units}\n")
    figures = {"total": total, "killed": killed, "units": units, "survivors": survivors}
    return {"kind": "mutants", **figures, "good": killed >= BAR * total}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="nightly", description=__doc__)
    parser.add_argument("--schedules", type=int, default=10000, help="of rounds")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--workers", type=int, default=2, help="processes beside each other")
    parser.add_argument("--kind", choices=sorted(KINDS), action="append", help="only these")
    parser.add_argument("--no-mutants", action="store_true", help="schedules only")
    parser.add_argument("--output", type=Path, help="also write all figures to this JSON file")
    given = parser.parse_args(argv)
    parts = []
    for kind, share in SHARES.items():
        if not given.kind or kind in given.kind:
            count = max(1, round(given.schedules * share))
            parts.append(night(kind, count, given.workers, given.seed))
    if not given.no_mutants:
        parts.append(hunt(given.workers))
    if given.output is not None:
        given.output.write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")
    return 0 if all(part["good"] for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
