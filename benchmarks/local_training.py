"""Trains a pipeline's stages in one process: what the pipeline benchmarks have in common.

Micro-batches go hop by hop through the product's runtime as encoded bytes, and the product's
optimizer steps every stage; there is no network and no second replica. One thread.
"""

from __future__ import annotations

import copy
import json
import math
import platform
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swarmtrain.training.data import Corpus
from swarmtrain.training.stages.cut import plain_ranges
from swarmtrain.training.stages.reference import LocalPipeline
from swarmtrain.training.stages.runtime import StageRuntime
from swarmtrain_protocols.codecs.base import F32
from swarmtrain_protocols.codecs.boundary import I32
from swarmtrain_protocols.codecs.kernels import use_numba
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.pipeline.book import NORM_STEPS
from swarmtrain_protocols.pipeline.hops import swapped_path
from swarmtrain_protocols.stageopt import NEVER, StageOptimizer, StepTerms, square_norm

_STATE = ("theta", "slots", "square_norms", "recovered", "number")


class Trainer:
    """All stages of a run: weights, optimizer slots and the runtime that computes.

    ``square_norms``: by stage, the running mean of its gradient's square norm before clipping, as
    the log keeps it. ``recovered``: by stage, the step before which it was last rebuilt.
    """

    def __init__(self, keys: RunKeys, corpus: Corpus) -> None:
        self.keys, self.corpus = keys, corpus
        stages = range(keys.stages + 1)
        fields = {name: getattr(keys, name) for name in RunKeys.__struct_fields__}
        self.runtime = StageRuntime.build(fields, stages)
        self.pipeline = LocalPipeline({s: [self.runtime] for s in stages}, keys.stages)
        self.optimizer = StageOptimizer.of(keys)
        self.theta = {s: self.runtime.theta0(s) for s in stages}
        self.slots = {s: self._zero(s) for s in stages}
        self.square_norms = dict.fromkeys(stages, 0.0)
        self.recovered = dict.fromkeys(stages, NEVER)
        self.number = 0

    def _zero(self, stage: int) -> list[F32]:
        return [np.zeros_like(self.theta[stage]) for _ in self.optimizer.slots]

    def windows(self, position: int) -> I32:
        """The micro-batch at a position, i32 [batch, context + 1]."""
        context = self.runtime.cut.context
        return joined(*self.corpus.batch(self.keys.seed, position, self.keys.batch_size, context))

    def step(self) -> float:
        """One optimizer step of all stages; the mean loss of its micro-batches."""
        count, losses = self.keys.micro_batches, []
        for k in range(count):
            path = swapped_path(self.keys.stages) if self.keys.swapped and k % 2 else None
            tokens = self.windows(self.number * count + k)
            losses.append(self.pipeline.micro_batch(k, tokens, path))
        means = {s: self.runtime.accumulator(s) / np.float32(count) for s in self.theta}
        square = {s: square_norm(g) for s, g in means.items()}
        scale = float(np.float32(min(1.0, self.keys.inner_clip / math.sqrt(sum(square.values())))))
        for stage, theta in self.theta.items():
            known = self.square_norms[stage] or square[stage]
            self.square_norms[stage] = known + (square[stage] - known) / NORM_STEPS
            plain = plain_ranges(self.runtime.layout(stage))
            terms = StepTerms(self.number, scale, self.recovered[stage], plain)
            self.optimizer.step(terms, theta, self.slots[stage], means[stage], 0)
            self.runtime.load(stage, theta)
        self.runtime.clear(list(self.theta))
        self.number += 1
        return statistics.mean(losses)

    def install(self, stage: int, theta: F32) -> None:
        """Put other weights in the place of a stage; its optimizer starts anew."""
        self.theta[stage] = theta.copy()
        self.slots[stage] = self._zero(stage)
        self.recovered[stage] = self.number
        self.runtime.load(stage, theta)

    def saved(self) -> dict[str, Any]:
        """A copy of everything that changes while training."""
        return copy.deepcopy({name: getattr(self, name) for name in _STATE})

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what ``saved`` returned."""
        for name, value in copy.deepcopy(saved).items():
            setattr(self, name, value)
        for stage, theta in self.theta.items():
            self.runtime.load(stage, theta)
        self.runtime.clear(list(self.theta))

    def held_out(self, batches: int) -> list[I32]:
        """Micro-batches of windows that are spread evenly over the held-out text."""
        size, context = self.keys.batch_size, self.runtime.cut.context
        windows = joined(*self.corpus.evaluation(batches * size, context))
        return [windows[k * size : (k + 1) * size] for k in range(batches)]

    def loss(self, micro_batches: list[I32], path: tuple[int, ...] | None = None) -> float:
        """Mean nats per byte through the boundary codec, by ``path`` (None: all hops)."""
        return statistics.mean(self.pipeline.evaluate(each, path) for each in micro_batches)


def joined(inputs: Any, targets: Any) -> I32:
    """Windows i32 [batch, context + 1] of inputs and targets."""
    return np.concatenate([inputs, targets[:, -1:]], axis=1).astype(np.int32)


def single_thread() -> None:
    """Compute with one thread, and with compiled kernels where they are installed."""
    torch.set_num_threads(1)
    use_numba(True)


def write_result(name: str, document: dict[str, Any], output: Path | None) -> None:
    """Write ``results/NAME-MACHINE.json``, or ``output``."""
    machine = platform.machine()
    path = output or Path(__file__).parent / "results" / f"{name}-{machine}.json"
    text = json.dumps({"machine": machine, **document}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
