"""PL16, CF1, CF3: a lost stage comes back as its own state, or as the best candidate, as logged.

The losses in the log are those of the candidates, and the state that all replicas begin with is the
one that was chosen. (CF2, CF4 and CF5 are watched by ``tests/sim/test_stage_loss.py``.)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.pipeline.book import KEPT, stage_channel
from swarmtrain_protocols.pipeline.rebuild import CALIBRATION_BATCHES
from swarmtrain_protocols.testing.checks.pl_oracle import StepInvariant

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.world import World


class RebuildsAreRight(StepInvariant):
    """Entries `stage-back`."""

    def recovered(self, world: World, body: e.StageRecovered, alone: bool) -> None:
        known, name = self.oracle.weights[body.stage], body.candidates[body.choice]
        if body.step != len(known) - 1:
            world.violation("PL16", f"stage {body.stage} comes back before step {body.step}")
        if name == KEPT:
            if body.root != known[body.step].state_hash:
                world.violation("PL16", f"stage {body.stage} comes back with another state")
            return
        if (stage_channel(body.stage), body.root) not in self.oracle.truth.candidates:
            world.violation("PL16", f"nobody has tried what stage {body.stage} comes back with")
        scored = [loss for loss in body.losses if loss >= 0.0]
        if scored and body.losses[body.choice] != min(scored):
            world.violation("PL16", f"a better candidate was there: {body}")
        if alone and body.losses[body.choice] >= 0.0:
            self._score(world, body)

    def _score(self, world: World, body: e.StageRecovered) -> None:
        oracle = self.oracle
        thetas = {stage: made[body.step].theta for stage, made in oracle.weights.items()}
        thetas[body.stage] = oracle.truth.candidates[stage_channel(body.stage), body.root]
        batches = [oracle.toy.calibration(k) for k in range(CALIBRATION_BATCHES)]
        losses = [oracle.toy.evaluate(tokens, thetas) for tokens in batches]
        if abs(math.fsum(losses) / len(losses) - body.losses[body.choice]) > 1e-9:
            name = body.candidates[body.choice]
            world.violation("PL16", f"{name} was scored with other weights: {body} {losses}")

    def back(self, world: World, body: e.StageRecovered) -> None:
        if self.oracle.weights[body.stage][body.step].state_hash != body.root:
            world.violation("PL16", f"stage {body.stage}: {body.root.hex()} is not as chosen")
