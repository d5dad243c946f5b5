"""PL6, PL7, PL19: every gradient of a step descends from the right weights and the right bytes.

(Goal PL3: forward and backward of a micro-batch in a stage use the same weights.) The toy model is
run again in one process; its gradients carry a fingerprint of all that they were computed from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.pipeline.hops import plain_path, stage_of, swapped_path
from swarmtrain_protocols.testing.checks.pl_oracle import Content, StepInvariant, key_of
from swarmtrain_protocols.testing.toystage import FINGERPRINT

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.world import World


class BytesAreRight(StepInvariant):
    """Fingerprints of the sums, and the loss that is logged."""

    def closed(self, world: World, body: e.StepClosed, content: Content) -> None:
        oracle, key = self.oracle, key_of(body)
        toy = oracle.toy
        thetas = {stage: known[body.step].theta for stage, known in oracle.weights.items()}
        wanted = {stage: np.zeros(FINGERPRINT, np.int64) for stage in content.totals}
        losses = []
        for k in sorted(content.counts[0]):
            gradients, loss = toy.whole(body.step, k, thetas, self._path(k, content))
            losses.append(loss)
            for hop, gradient in gradients.items():
                wanted[stage_of(hop, toy.stages)] += gradient[-FINGERPRINT:]
        for stage, total in content.totals.items():
            if not np.array_equal(total[-FINGERPRINT:], wanted[stage]):
                world.violation("PL6", f"{key} stage {stage} was computed from other bytes")
        if body.loss >= 0.0 and not _is_mean_of_some(body.loss, losses):
            world.violation("PL19", f"{key} says loss {body.loss}, its micro-batches {losses}")
        world.seen["loss:all" if abs(body.loss - _mean(losses)) < 1e-9 else "loss:some"] += 1

    def _path(self, k: int, content: Content) -> tuple[int, ...]:
        """Where ``k`` has left a gradient, in the order that the keys say."""
        stages = self.oracle.toy.stages
        swapped = self.oracle.keys.swapped and k % 2
        whole = swapped_path(stages) if swapped else plain_path(stages)
        return tuple(hop for hop in whole if k in content.counts[hop])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _is_mean_of_some(mean: float, values: Sequence[float]) -> bool:
    """The losses of a driver that died before it told them are missing, no others."""
    sizes = range(len(values), 0, -1)
    return any(
        abs(mean - _mean(chosen)) < 1e-9 for n in sizes for chosen in combinations(values, n)
    )
