"""What overlap costs in loss: real swarms of the demo, mode by mode and seed by seed.

``python benchmarks/quality.py`` runs, for every seed, one worker alone (a quarter of the data that
four see), then four peers with overlap off, eager and delayed, and prints the validation loss of θ
(nats per byte) side by side, with the mean and the spread over the seeds. Exits with 1 unless
``off`` is at least 2 % below one worker in the mean. Writes JSON into ``results/``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

RUNS = (
    ("one worker", 1, "off"),
    ("off", 4, "off"),
    ("eager", 4, "eager"),
    ("delayed", 4, "delayed"),
)
GAIN_MIN = 0.02


def run_demo(peers: int, overlap: str, steps: int, seed: int) -> dict[str, Any]:
    """One demo as a process of its own; returns its JSON summary."""
    arguments = [sys.executable, "-m", "swarmtrain.cli.main", "demo", "--no-dashboard", "--json"]
    arguments += ["--peers", str(peers), "--overlap", overlap]
    arguments += ["--steps", str(steps), "--seed", str(seed)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=1800, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        raise SystemExit(f"demo failed ({done.returncode}): {done.stderr[-2000:]}")
    summary: dict[str, Any] = json.loads(lines[-1])
    return summary


def main() -> int:
    """Run everything, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    seeds = [int(s) for s in options.seeds.split(",")]
    losses: dict[str, list[float]] = {name: [] for name, _, _ in RUNS}
    details: list[dict[str, Any]] = []
    for seed in seeds:
        for name, peers, overlap in RUNS:
            summary = run_demo(peers, overlap, options.steps, seed)
            losses[name].append(summary["loss_last"])
            details.append({"seed": seed, "run": name} | summary)
            print(f"seed {seed}  {name:10}  loss {summary['loss_last']:.4f}", flush=True)
    base = statistics.mean(losses["one worker"])
    print(f"\n{'run':12}{'mean':>9}{'spread':>9}{'vs one worker':>16}")
    for name, found in losses.items():
        mean, spread = statistics.mean(found), max(found) - min(found)
        print(f"{name:12}{mean:9.4f}{spread:9.4f}{100 * (mean / base - 1):15.2f} %")
    gain = 1 - statistics.mean(losses["off"]) / base
    target = (
        options.output or Path(__file__).parent / "results" / f"quality-{platform.machine()}.json"
    )
    target.parent.mkdir(exist_ok=True)
    document = {"steps": options.steps, "losses": losses, "gain_off": gain, "runs": details}
    target.write_text(json.dumps(document, indent=1) + "\n")
    print(f"off is {100 * gain:.2f} % below one worker (bar: {100 * GAIN_MIN:.0f} %)")
    return 0 if gain >= GAIN_MIN else 1


if __name__ == "__main__":
    sys.exit(main())
