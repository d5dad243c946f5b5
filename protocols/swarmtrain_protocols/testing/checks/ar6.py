"""AR6: what a site holds is a state that the log made; an attempt that fails touches nothing.

Compared value by value after each event, and not only where a site says that it has moved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarmtrain_protocols.testing.checks.oracle import Invariant

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host
    from swarmtrain_protocols.testing.site import Site
    from swarmtrain_protocols.testing.world import World


class InputsStay(Invariant):
    """The arrays of every state that a site vouches for."""

    def always(self, world: World, host: Host) -> None:
        if self.oracle.rebuilt:
            return  # who held a state before its stage was lost finds out later
        node: Site = host.node
        right = self.oracle.states
        for channel, state in node.plane.states.items():
            known, number = right.get(channel), state.round
            if known is None or number >= len(known):
                continue  # its commit is applied here before anybody has emitted it
            if state.theta.tobytes() + state.slots["momentum"].tobytes() == known[number].raw:
                continue
            if node.core.ledger.model is None:
                continue  # what a site proposes is not the model yet
            flipped = (host.name, channel) in world.trouble.flipped  # see ``flips``
            track = node.core.catchup.tracks.get(channel)  # None: it has parted with this stage
            if not flipped and track is not None and track.state_hash is not None:
                world.violation("AR6", f"{host.name} changed its state of round {state.round}")
