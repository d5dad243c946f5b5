"""What stages that step by themselves cost in loss, and save in bytes, against steps together.

``python benchmarks/pipeline_diloco.py`` trains a decoder (width 64, four block stages, two members
for each stage) on the built-in corpus, in one process, for every seed:

- ``sync``: all stages step together with the mean gradient of a step's micro-batches;
- ``diloco``: each member steps its stages by itself, with half of a step's micro-batches in a local
  step (which member serves which one is drawn for every stage; a backward stays with its forward;
  who has contributed takes no new ones), and a stage's members meet every ten local steps, one
  stage after the other: int8 both ways, the outer step that a run of this length gets by itself;
- ``diloco-alone``: one member for each stage, so that every local step has all micro-batches;
- ``half``: ``sync`` with half of the micro-batches, which is what two members that never met
  would each have.

Runs of one seed begin from the same weights and see the same text. Prints the validation loss (nats
per byte) and the bytes that a member sends to the others of its stages per step: those of an
all-reduce, 2 (R - 1) / R encoded vectors, int8 in either mode. Exits with 1 unless ``diloco`` stays
within 10 % of ``sync`` in the mean over the seeds and sends at most 0.11 of its bytes. These runs
are short (15 rounds) and begin from random weights, which averages of weights like least. Writes
JSON into ``results/``.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from local_training import Trainer, single_thread, write_result

from swarmtrain.training.data import Corpus, load_corpus
from swarmtrain.training.stages.reference import LocalPipeline
from swarmtrain.training.stages.runtime import StageRuntime
from swarmtrain_protocols.codecs import get_codec
from swarmtrain_protocols.codecs.base import F32
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.outer import outer_step
from swarmtrain_protocols.pipeline.hops import stage_of
from swarmtrain_protocols.pipeline.localsteps import first_phase, steps_before
from swarmtrain_protocols.rounds.clip import coefficients_of
from swarmtrain_protocols.schedule import auto_outer
from swarmtrain_protocols.state import decode_chunks, encode_chunks, reduce_chunks

SIZES = {"d_model": 64, "layers": 4, "heads": 4, "context": 64}
BASE, GATED = "sync", "diloco"
MODES = (BASE, GATED, "diloco-alone", "half")
MEMBERS, INNER_STEPS, MICRO_BATCHES = 2, 10, 4
LOSS_RATIO_MAX, BYTES_RATIO_MAX = 1.10, 0.11
EVALUATION_BATCHES = 64
CODEC = get_codec("int8")


class Wired(LocalPipeline):
    """Every stage draws who serves a micro-batch; both directions go to the same member.

    ``waiting``: by stage, members that have contributed and take no new work.
    """

    def __init__(self, runtimes: list[StageRuntime], stages: int, seed: int) -> None:
        super().__init__(dict.fromkeys(range(stages + 1), runtimes), stages)
        self._rng = random.Random(seed)
        self.waiting: dict[int, set[int]] = {s: set() for s in range(stages + 1)}
        self.choice: dict[int, int] = {}
        """By stage, who serves the micro-batch that is under way."""

    def draw(self) -> None:
        """Another micro-batch begins."""
        for stage, members in self.replicas.items():
            free = [m for m in range(len(members)) if m not in self.waiting[stage]]
            self.choice[stage] = self._rng.choice(free)

    def _at(self, hop: int, micro_batch: int) -> StageRuntime:
        stage = stage_of(hop, self.stages)
        return self.replicas[stage][self.choice.get(stage, 0)]


class LocalTrainer:
    """``members`` sites that serve every stage, in mode ``diloco`` (spec 11 §2.8)."""

    def __init__(self, keys: RunKeys, corpus: Corpus, members: int) -> None:
        fields = {name: getattr(keys, name) for name in RunKeys.__struct_fields__}
        self.sync = Trainer(keys, corpus)
        """Its text and its held-out set; ``runtime`` shows the states."""
        stages = range(keys.stages + 1)
        self.keys = keys
        self.sites = [StageRuntime.build(fields, stages) for _ in range(members)]
        self.pipeline = Wired(self.sites, keys.stages, keys.seed)
        self.theta = {s: self.sites[0].theta0(s) for s in stages}
        self.momentum = {s: np.zeros_like(theta) for s, theta in self.theta.items()}
        self.rounds = dict.fromkeys(stages, 0)
        self.held = {s: [0] * members for s in stages}
        """Micro-batches in the accumulators."""
        self.taken = {s: [0] * members for s in stages}
        """Local steps since the last exchange."""
        self.number = 0
        self.sent_nbytes = 0

    def step(self) -> None:
        """The micro-batches of one step, and the local steps and exchanges that come due."""
        count = self.keys.micro_batches
        for k in range(count):
            self.pipeline.draw()
            tokens = self.sync.windows(self.number * count + k)
            self.pipeline.micro_batch(k, tokens)
            for stage, site in self.pipeline.choice.items():
                self.held[stage][site] += 1
                if self.held[stage][site] == count // len(self.sites):
                    self._local_step(stage, site)
        self.number += 1

    def _local_step(self, stage: int, site: int) -> None:
        shape = (stage, self.keys.stages + 1, self.keys.inner_steps)
        past = steps_before(*shape, self.rounds[stage])
        self.sites[site].step(stage, past + self.taken[stage][site])
        self.held[stage][site] = 0
        self.taken[stage][site] += 1
        due = self.keys.inner_steps if self.rounds[stage] else first_phase(*shape)
        if self.taken[stage][site] == due:
            self.pipeline.waiting[stage].add(site)
        if len(self.pipeline.waiting[stage]) == len(self.sites):
            self._exchange(stage)

    def _exchange(self, stage: int) -> None:
        values = self.theta[stage].size
        deltas = [encode_chunks(site.delta(stage), CODEC) for site in self.sites]
        weights = coefficients_of([1.0] * len(deltas))
        result = reduce_chunks(deltas, weights, CODEC, CODEC, values)
        mean: F32 = np.empty(values, np.float32)
        decode_chunks(result, CODEC, mean)
        lr, beta = auto_outer("off", len(self.sites), self.keys.max_rounds)
        theta, momentum = self.theta[stage], self.momentum[stage]
        outer_step(theta, momentum, mean, np.float32(lr), np.float32(beta))
        for site in self.sites:
            site.load(stage, theta)
        self.rounds[stage] += 1
        self.taken[stage] = [0] * len(self.sites)
        self.pipeline.waiting[stage].clear()
        self.sent_nbytes += exchanged_nbytes(values, len(self.sites))

    def loss(self, held_out: list[Any]) -> float:
        """Of the states that the members agree on."""
        for stage, theta in self.theta.items():
            self.sync.runtime.load(stage, theta)
        return self.sync.loss(held_out)


def exchanged_nbytes(values: int, members: int) -> int:
    """What a member sends in an all-reduce of one stage's vector."""
    return 2 * (members - 1) * CODEC.encoded_nbytes(values) // members


def run(
    mode: str, seed: int, steps: int, corpus: Corpus, sizes: dict[str, int] = SIZES
) -> dict[str, Any]:
    """Train once; the figures of the run."""
    alone = mode in (BASE, "half")
    keys = RunKeys(
        seed=seed,
        preset="decoder-tiny",
        model=sizes,
        stages=4,
        micro_batches=MICRO_BATCHES // 2 if mode == "half" else MICRO_BATCHES,
        pipeline_mode="sync" if alone else "diloco",
        inner_steps=INNER_STEPS,
        max_rounds=max(1, steps // INNER_STEPS),
        batch_size=8,
        inner_warmup_steps=min(50, steps // 2),
        total_steps=steps,
    )
    trainer: Trainer | LocalTrainer
    trainer = Trainer(keys, corpus) if alone else LocalTrainer(keys, corpus, _members(mode))
    shown = trainer if isinstance(trainer, Trainer) else trainer.sync
    held_out = shown.held_out(EVALUATION_BATCHES)
    began_s = time.perf_counter()
    first = trainer.loss(held_out)
    for _ in range(steps):
        trainer.step()
    sent = trainer.sent_nbytes / steps if isinstance(trainer, LocalTrainer) else 0.0
    if mode == BASE:
        sent = float(sum(exchanged_nbytes(n, MEMBERS) for n in trainer.runtime.values))
    return {
        "mode": mode,
        "seed": seed,
        "loss_first": first,
        "loss_last": trainer.loss(held_out),
        "stage_bytes_per_step": sent,
        "seconds": round(time.perf_counter() - began_s, 1),
    }


def _members(mode: str) -> int:
    return 1 if mode == "diloco-alone" else MEMBERS


def main(arguments: list[str] | None = None, sizes: dict[str, int] = SIZES) -> int:
    """Run everything, print the table, write the result. 1: ``diloco`` missed its bars."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args(arguments)
    modes = options.modes.split(",")
    if not {BASE, GATED} <= set(modes) <= set(MODES):
        parser.error(f"--modes: {BASE}, {GATED} and any of {', '.join(MODES)}")
    single_thread()
    corpus = load_corpus("stdlib")
    runs = []
    for seed in options.seeds.split(","):
        for mode in modes:
            runs.append(run(mode, int(seed), options.steps, corpus, sizes))
            print(json.dumps(runs[-1]), flush=True)
    summary = summarised(runs)
    print(f"\n{'mode':14}{'loss':>9}{'vs sync':>9}{'worst':>9}{'bytes':>9}")
    for mode, row in summary.items():
        print(
            f"{mode:14}{row['loss']:9.4f}{row['loss_ratio'] - 1:+9.2%}"
            f"{row['loss_ratio_worst_seed'] - 1:+9.2%}{row['bytes_ratio']:9.4f}"
        )
    document = {
        "what": "validation loss (nats per byte) and bytes within stages, by mode of a pipeline",
        "model": sizes,
        "steps": options.steps,
        "inner_steps": INNER_STEPS,
        "members": MEMBERS,
        "summary": summary,
        "runs": runs,
    }
    write_result("pipeline-diloco", document, options.output)
    return 0 if passes(summary[GATED]) else 1


def passes(row: dict[str, float]) -> bool:
    """Whether the figures of ``diloco`` are within the bars."""
    return row["loss_ratio"] <= LOSS_RATIO_MAX and row["bytes_ratio"] <= BYTES_RATIO_MAX


def summarised(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By mode: means over the seeds and ratios to ``sync`` of the same seed."""
    base = {r["seed"]: r for r in runs if r["mode"] == BASE}
    found: dict[str, dict[str, float]] = {}
    for mode in dict.fromkeys(r["mode"] for r in runs):
        own = [r for r in runs if r["mode"] == mode]
        ratios = [r["loss_last"] / base[r["seed"]]["loss_last"] for r in own]
        found[mode] = {
            "loss": statistics.mean(r["loss_last"] for r in own),
            "loss_ratio": statistics.mean(ratios),
            "loss_ratio_worst_seed": max(ratios),
            "bytes_ratio": max(
                r["stage_bytes_per_step"] / base[r["seed"]]["stage_bytes_per_step"] for r in own
            ),
        }
    return found


if __name__ == "__main__":
    sys.exit(main())
