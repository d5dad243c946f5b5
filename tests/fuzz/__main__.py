"""Feeds hostile bytes to every decoder: ``python -m tests.fuzz --target all --inputs 1000000``.

One line for each target: inputs, rate, how many were taken and refused, the slowest input, and
what was unexpected. A finding is printed with its input, and with ``--save`` becomes a file of
``tests/fuzz/corpus``, which every later run and ``make test`` try again. Exit code 1: something was
found.
"""

from __future__ import annotations

import argparse
import sys
import time

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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--target", default="all", help="names, separated by commas, or all")
    parser.add_argument("--inputs", type=int, default=100_000, help="for all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="keep findings in the corpus")
    parser.add_argument("--seconds", type=float, default=0.0, help="go round until so long is over")
    options = parser.parse_args()
    targets = make_targets(options.target.split(","))
    begin_s, seed, reports = time.monotonic(), options.seed, list[Report]()
    shares = sum(target.share for target in targets)
    while not reports or time.monotonic() - begin_s < options.seconds:
        for target in targets:
            inputs = max(1, round(options.inputs * target.share / shares))
            reports.append(fuzz(target, inputs, seed, options.save))
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
