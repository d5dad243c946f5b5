"""Nobody is accused who did nothing: as ``honest``, for pipelines (the weather flips bits)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.testing.checks.pl_oracle import StepInvariant

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host
    from swarmtrain_protocols.testing.world import World


class NobodyIsAccusedInSteps(StepInvariant):
    """Notices that name a peer."""

    def emitted(self, world: World, host: Host, event: object) -> None:
        if isinstance(event, fx.Notice) and event.name == "peer_fault":
            self._named(world, host, event)

    @staticmethod
    def _named(world: World, host: Host, event: fx.Notice) -> None:
        if event.fields.get("fault") != "corrupt_chunk":
            world.violation("honest", f"{host.name} accuses an honest site: {event}")
