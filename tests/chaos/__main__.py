"""Chaos on real processes: ``python -m tests.chaos C5 --minutes 3``.

Runs a scenario (``--list`` shows them) and has its histories judged by ``tests.chaos.check``, a
program of its own. ``all`` runs every one in turn. C1 runs a second time, undisturbed, to compare
losses at equal committed samples. The exit code is 1 if a criterion is violated; ``--keep`` says
where the histories stay, and without it they stay only if something is wrong. Ctrl-C (or SIGTERM)
ends what runs early and has it judged by what there is; a second one ends everything at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

from tests.chaos import schedule  # noqa: E402
from tests.chaos.conductor import Conductor, Order, calibrate  # noqa: E402
from tests.chaos.scenarios import SCENARIOS, Scenario  # noqa: E402

SHORT_MINUTES = 2.0
CLEAN_TIMES = 3.0
"""The undisturbed run may take this many times as long; it trains without pauses."""


ENOUGH = threading.Event()


def interrupted(number: int, frame: object) -> None:
    """The first time: settle and judge. The second time: end."""
    if ENOUGH.is_set():
        raise KeyboardInterrupt
    tell("interrupted: what there is will be judged; once more ends it at once")
    ENOUGH.set()


def tell(line: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()


def orders(given: argparse.Namespace, scenario: Scenario) -> Order:
    seconds = 60.0 * given.minutes
    planned = scenario.schedule(seconds, given.seed)
    if given.schedule is not None:
        planned = schedule.read(given.schedule)
    factor = given.factor or calibrate()
    return Order(scenario, seconds, given.seed, factor, planned, enough=ENOUGH)


def play(order: Order, folder: Path) -> int:
    """Run it, undisturbed as well if losses are compared, and have it judged; the exit code."""
    scenario = order.scenario
    tell(f"{scenario.name}: {scenario.title}; deadlines times {order.factor}")
    samples = Conductor(order, folder, tell).run()
    if "loss" in scenario.criteria and samples and not ENOUGH.is_set():
        tell(f"the same undisturbed, up to {samples:.0f} samples")
        seconds = CLEAN_TIMES * order.seconds + 120.0
        clean = Order(scenario, seconds, order.seed, order.factor, (), samples, ENOUGH)
        Conductor(clean, folder / "clean", tell).run()
    command = [sys.executable, "-m", "tests.chaos.check", str(folder)]
    return subprocess.run(command, process_group=0).returncode  # Ctrl-C does not reach it


def one(given: argparse.Namespace, scenario: Scenario) -> tuple[int, object]:
    """A scenario from beginning to end: exit code and what the checker found."""
    order = orders(given, scenario)
    base = given.keep or Path(tempfile.mkdtemp(prefix="swarmtrain-chaos-"))
    folder = base / scenario.name
    if folder.exists():
        shutil.rmtree(folder)
    code = play(order, folder)
    found = json.loads((folder / "result.json").read_text())
    if code == 0 and given.keep is None:
        shutil.rmtree(base)
    else:
        tell(f"histories: {folder}")
    return code, found


def main() -> int:
    """Run scenarios; 1 if a criterion is violated."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("scenario", nargs="?", help=f"all, {', '.join(SCENARIOS)}")
    parser.add_argument("--minutes", type=float, default=SHORT_MINUTES)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--factor", type=float, default=0.0, help="of deadlines; 0: measured")
    parser.add_argument("--period-s", type=float, help="seconds from fault to fault")
    parser.add_argument("--trainers", choices=("synthetic", "real"), help="others than usual")
    parser.add_argument("--schedule", type=Path, help="faults from a file instead of the seed")
    parser.add_argument("--print", action="store_true", help="print the schedule, do nothing")
    parser.add_argument("--list", action="store_true", help="print the scenarios")
    parser.add_argument("--keep", type=Path, help="a folder for the histories")
    parser.add_argument("--output", type=Path, help="a file for the results")
    given = parser.parse_args()
    if given.list or given.scenario is None:
        sys.stdout.write("".join(f"{s.name:4} {s.title}\n" for s in SCENARIOS.values()))
        return 0
    if given.scenario != "all" and given.scenario not in SCENARIOS:
        parser.error(f"no scenario {given.scenario}; there are {', '.join(SCENARIOS)}")
    wanted = list(SCENARIOS.values())
    if given.scenario != "all":
        wanted = [SCENARIOS[given.scenario]]
    if given.trainers is not None:
        wanted = [dataclasses.replace(scenario, trainers=given.trainers) for scenario in wanted]
    if given.period_s is not None:
        wanted = [dataclasses.replace(scenario, period_s=given.period_s) for scenario in wanted]
    if given.print:
        for scenario in wanted:
            sys.stdout.write(schedule.text(scenario.schedule(60.0 * given.minutes, given.seed)))
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    results: dict[str, tuple[int, object]] = {}
    for scenario in wanted:
        if not ENOUGH.is_set():
            results[scenario.name] = one(given, scenario)
        if given.output is not None:
            document = {name: found for name, (_, found) in results.items()}
            given.output.write_text(json.dumps(document, indent=1) + "\n")
    return max(code for code, _ in results.values())


if __name__ == "__main__":
    sys.exit(main())
