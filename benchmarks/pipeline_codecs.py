"""What codecs between stages cost in loss and save in bytes.

``python benchmarks/pipeline_codecs.py`` trains a decoder (width 96, four stages) on the
built-in corpus for every seed and codec, in one process: encoded bytes pass from stage to stage as
they do between workers, activations one way and gradients the other, and the stage optimizer is the
product's. Runs of one seed begin from the same weights and see the same text in the same order.

Prints the validation loss (nats per byte, through the same codec) beside that of fp32 boundaries.
Bytes are those of whole tensors as sent, headers and scales included. The control rounds to 15
levels, which is known to cost, and shows that the comparison would see it; nobody can choose it.
``repeat`` is fp32 from weights that differ by a hundredth, and shows what chance alone does. Where
fp32 got to, the codecs are also compared at equal weights: loss and gradient, without chance.
Exits with 1 unless int8 and fp8 stay within 0.5 % of fp32 in the mean over the seeds and send at
most 0.27 of its bytes. Writes JSON into ``results/``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from local_training import Trainer, single_thread, write_result
from torch import Tensor

from swarmtrain.training.data import Corpus, load_corpus
from swarmtrain.training.stages.boundary import BoundaryCodec, PlainBoundary, device_codec
from swarmtrain_protocols.codecs.base import F32
from swarmtrain_protocols.manifest import RunKeys

SIZES = {"d_model": 96, "layers": 4, "heads": 4, "context": 64}
BASE = "fp32"
GATED = ("int8", "fp8")
CONTROL, REPEAT = "control", "repeat"
REPEAT_CHANGE = 1e-2
LOSS_RATIO_MAX = 1.005
BYTES_RATIO_MAX = 0.27
EVALUATION_BATCHES = 64
GRADIENT_BATCHES = 16


class Control(PlainBoundary):
    """fp32 boundaries whose values were rounded to 15 levels per token before they were sent."""

    def encode_gradient(self, g: Tensor) -> bytes:
        scale = g.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30) / 7
        return super().encode_gradient((g / scale).round() * scale)


def run(
    codec: str, seed: int, steps: int, corpus: Corpus, sizes: dict[str, int] = SIZES
) -> dict[str, Any]:
    """Train once; the figures of the run."""
    keys = RunKeys(
        seed=seed,
        preset="decoder-tiny",
        model=sizes,
        stages=4,
        micro_batches=2,
        batch_size=8,
        boundary_codec=BASE if codec in (CONTROL, REPEAT) else codec,
        inner_warmup_steps=min(50, steps),
        total_steps=steps,
    )
    trainer = Trainer(keys, corpus)
    trainer.runtime.boundary = boundary(trainer, codec)
    if codec == REPEAT:
        noise = np.random.default_rng(seed)
        for theta in trainer.theta.values():
            theta *= 1 + np.float32(REPEAT_CHANGE) * noise.standard_normal(theta.size, np.float32)
        trainer.restore(trainer.saved())
    held_out = trainer.held_out(EVALUATION_BATCHES)
    began_s = time.perf_counter()
    first = trainer.loss(held_out)
    for _ in range(steps):
        trainer.step()
    found = {
        "codec": codec,
        "seed": seed,
        "loss_first": first,
        "loss_last": trainer.loss(held_out),
        "boundary_bytes_per_step": trainer.pipeline.sent_nbytes / steps,
        "seconds": round(time.perf_counter() - began_s, 1),
    }
    if codec == BASE:
        found["equal_weights"] = at_equal_weights(trainer, found["loss_last"])
    return found


def boundary(trainer: Trainer, codec: str) -> BoundaryCodec:
    """A codec for the tensors of a trainer."""
    plain = trainer.runtime.boundary
    assert isinstance(plain, PlainBoundary)
    about = plain.bounds, plain.device, plain.dtype
    if codec == CONTROL:
        return Control(plain.oracle, *about)
    return device_codec(BASE if codec == REPEAT else codec, *about)


def at_equal_weights(trainer: Trainer, loss: float) -> dict[str, dict[str, float]]:
    """What the other codecs change where fp32 got to, in which chance has no part.

    ``loss_ratio``: of the validation loss through the codec; ``gradient_error``: norm of the change
    of the gradient of some micro-batches, as a share of the gradient's norm.
    """
    held_out = trainer.held_out(EVALUATION_BATCHES)
    expected = gradient(trainer)
    found = {}
    for codec in (*GATED, CONTROL):
        trainer.runtime.boundary = boundary(trainer, codec)
        change = gradient(trainer) - expected
        error = float(np.linalg.norm(change) / np.linalg.norm(expected))
        ratio = trainer.loss(held_out) / loss
        found[codec] = {"loss_ratio": ratio, "gradient_error": error}
    return found


def gradient(trainer: Trainer) -> F32:
    """Of all stages over micro-batches that no step has seen, [n]."""
    first = trainer.number * trainer.keys.micro_batches
    for k in range(first, first + GRADIENT_BATCHES):
        trainer.pipeline.micro_batch(k, trainer.windows(k))
    found = np.concatenate([trainer.runtime.accumulator(s) for s in trainer.theta])
    trainer.runtime.clear(list(trainer.theta))
    return found


def main(arguments: list[str] | None = None, sizes: dict[str, int] = SIZES) -> int:
    """Run everything, print the table, write the result. 1: a gated codec missed its bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--codecs", default=f"{BASE},{REPEAT},int8,fp8,{CONTROL}")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args(arguments)
    codecs = options.codecs.split(",")
    if not {BASE, *GATED} <= set(codecs):
        parser.error(f"--codecs needs {BASE} and what is compared with it: {', '.join(GATED)}")
    single_thread()
    corpus = load_corpus("stdlib")
    runs = []
    for seed in options.seeds.split(","):
        for codec in codecs:
            runs.append(run(codec, int(seed), options.steps, corpus, sizes))
            print(json.dumps(runs[-1]), flush=True)
    summary = summarised(runs)
    print_table(summary)
    equal = equal_weights(runs)
    document = {
        "what": "validation loss (nats per byte) and bytes between stages, by boundary codec",
        "model": sizes,
        "steps": options.steps,
        "summary": summary,
        "equal_weights": equal,
        "runs": runs,
    }
    write_result("pipeline-codecs", document, options.output)
    return 0 if all(passes(summary[codec]) for codec in GATED) else 1


def passes(row: dict[str, float]) -> bool:
    """Whether a codec's figures are within the bars."""
    return row["loss_ratio"] <= LOSS_RATIO_MAX and row["bytes_ratio"] <= BYTES_RATIO_MAX


def summarised(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By codec: means over the seeds, ratios to fp32 of the same seed, and their standard error."""
    base = {r["seed"]: r for r in runs if r["codec"] == BASE}
    found: dict[str, dict[str, float]] = {}
    for codec in dict.fromkeys(r["codec"] for r in runs):
        own = [r for r in runs if r["codec"] == codec]
        losses = [r["loss_last"] for r in own]
        ratios = [r["loss_last"] / base[r["seed"]]["loss_last"] for r in own]
        sent = [
            r["boundary_bytes_per_step"] / base[r["seed"]]["boundary_bytes_per_step"] for r in own
        ]
        found[codec] = {
            "loss": statistics.mean(losses),
            "loss_spread": max(losses) - min(losses),
            "loss_ratio": statistics.mean(ratios),
            "loss_ratio_error": statistics.stdev(ratios) / len(ratios) ** 0.5 if own[1:] else 0.0,
            "loss_ratio_worst_seed": max(ratios),
            "bytes_ratio": max(sent),
        }
    return found


def print_table(summary: dict[str, dict[str, float]]) -> None:
    """A line per codec."""
    print(f"\n{'codec':10}{'loss':>9}{'spread':>9}{'vs fp32':>9}{'± error':>9}{'bytes':>9}")
    for codec, row in summary.items():
        print(
            f"{codec:10}{row['loss']:9.4f}{row['loss_spread']:9.4f}{row['loss_ratio'] - 1:+9.2%}"
            f"{row['loss_ratio_error']:9.2%}{row['bytes_ratio']:9.4f}"
        )


def equal_weights(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over the seeds of ``at_equal_weights``; prints them."""
    print(f"\n{'at equal weights':18}{'loss':>9}{'gradient':>10}")
    own = [r["equal_weights"] for r in runs if "equal_weights" in r]
    found = {}
    for codec in own[0]:
        row = {name: statistics.mean(e[codec][name] for e in own) for name in own[0][codec]}
        print(f"{codec:18}{row['loss_ratio'] - 1:+9.3%}{row['gradient_error']:10.2%}")
        found[codec] = row
    return found


if __name__ == "__main__":
    sys.exit(main())
