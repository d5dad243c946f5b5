"""How near the optimum the leader's assignment of stages keeps a fleet. Virtual time, no torch.

``python benchmarks/pipeline_rebalance.py`` runs the real assigner and ledger over simulated workers
(``swarmtrain_protocols.testing.fleet``) and writes ``results/pipeline-rebalance.json``:

- 5/1/1/1 workers on four stages: throughput over the first periods, and who moved;
- a herd of 40 joiners in the same moment;
- preemption traces of 40 machines over 32 hours (``testing.spot`` says how they are generated),
  against the brute-force optimum (everybody who lives is in the best place at once, without a
  download), against joins without moves, and against joiners that choose a stage at random.

Everything is seeded: equal on every machine. Exits with 1 if a bar is missed: 1.8 times the
starting throughput within four periods, 95 % of the optimum in the mean over the seeds, nobody back
within two periods, no stage of the herd more than one joiner ahead.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any

from swarmtrain_protocols.pipeline.census import AssignPolicy
from swarmtrain_protocols.testing.fleet import Fleet, FleetWorker
from swarmtrain_protocols.testing.spot import HOUR_S, spot_trace

PERIOD_S = 300.0
DOWNLOAD_S = 60.0
POLICY = AssignPolicy(period_s=PERIOD_S, report_s=30.0, grace_s=10.0)
NEVER_S = 1e12
HOURS = 32
GAIN_MIN, SHARE_MIN = 1.8, 0.95


def lopsided() -> dict[str, Any]:
    """Twenty workers, five per stage; then three stages lose four each."""
    fleet = Fleet(blocks=4, policy=POLICY, download_s=DOWNLOAD_S)
    for number in range(20):
        fleet.arrive(0.0, f"worker {number}")
    begin = 4 * PERIOD_S
    fleet.run(begin)
    for stage in (2, 3, 4):
        for peer in [w.id for w in fleet.workers.values() if stage in w.stages][1:]:
            fleet.crash(begin, peer)
    fleet.run(begin + 0.1)
    start, counts = fleet.rate(), [fleet.counts()]
    rates = [start]
    for period in range(1, 9):
        fleet.run(begin + period * PERIOD_S)
        rates.append(fleet.rate())
        counts.append(fleet.counts())
    return {
        "workers_by_period": counts,
        "throughput_by_period": [round(rate, 4) for rate in rates],
        "gain_after_4_periods": round(rates[4] / start, 4),
        "moves": len(fleet.moves()),
        "returns": len(fleet.returns(NEVER_S)),
    }


def herd(joiners: int = 40) -> dict[str, Any]:
    """All join in the same moment."""
    fleet = Fleet(blocks=4, policy=POLICY, download_s=DOWNLOAD_S)
    for number in range(joiners):
        fleet.arrive(0.0, f"joiner {number}")
    fleet.run(60.0)
    return {"joiners": joiners, "workers_by_stage": fleet.counts(), "moves": len(fleet.moves())}


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to run a trace."""

    name: str
    blocks: int = 4
    period_s: float = PERIOD_S
    random_joins: bool = False
    unequal: bool = False


CASES = (
    Case("assigner"),
    Case("joins only", period_s=NEVER_S),
    Case("random joins, no moves", random_joins=True),
    Case("assigner, period 60 s", period_s=60.0),
    Case("assigner, 8 stages", blocks=8),
    Case("joins only, 8 stages", blocks=8, period_s=NEVER_S),
    Case("assigner, unequal speeds", unequal=True),
    Case("joins only, unequal speeds", unequal=True, period_s=NEVER_S),
)


def trace(case: Case, seed: int, hours: float) -> dict[str, Any]:
    """One trace; shares are of the optimum. Speeds, if unequal: 0.5, 1, 1 or 2."""
    rng = random.Random(f"{case.name} {seed}")

    def anywhere(fleet: Fleet, worker: FleetWorker) -> int:
        return rng.randint(1, case.blocks)

    fleet = Fleet(
        blocks=case.blocks,
        policy=dataclasses.replace(POLICY, period_s=case.period_s),
        download_s=DOWNLOAD_S,
        place=anywhere if case.random_joins else None,
    )
    speeds = random.Random(f"speeds {seed}")
    stays = spot_trace(seed, duration_s=hours * HOUR_S)
    for number, stay in enumerate(stays):
        speed = speeds.choice((0.5, 1.0, 1.0, 2.0)) if case.unequal else 1.0
        fleet.crash(stay.end_s, fleet.arrive(stay.begin_s, f"machine {number}", speed))
    fleet.run((hours - 1) * HOUR_S)
    done, best = fleet.done, fleet.best
    fleet.run(hours * HOUR_S)
    return {
        "case": case.name,
        "seed": seed,
        "machines": len(stays),
        "share": round(fleet.done / fleet.best, 4),
        "share_last_hour": round((fleet.done - done) / (fleet.best - best), 4),
        "moves": len(fleet.moves()),
        "returns": len(fleet.returns(2 * PERIOD_S)) if case.period_s == PERIOD_S else 0,
    }


def main() -> int:
    """Run everything, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="1,2,3,4,5")
    parser.add_argument("--hours", type=float, default=float(HOURS))
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    seeds = [int(s) for s in options.seeds.split(",")]
    uneven, crowd = lopsided(), herd()
    print(f"5/1/1/1: {uneven}\nherd: {crowd}\n")
    print(f"{'':30}{'share':>8}{'lowest':>8}{'last hour':>11}{'moves':>7}{'returns':>9}")
    details, table = [], {}
    for case in CASES:
        found = [trace(case, seed, options.hours) for seed in seeds]
        details += found
        table[case.name] = row = {
            "share": round(statistics.mean(x["share"] for x in found), 4),
            "share_min": min(x["share"] for x in found),
            "share_last_hour": round(statistics.mean(x["share_last_hour"] for x in found), 4),
            "moves": statistics.mean(x["moves"] for x in found),
            "returns": sum(x["returns"] for x in found),
        }
        print(
            f"{case.name:30}{row['share']:8.4f}{row['share_min']:8.4f}"
            f"{row['share_last_hour']:11.4f}{row['moves']:7.1f}{row['returns']:9}",
            flush=True,
        )
    result = {
        "setting": {
            "period_s": PERIOD_S,
            "download_s": DOWNLOAD_S,
            "policy": dataclasses.asdict(POLICY),
            "hours": options.hours,
            "seeds": seeds,
            "trace": "synthetic: swarmtrain_protocols.testing.spot",
        },
        "lopsided": uneven,
        "herd": crowd,
        "traces": table,
        "details": details,
    }
    name = Path(__file__).parent / "results" / "pipeline-rebalance.json"
    (options.output or name).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    spread = max(crowd["workers_by_stage"]) - min(crowd["workers_by_stage"])
    good = (
        uneven["gain_after_4_periods"] >= GAIN_MIN
        and uneven["returns"] == 0
        and spread <= 1
        and table["assigner"]["share"] >= SHARE_MIN
        and table["assigner"]["returns"] == 0
    )
    print("all bars held" if good else "A BAR WAS MISSED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
