"""Feeds hostile bytes to every decoder: ``python -m tests.fuzz --target all --inputs 1000000``.

One line for each target: inputs, rate, how many were taken and refused, the slowest input, and
what was unexpected. A finding is printed with its input, and with ``--save`` becomes a file of
``tests/fuzz/corpus``, which every later run and ``make test`` try again. Exit code 1: something was
found.

``--log FILE`` appends a line of JSON for each target and seed; ``--log FILE --sum`` adds up what
such a file holds, so that a long run may be several that were each stopped at any moment.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

from tests.fuzz.engine import CORPUS, Engine, Finding, Report, Target
from tests.fuzz.targets import make_targets


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _resident_bytes() -> int:
    """Of now; a leak shows as growth from target to target."""
    return psutil.Process().memory_info().rss


def _tell(finding: Finding, save: bool) -> None:
    _say(f"  {finding.kind}: {finding.detail.strip()}")
    _say(f"  input of {len(finding.data)} bytes: {finding.data[:200]!r}")
    if save:
        path = CORPUS / finding.target / finding.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(finding.data)
        _say(f"  kept as {path.relative_to(CORPUS)}")


def fuzz(target: Target, inputs: int, seed: int, save: bool) -> Report:
    """Seeds and corpus of a target, then ``inputs`` made from them."""
    engine = Engine(target, seed)
    engine.corpus()
    report = engine.go(inputs)
    _say(f"{report.line()}{_resident_bytes() / 1e6:>7.0f} MB resident")
    for finding in report.findings:
        _tell(finding, save)
    return report


def log_line(report: Report, seed: int) -> str:
    """What came of a target with one seed, as a line of JSON."""
    return json.dumps(
        {
            "target": report.target,
            "seed": seed,
            "inputs": report.inputs,
            "taken": report.accepted,
            "refused": report.refused,
            "slowest_ms": round(1000 * report.slowest_s, 2),
            "peak_bytes": report.peak_bytes,
            "resident_mb": round(_resident_bytes() / 1e6),
            "wall_s": round(report.wall_s, 1),
            "unexpected": [f"{found.kind}: {found.detail[-200:]}" for found in report.findings],
        }
    )


def add_up(lines: Iterable[str]) -> dict[str, Any]:
    """The figures of a log: in all, and by target.

    Raises:
        ValueError: one target was fed twice with one seed, which would count inputs twice.
    """
    targets: dict[str, dict[str, Any]] = {}
    seen: dict[tuple[str, int], None] = {}
    total: dict[str, Any] = {"inputs": 0, "targets": 0, "unexpected": 0, "resident_mb_at_most": 0}
    for line in lines:
        found = json.loads(line)
        key = (found["target"], found["seed"])
        if key in seen:
            raise ValueError(f"target {key[0]} has seed {key[1]} twice")
        seen[key] = None
        row = targets.setdefault(
            found["target"],
            dict.fromkeys(("inputs", "seeds", "taken", "refused", "unexpected"), 0)
            | {"slowest_ms": 0.0, "peak_bytes": 0},
        )
        row["seeds"] += 1
        row["unexpected"] += len(found["unexpected"])
        for name in ("inputs", "taken", "refused"):
            row[name] += found[name]
        for name in ("slowest_ms", "peak_bytes"):
            row[name] = max(row[name], found[name])
        total["inputs"] += found["inputs"]
        total["unexpected"] += len(found["unexpected"])
        total["resident_mb_at_most"] = max(total["resident_mb_at_most"], found["resident_mb"])
    return total | {"targets": len(targets), "by_target": targets}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--target", default="all", help="names, separated by commas, or all")
    parser.add_argument("--inputs", type=int, default=100_000, help="for all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="keep findings in the corpus")
    parser.add_argument("--seconds", type=float, default=0.0, help="go round until so long is over")
    parser.add_argument("--log", type=Path, help="append a line for each target and seed")
    parser.add_argument("--sum", action="store_true", help="add up the log, and feed nothing")
    options = parser.parse_args()
    if options.sum:
        _say(json.dumps(add_up(options.log.read_text("utf-8").splitlines()), indent=1))
        return 0
    targets = make_targets(options.target.split(","))
    begin_s, seed, reports = time.monotonic(), options.seed, list[Report]()
    shares = sum(target.share for target in targets)
    while not reports or time.monotonic() - begin_s < options.seconds:
        for target in targets:
            inputs = max(1, round(options.inputs * target.share / shares))
            reports.append(fuzz(target, inputs, seed, options.save))
            if options.log:
                with options.log.open("a", encoding="utf-8") as log:
                    log.write(log_line(reports[-1], seed) + "\n")
        seed += 1
        inputs, found = sum(r.inputs for r in reports), sum(len(r.findings) for r in reports)
        wall_s = time.monotonic() - begin_s
        _say(
            f"{inputs:,} inputs over {len(targets)} targets in {wall_s:.0f} s, seeds "
            f"{options.seed} to {seed - 1}: {found} unexpected, slowest "
            f"{1000 * max(r.slowest_s for r in reports):.1f} ms, "
            f"{_resident_bytes() / 1e6:.0f} MB resident"
        )
    for target in targets:
        target.close()
    return int(any(report.findings for report in reports))


if __name__ == "__main__":
    sys.exit(main())
