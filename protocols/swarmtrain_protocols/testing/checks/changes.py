"""A run key that changes in flight is for rounds that nobody has opened yet (05 §1.6, 07 §2.2).

(No number of its own: the state of those rounds would differ, which is OS1.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.testing.checks.oracle import Invariant

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.world import World


class ChangesComeBefore(Invariant):
    """Changes of the overlap mode, the only ones that sites of the simulator propose."""

    def changed(self, world: World, body: e.ConfigChanged) -> None:
        oracle = self.oracle
        begun = [
            key.round
            for key in oracle.opened
            if key.channel in oracle.states and key.generation == oracle.generation
        ]
        if oracle.run_keys.overlap != "auto" or any(n >= body.at_round for n in begun):
            world.violation("config", f"{body} is for rounds that were opened before it")
