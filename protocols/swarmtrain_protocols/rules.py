"""What a committed result does to the state of a channel: its slots and its arithmetic.

The one place that knows them. Channels whose results are mean pseudo-gradients take the outer step
(``outer.py``) and have a slot for its momentum; stages of a pipeline in sync mode, whose results
are mean gradients, take the run's optimizer (``stageopt.py``) and have its slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from swarmtrain_protocols.codecs.base import F32
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.outer import outer_step
from swarmtrain_protocols.rounds.effects import ApplyResult
from swarmtrain_protocols.stageopt import StageOptimizer, StepTerms
from swarmtrain_protocols.state import MOMENTUM, Step


class Rules:
    """The rules of one run.

    Args:
        keys: of the run; None: no pipeline.
    """

    def __init__(self, keys: RunKeys | None = None) -> None:
        self._stages: StageOptimizer | None = None
        if keys is not None and keys.stages and keys.pipeline_mode == "sync":
            self._stages = StageOptimizer.of(keys)

    def stepwise(self, channel: str) -> bool:
        """Whether the rounds of this channel are optimizer steps of a stage."""
        return self._stages is not None and channel.startswith("train/")

    def slots(self, channel: str) -> tuple[str, ...]:
        """Names of the fp32 vectors that the state of ``channel`` has beside theta."""
        if self._stages is not None and self.stepwise(channel):
            return self._stages.slots
        return MOMENTUM

    def step(self, applied: ApplyResult) -> Step:
        """The arithmetic of one result."""
        if self._stages is None or not self.stepwise(applied.channel):
            assert math.isfinite(applied.lr) and math.isfinite(applied.momentum), applied
            return outer_rule(applied.lr, applied.momentum)
        terms = StepTerms(applied.round, applied.scale, applied.recovered, applied.plain)
        return partial(self._stages.step, terms)


def outer_rule(lr: float, beta: float) -> Step:
    """The outer step as the rule of a channel."""

    def step(theta: F32, slots: Sequence[F32], mean: F32, start: int) -> None:
        (momentum,) = slots
        outer_step(theta, momentum, mean, np.float32(lr), np.float32(beta))

    return step
