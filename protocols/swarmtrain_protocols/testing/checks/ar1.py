"""AR1: no two members adopt different outcomes of a round: the same root, or none.

The entries themselves are compared by ``one_log``; here is what sites do with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.testing.checks.oracle import Invariant

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host
    from swarmtrain_protocols.testing.world import World


class OneOutcome(Invariant):
    """Rounds are committed once, and groups are given the committed root."""

    def committed(self, world: World, body: e.RoundCommitted, right: bytes) -> None:
        key = body.key
        known = self.oracle.committed.get((key.channel, key.round))
        if known is not None:
            world.violation("AR1", f"two outcomes of {key.channel} round {key.round}")

    def emitted(self, world: World, host: Host, event: object) -> None:
        if isinstance(event, fx.GroupDone):
            key = event.key
            if self.oracle.committed.get((key.channel, key.round)) != event.root:
                world.violation("AR1", f"{host.name} has another result of {key}")
