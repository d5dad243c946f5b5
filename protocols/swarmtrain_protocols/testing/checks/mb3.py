"""MB3: who is alive and connected is in everybody's view in time, and who is gone leaves it.

By the log's list of members, after healing: 30 s for the first, 60 s for the second.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from swarmtrain_protocols.testing.checks.oracle import Invariant, Oracle

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host
    from swarmtrain_protocols.testing.world import World

SEEN_S = 30.0
GONE_S = 60.0


class ViewsAreTrue(Invariant):
    """Looks once a second of simulated time, from each site in turn."""

    def __init__(self, oracle: Oracle) -> None:
        super().__init__(oracle)
        self.healed_at = math.inf
        self.gone_at: dict[bytes, float] = {}
        self._next: dict[str, float] = {}

    def crashed(self, world: World, host: Host) -> None:
        if host.vanished:
            self.gone_at.setdefault(host.peer, world.now)

    def healed(self, world: World) -> None:
        self.healed_at = world.now

    def always(self, world: World, host: Host) -> None:
        if world.now < self.healed_at + SEEN_S or world.now < self._next.get(host.name, 0.0):
            return
        self._next[host.name] = world.now + 1.0
        members = host.node.core.ledger.members
        if host.peer not in members:
            return  # a site that nobody can let in any more knows nothing
        for peer, gone_at in self.gone_at.items():
            if peer in members and world.now > max(gone_at, self.healed_at) + GONE_S:
                world.violation("MB3", f"{host.name} counts on a member that is gone")
        for other in world.hosts.values():
            seen = other.peer in members or not other.alive or self._stranger(other)
            if not seen:
                world.violation("MB3", f"{host.name} does not know of {other.name}")

    @staticmethod
    def _stranger(other: Host) -> bool:
        """It was never in, and may have no address of anybody who could let it in."""
        return other.node is None or not other.node.core.joiner.registered
