"""PL9, PL17, PL18 (AR2 to AR4 of a pipeline): a step's result is the sum of its set and no more.

Every micro-batch weighs the same, whoever computed it, and the gradient is clipped once, by its
norm over all stages.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.testing.checks.pl_oracle import Result, StepInvariant, key_of

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.world import World


class StepsAreSums(StepInvariant):
    """Roots, square norms and the scale of an outcome."""

    def stepped(
        self, world: World, body: e.StepOutcome, closed: e.StepClosed, right: Result
    ) -> None:
        key = key_of(body)
        for item, root, norm in zip(body.stages, right.roots, right.norms, strict=True):
            if root != item.root:
                world.violation("PL9", f"{key} stage {item.stage} is not the sum of its set")
            if not math.isclose(norm, item.square_norm, rel_tol=1e-12):
                world.violation("PL18", f"{key} stage {item.stage}: {item.square_norm} {norm}")
        scale = self._scale(math.fsum(right.norms))
        if abs(scale - body.scale) > 1e-7:
            world.violation("PL18", f"{key} is clipped by {body.scale}, not {scale}")

    def _scale(self, square_norm: float) -> float:
        clip = self.oracle.keys.inner_clip
        if not clip or square_norm <= clip * clip:
            return 1.0
        return float(np.float32(clip / math.sqrt(square_norm)))
