"""What it costs to lose the first or the last stage, with and without CheckFree+.

``python benchmarks/pipeline_edges.py`` trains as ``pipeline_recovery.py`` does and takes away the
first block stage, then the last one. They have one neighbour only, so there is no average. In the
``swapped`` schedule (run key ``swapped``, CheckFree+ of arXiv 2506.15461) odd micro-batches
exchange the first two and the last two stages, so that each learns the other's work, and a copy of
the neighbour should do. Ways to go on, in the same time, for either schedule:

- ``best``: the product with the buddy's copy; ``best, no copy``: the product without;
- ``neighbour``: a copy of the neighbour alone, as CheckFree+ does it; ``fresh``: random weights;
- ``none``: nothing is ever lost.

Losses are those of the plain order of stages. Exits with 1 unless what the product chose is at most
0.02 nat worse than the best alternative at hand, each time. Writes JSON into ``results/``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import msgspec
from local_training import single_thread, write_result
from pipeline_recovery import (
    INSTALL_NATS_MAX,
    OURS,
    SIZES,
    STAGES,
    Run,
    installs,
    keys_of,
    result,
)

from swarmtrain.training.data import Corpus, load_corpus

LOST_AT = ((0.5, 1), (0.75, STAGES))
"""(share of the time, stage) of each loss."""
NEIGHBOUR = {1: "copy-right", STAGES: "copy-left"}
SCHEDULES = {"plain": False, "swapped": True}


def run_seed(
    seed: int, steps: int, sizes: dict[str, int], schedule: str, corpus: Corpus
) -> list[dict[str, Any]]:
    """Every way to go on, from one beginning."""
    keys = msgspec.structs.replace(keys_of(seed, steps, sizes), swapped=SCHEDULES[schedule])
    at = [(round(share * steps), stage) for share, stage in LOST_AT]
    beginning = Run(keys, corpus, [stage for _, stage in at])
    beginning.train(at[0][0])
    found = []
    for way in ("none", *OURS, "neighbour", "fresh"):
        run = beginning.fork()
        events = []
        for time_of_loss, stage in at if way != "none" else ():
            run.train(time_of_loss)
            alone = NEIGHBOUR[stage] if way == "neighbour" else way
            events.append(run.lose(stage, None if way in OURS else alone, OURS.get(way, True)))
        run.train(steps)
        found.append({"schedule": schedule, **result(seed, way, run, events)})
    return found


def finals(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds by schedule and way; ``ratio``: to the schedule's own ``none``."""
    base = {(r["schedule"], r["seed"]): r["loss_last"] for r in runs if r["way"] == "none"}
    found = []
    for schedule, way in dict.fromkeys((r["schedule"], r["way"]) for r in runs):
        own = [r for r in runs if (r["schedule"], r["way"]) == (schedule, way)]
        row: dict[str, Any] = {"schedule": schedule, "way": way}
        row["loss"] = statistics.mean(r["loss_last"] for r in own)
        row["ratio"] = statistics.mean(r["loss_last"] / base[schedule, r["seed"]] for r in own)
        plain = [r["loss_last"] / base["plain", r["seed"]] for r in own]
        row["ratio_to_plain"] = statistics.mean(plain)
        for number, (_, stage) in enumerate(LOST_AT):
            events = [r["failures"][number] for r in own if r["failures"]]
            if events:
                jumps = [e["test"][e["choice"]] - e["loss_before"] for e in events]
                row[f"jump_nats_stage_{stage}"] = statistics.mean(jumps)
        found.append(row)
    return found


def main(arguments: list[str] | None = None, sizes: dict[str, int] = SIZES) -> int:
    """Run everything, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args(arguments)
    single_thread()
    corpus = load_corpus("stdlib")
    runs = []
    for seed in options.seeds.split(","):
        for schedule in SCHEDULES:
            print(schedule, flush=True)
            runs += run_seed(int(seed), options.steps, sizes, schedule, corpus)
    rows, chosen = finals(runs), installs(runs)
    print(f"\n{'schedule':10}{'way':15}{'loss':>9}{'vs none':>9}{'vs plain':>9}  jump at each loss")
    for row in rows:
        jumps = [f"{v:+.3f}" for name, v in row.items() if name.startswith("jump")]
        print(
            f"{row['schedule']:10}{row['way']:15}{row['loss']:9.4f}{row['ratio'] - 1:+9.2%}"
            f"{row['ratio_to_plain'] - 1:+9.2%}  {' '.join(jumps)}"
        )
    worst = max(each["excess_nats"] for each in chosen)
    print(f"a choice is at worst {worst:+.4f} nat above the best other (bar {INSTALL_NATS_MAX})")
    document = {
        "what": "the first and the last stage lost, plain and swapped schedule",
        "model": sizes,
        "steps": options.steps,
        "final": rows,
        "chosen": chosen,
        "runs": runs,
    }
    write_result("pipeline-edges", document, options.output)
    return 0 if worst <= INSTALL_NATS_MAX else 1


if __name__ == "__main__":
    sys.exit(main())
