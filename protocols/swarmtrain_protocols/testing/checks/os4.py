"""OS4: no contribution from one state is applied to another, but for a recorded, bounded lateness.

The base that the log records is the one that the contribution was made from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.testing.checks.oracle import Invariant

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.world import World


class BasesAreTrue(Invariant):
    """``base_round`` of every contributor that is listed in a state channel."""

    def opened(self, world: World, body: e.RoundOpened) -> None:
        if body.key.channel not in self.oracle.states:
            return
        age_max = self.oracle.run_keys.max_base_age_rounds
        for item in body.contributors:
            made = self.oracle.truth.contributions[item.root]
            if made.base_round != item.base_round:
                world.violation("OS4", f"{body.key}: {item} was made from round {made.base_round}")
            if not 0 <= body.key.round - item.base_round <= age_max:
                world.violation("OS4", f"{body.key}: the base of {item} is too old or to come")
