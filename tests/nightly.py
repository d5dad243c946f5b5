"""A night of the simulator: ``python -m tests.nightly --schedules 10000`` (``make sim-nightly``).

Schedules of rounds, and in proportion of every other kind, shared by ``--workers`` processes; then
``--traces`` of them again under three hash seeds; then the hunt for planted bugs. Prints violations
as they are found, shrunk and as files that replay them; at the end, for each kind, schedules,
violations and in which share of the schedules each "sometimes" point fired, whether traces agree,
and the score of the mutants with the survivors by name. Exit status 1 if there was a violation, a
point was too rare, two traces of a seed differ, or fewer than 95 % of the planted bugs were found.

A night may be run in pieces: ``--seed 2000 --schedules 2000 --output b.json`` is one, and
``--sum a.json b.json --output night.json`` judges them together. Each figure stands beside the
commits and seeds that it comes from.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from swarmtrain_protocols.testing.checks.base import SOMETIMES_SHARE
from swarmtrain_protocols.testing.nightly import KINDS
from tests.mutants.__main__ import BAR

ROOT = Path(__file__).resolve().parents[1]
SIMULATOR = "swarmtrain_protocols.testing.nightly"
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
HASH_SEEDS = ("0", "1", "2")
TRACES_OF_OTHERS = 0.1
"""Traces compared of each other kind, for one of rounds."""


def commit() -> str:
    """Which tree this is; ``+``: with changes that are in no commit; empty: none of git's."""
    said = []
    for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"]):
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            return ""
        said.append(done.stdout.strip())
    return said[0] + "+" * bool(said[1])


def shards(
    module: str, workers: int, *flags: str, hash_seed: str | None = None
) -> list[dict[str, Any]]:
    """What ``workers`` processes of a module said, each of which did its part."""
    command = [sys.executable, "-m", module, "--json", *flags]
    env = {**os.environ, **({"PYTHONHASHSEED": hash_seed} if hash_seed is not None else {})}
    running = [
        subprocess.Popen(
            [*command, "--shard", f"{i}/{workers}"], stdout=subprocess.PIPE, text=True, env=env
        )
        for i in range(workers)
    ]
    answers = [process.communicate()[0] for process in running]
    for process, answer in zip(running, answers, strict=True):
        if not answer.strip():
            raise RuntimeError(f"{module} ended with status {process.returncode} and no figures")
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


def added(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The sum of shards, or of pieces, of one kind."""
    total = dict(reports[0])
    fired: Counter[str] = Counter()
    for report in reports:
        fired.update(report["fired"])
    for name in ("schedules", "committed", "aborted", "simulated_s"):
        total[name] = sum(report[name] for report in reports)
    total["violations"] = [item for report in reports for item in report["violations"]]
    total["recovery_s_max"] = max(report["recovery_s_max"] for report in reports)
    total["ran"] = [item for report in reports for item in report.get("ran", ())]
    return {**total, "fired": dict(sorted(fired.items()))}


def rare(report: dict[str, Any]) -> list[str]:
    """Points that fired in fewer than one of a hundred schedules, rounded up."""
    least = max(1, math.ceil(SOMETIMES_SHARE * report["schedules"]))
    return [name for name in report["sometimes"] if report["fired"].get(name, 0) < least]


def judged(report: dict[str, Any]) -> dict[str, Any]:
    """What came of one kind, printed; ``good`` if nothing is wrong."""
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
    return {**report, "good": not report["violations"] and not rare(report)}


def night(kind: str, schedules: int, workers: int, seed: int) -> dict[str, Any]:
    """All schedules of one kind."""
    flags = ("--shrink", "--kind", kind, "--schedules", str(schedules), "--seed", str(seed))
    report = added(shards(SIMULATOR, workers, *flags))
    report["ran"] = [{"commit": commit(), "seeds": [seed, seed + schedules - 1]}]
    return judged(report)


def compared(kind: str, schedules: int, workers: int, seed: int) -> list[int]:
    """Seeds whose traces differ between hash seeds, or are none."""
    flags = ("--traces", "--kind", kind, "--schedules", str(schedules), "--seed", str(seed))
    runs = []
    for hash_seed in HASH_SEEDS:
        reports = shards(SIMULATOR, workers, *flags, hash_seed=hash_seed)
        runs.append({s: digest for report in reports for s, digest in report["traces"].items()})
    seeds = range(seed, seed + schedules)
    return [s for s in seeds if len({run.get(str(s), "") for run in runs} | {""}) != 2]


def same_traces(schedules: int, workers: int, seed: int) -> dict[str, Any]:
    """Same seed, same trace, under each hash seed; ``good`` if so for all."""
    asked, differ = {}, []
    for kind in SHARES:
        share = 1.0 if kind == "rounds" else TRACES_OF_OTHERS
        asked[kind] = max(1, round(schedules * share))
        differ += [[kind, s] for s in compared(kind, asked[kind], workers, seed)]
    for kind, number in differ:
        sys.stdout.write(f"  traces differ: {kind} {number}\n")
    told = " ".join(f"{kind}={count}" for kind, count in asked.items())
    sys.stdout.write(
        f"traces: seeds {told} hash_seeds={len(HASH_SEEDS)} "
        f"agree={sum(asked.values()) - len(differ)}/{sum(asked.values())}\n"
    )
    sys.stdout.flush()
    figures = {"commit": commit(), "seeds": asked, "hash_seeds": HASH_SEEDS, "differ": differ}
    return {"kind": "traces", **figures, "good": not differ}


def hunt(workers: int, *flags: str) -> dict[str, Any]:
    """All planted bugs; ``good`` if enough are found."""
    found = shards("tests.mutants", workers, *flags)
    total, from_specs = (sum(item[name] for item in found) for name in ("total", "from_specs"))
    lists: dict[str, list[str]] = {
        name: [bug for item in found for bug in item[name]]
        for name in ("survivors", "units", "moved")
    }
    areas: Counter[str] = Counter()
    killed: Counter[str] = Counter()
    for item in found:
        areas.update(item["areas"])
        killed.update(item["killed_by_area"])
    for name in lists["moved"]:
        sys.stdout.write(f"  pin moved: {name}\n")
    for name in lists["survivors"]:
        sys.stdout.write(f"  survivor: {name}\n")
    by_area = {area: f"{killed[area]} of {count}" for area, count in sorted(areas.items())}
    part = {
        "kind": "mutants",
        "commit": commit(),
        "total": total,
        "from_specs": from_specs,
        "killed": total - len(lists["survivors"]),
        "by_area": by_area,
        **lists,
    }
    sys.stdout.write("".join(f"  {area}: {text}\n" for area, text in by_area.items()))
    return scored(part)


def scored(part: dict[str, Any]) -> dict[str, Any]:
    """The score of the planted bugs, printed."""
    sys.stdout.write(
        f"mutants: killed={part['killed']}/{part['total']} "
        f"by unit tests alone={len(part['units'])} written from the specs={part['from_specs']}\n"
    )
    sys.stdout.flush()
    return {**part, "good": part["killed"] >= BAR * part["total"]}


def whole(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Pieces of a night as one: schedules are added, of traces and mutants the last count."""
    pieces = [part for file in files for part in json.loads(file.read_text(encoding="utf-8"))]
    kinds = dict.fromkeys(part["kind"] for part in pieces)
    parts = []
    for kind in kinds:
        of_kind = [part for part in pieces if part["kind"] == kind]
        parts.append(judged(added(of_kind)) if kind in KINDS else of_kind[-1])
    for part in parts:
        if part["kind"] == "mutants":
            scored(part)
    return parts


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="nightly", description=__doc__)
    parser.add_argument("--schedules", type=int, default=10000, help="of rounds; 0: none")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--workers", type=int, default=2, help="processes beside each other")
    parser.add_argument("--kind", choices=sorted(KINDS), action="append", help="only these")
    parser.add_argument("--traces", type=int, default=100, help="of rounds, compared; 0: none")
    parser.add_argument("--no-mutants", action="store_true", help="plant no bugs")
    parser.add_argument("--sum", type=Path, nargs="+", metavar="FILE", help="judge these pieces")
    parser.add_argument("--output", type=Path, help="also write all figures to this JSON file")
    given = parser.parse_args(argv)
    parts: list[dict[str, Any]] = []

    def keep(*more: dict[str, Any]) -> None:
        parts.extend(more)
        if given.output is not None:
            given.output.write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")

    if given.sum:
        keep(*whole(given.sum))
        return 0 if all(part["good"] for part in parts) else 1
    for kind, share in SHARES.items():
        if given.schedules and (not given.kind or kind in given.kind):
            first, last = (round(n * share) for n in (given.seed, given.seed + given.schedules))
            keep(night(kind, max(1, last - first), given.workers, first))
    if given.traces:
        keep(same_traces(given.traces, given.workers, given.seed))
    if not given.no_mutants:
        keep(hunt(given.workers))
    return 0 if all(part["good"] for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
