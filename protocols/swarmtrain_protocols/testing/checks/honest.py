"""Nobody is accused who did nothing: all sites of the simulator are honest.

Only chunks are spoilt, on their way, by the world itself. (No number of its own: every answer to a
threat rests on it, because whoever is accused is cut off.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.testing.checks.oracle import Invariant

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host
    from swarmtrain_protocols.testing.world import World


class NobodyIsAccused(Invariant):
    """Faults and notices that name a peer."""

    def emitted(self, world: World, host: Host, event: object) -> None:
        if isinstance(event, PeerFault):
            world.violation("honest", f"{host.name} accuses an honest site: {event!r}")
        elif isinstance(event, fx.Notice) and event.name == "peer_fault":
            self._named(world, host, event)

    @staticmethod
    def _named(world: World, host: Host, event: fx.Notice) -> None:
        if event.fields.get("fault") != "corrupt_chunk":
            world.violation("honest", f"{host.name} accuses an honest site: {event}")
