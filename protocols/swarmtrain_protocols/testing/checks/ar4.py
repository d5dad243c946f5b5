"""AR4: recorded weights are not negative, finite, capped, and sum to their divisor.

A coefficient is the contribution's share of the samples in the set, less the discount of one that
is late or holds several phases (08 §2.8) and what clipping takes (15); its trainer is told that
very number.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.testing.checks.oracle import Invariant

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host
    from swarmtrain_protocols.testing.world import World

TOLERANCE = 1e-6
"""Coefficients are rounded to fp32."""


class WeightsAreRight(Invariant):
    """Coefficients of every set, and what trainers are told of them."""

    def chosen(self, world: World, body: e.RoundSet) -> None:
        weights = [self._weight(world, body.key, item.index) for item in body.coefficients]
        total = math.fsum(weights)
        factors = self.oracle.factors.get(body.key, [1.0] * len(weights))
        for item, weight, factor in zip(body.coefficients, weights, factors, strict=True):
            right = factor * weight / total
            if not (0.0 <= item.value <= 1.0) or abs(item.value - right) > TOLERANCE:
                world.violation("AR4", f"coefficients of {body.key}: {body.coefficients}")

    def _weight(self, world: World, key: RoundKey, index: int) -> float:
        item = self.oracle.opened[key].contributors[index]
        if key.channel not in self.oracle.states:
            return item.samples
        usual = 0 if self.oracle.mode(key.round) == "off" else 1
        late = max(0, key.round - item.base_round - usual)
        world.seen[f"late:{min(late, 2)}"] += 1
        age = self.oracle.truth.contributions[item.root].age
        return float(item.samples / np.sqrt(1 + late) / (1 + age))

    def decided(self, world: World, host: Host, event: fx.ContributionDecided) -> None:
        if event.outcome != "committed":
            return
        chosen, opened = self.oracle.chosen[event.key], self.oracle.opened[event.key]
        mine = [
            item.value
            for item in chosen.coefficients
            if opened.contributors[item.index].root == event.root
        ]
        if mine != [event.coefficient]:
            world.violation("AR4", f"{host.name} is told {event.coefficient}, log: {mine}")
