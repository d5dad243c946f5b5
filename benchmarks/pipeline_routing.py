"""What routing by expected finish is worth, and what deaths cost. Virtual time, no torch.

``python benchmarks/pipeline_routing.py`` runs whole simulated swarms (``testing.pipeline_swarm``:
real cores, real log, toy stages whose hops take calibrated time) and writes
``results/pipeline-routing.json``:

- one worker of eight is four times slower: micro-batches per second with the router as it is and
  with plain round robin, and the share of hops that the slow worker gets;
- eight workers on four block stages (beside the ends), every one of them also drives: ten simulated
  minutes, undisturbed and with 10 % of the peers killed per minute (Poisson, back after 5 to 10 s).

Sums are checked as in the tests: every gradient of every committed step once. No step may leave
out a micro-batch, so that the weights after equal steps must be equal in both runs, bit for bit.

Everything is seeded: equal on every machine. Exits with 1 if a bar is missed: 1.4 times round
robin, 70 % of the undisturbed throughput, equal weights.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from swarmtrain_protocols.pipeline.effects import HopDone
from swarmtrain_protocols.pipeline.routing import Policy, Router
from swarmtrain_protocols.testing.checks.base import Checker
from swarmtrain_protocols.testing.faults import Fault
from swarmtrain_protocols.testing.host import Host
from swarmtrain_protocols.testing.network import NetworkModel
from swarmtrain_protocols.testing.pipeline_site import PipelinePart
from swarmtrain_protocols.testing.pipeline_swarm import Pipeline, build, make_spec
from swarmtrain_protocols.testing.toystage import Toy
from swarmtrain_protocols.testing.world import World

HOP_S = 0.05
"""Seconds of a forward; a backward takes three times as long."""
WEATHER = NetworkModel(latency_s=(0.002, 0.010), rate_bytes_per_s=1e7)
BEGIN_S = 30.0
"""By then everybody has joined and is in step."""
SLOWER = 4.0
STEPS_LEFT_OUT = 2
"""The first steps wait for members, and nothing has been measured yet."""
KILLS_PER_PEER_MINUTE = 0.1
BACK_S = (5.0, 10.0)
GAIN_MIN, SHARE_MIN = 1.4, 0.7


class Watch(Checker):
    """Sets the routing policy of every driver, and counts whose answers it used."""

    def __init__(self, seed: int, policy: Policy) -> None:
        self.policy: Policy = policy
        self.rng = random.Random(seed)
        self.hops: Counter[bytes] = Counter()
        self.from_s = math.inf

    def booted(self, world: World, host: Host) -> None:
        host.node.core.pipeline.driver.router = Router(self.rng, self.policy)

    def emitted(self, world: World, host: Host, event: object) -> None:
        if isinstance(event, HopDone) and event.outcome == "ok" and world.now >= self.from_s:
            self.hops[event.peer] += 1


def swarm_of(
    seed: int, parts: Sequence[PipelinePart], toy: Toy, room: int, **keys: Any
) -> Pipeline:
    spec = make_spec(
        seed, toy, close_fraction=1.0, start_peers=sum(p.trains for p in parts), **keys
    )
    spec = replace(spec, hop_s=(HOP_S, HOP_S), work_s=(0.001, 0.005), room=room)
    return build(seed, spec, parts, model=WEATHER)


def one_slow(policy: Policy, seed: int, steps: int) -> dict[str, float]:
    """Eight workers, four a block stage and all for the ends, one of them four times slower; three
    drivers without a trainer.
    """
    parts = [PipelinePart(n, trains=False, holds_state=False, drives=True) for n in "abc"]
    parts += [PipelinePart(n, slower=SLOWER if n == "f" else 1.0) for n in "defghijk"]
    swarm = swarm_of(seed, parts, Toy(seed, 2, 48), 2, replicas_min=4, ends_replicas=8)
    watch = Watch(seed, policy)
    swarm.world.watch(watch)
    done = swarm.steps.committed
    swarm.world.run(1e4, lambda: len(done) == STEPS_LEFT_OUT)
    begin_s = watch.from_s = swarm.world.now
    swarm.world.run(1e4, lambda: len(done) == STEPS_LEFT_OUT + steps)
    slow = swarm.world.hosts["f"].peer
    return {
        "micro_batches_per_s": 48 * steps / (swarm.world.now - begin_s),
        "slow_share": watch.hops[slow] / sum(watch.hops.values()),
    }


def kills(seed: int, names: str, minutes: float) -> list[Fault]:
    """A Poisson process of deaths; who is dead already is not killed again."""
    luck = random.Random(f"kills {seed}")
    found: list[Fault] = []
    back = dict.fromkeys(names, 0.0)
    now = BEGIN_S
    while True:
        now += luck.expovariate(KILLS_PER_PEER_MINUTE * len(names) / 60.0)
        if now >= BEGIN_S + 60.0 * minutes:
            return found
        name = luck.choice(names)
        if back[name] <= now:
            away_s = luck.uniform(*BACK_S)
            back[name] = now + away_s
            found.append(Fault(now, "crash", name, "", away_s))


def churn(seed: int, minutes: float, disturbed: bool) -> tuple[dict[str, Any], Pipeline]:
    names = "abcdefgh"
    toy = Toy(seed, 4, 32)
    parts = [PipelinePart(name, drives=True) for name in names]
    swarm = swarm_of(seed, parts, toy, 2, replicas_min=2, ends_replicas=3)
    faults = kills(seed, names, minutes) if disturbed else []
    swarm.world.plan(faults)
    swarm.world.run(BEGIN_S)
    begin = swarm.steps.micro_batches
    swarm.world.run(BEGIN_S + 60.0 * minutes)
    seen = swarm.world.seen
    figures = {
        "deaths": seen["fault:crash"],
        "steps": len(swarm.steps.committed),
        "attempts_aborted": swarm.steps.aborted,
        "stages_lost": seen["entry:StageLost"],
        "gradients_taken_out": seen["pipeline:undo"],
        "micro_batches_per_s": (swarm.steps.micro_batches - begin) / (60.0 * minutes),
    }
    return figures, swarm


def equal_weights(one: Pipeline, two: Pipeline) -> int:
    """Steps after which all stages are equal in both runs; -1: they differ somewhere."""
    steps = min(len(one.steps.committed), len(two.steps.committed))
    for stage, known in one.steps.weights.items():
        mine = [made.state_hash for made in known[: steps + 1]]
        if mine != [made.state_hash for made in two.steps.weights[stage][: steps + 1]]:
            return -1
    return steps


def measure_slow(seeds: Sequence[int], steps: int) -> dict[str, Any]:
    ours = [one_slow("least-finish", seed, steps) for seed in seeds]
    uniform = [one_slow("uniform", seed, steps) for seed in seeds]
    gains = [
        a["micro_batches_per_s"] / b["micro_batches_per_s"]
        for a, b in zip(ours, uniform, strict=True)
    ]
    return {
        "micro_batches_per_s": [round(run["micro_batches_per_s"], 3) for run in ours],
        "round_robin_per_s": [round(run["micro_batches_per_s"], 3) for run in uniform],
        "gain": round(statistics.median(gains), 3),
        "gain_least": round(min(gains), 3),
        "slow_share": round(statistics.median(run["slow_share"] for run in ours), 4),
        "slow_share_round_robin": round(statistics.median(r["slow_share"] for r in uniform), 4),
        "share_by_rate": round(1 / SLOWER / (7 + 1 / SLOWER), 4),
    }


def measure_churn(seeds: Sequence[int], minutes: float) -> dict[str, Any]:
    runs = []
    for seed in seeds:
        calm, undisturbed = churn(seed, minutes, False)
        stormy, disturbed = churn(seed, minutes, True)
        share = stormy["micro_batches_per_s"] / calm["micro_batches_per_s"]
        equal = equal_weights(undisturbed, disturbed)
        runs.append(
            {
                "seed": seed,
                "undisturbed": calm,
                "disturbed": stormy,
                "throughput_share": round(share, 4),
                "steps_with_equal_weights": equal,
            }
        )
    shares = [run["throughput_share"] for run in runs]
    return {
        "minutes": minutes,
        "share_median": statistics.median(shares),
        "share_least": min(shares),
        "weights_equal": all(run["steps_with_equal_weights"] > 0 for run in runs),
        "runs": runs,
    }


def main(argv: Sequence[str] | None = None) -> int:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=here / "results" / "pipeline-routing.json")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10.0, help="of deaths")
    parser.add_argument("--steps", type=int, default=10, help="with a slow worker")
    given = parser.parse_args(argv)
    seeds = range(1, given.seeds + 1)
    slow = measure_slow(seeds, given.steps)
    deaths = measure_churn(seeds, given.minutes)
    found = {"hop_s": HOP_S, "one_worker_four_times_slower": slow, "deaths": deaths}
    given.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    good = slow["gain_least"] >= GAIN_MIN and deaths["share_least"] >= SHARE_MIN
    return 0 if good and deaths["weights_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
