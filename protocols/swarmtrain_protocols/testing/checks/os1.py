"""OS1: after each committed round all members hold the same state, by hash; the log pins it.

Also: the first state is that of the model, and a run goes back to a state that was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.testing.checks.oracle import Invariant

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host
    from swarmtrain_protocols.testing.world import World


class StatesAreEqual(Invariant):
    """Hashes in entries and in events, against the oracle's."""

    def modelled(self, world: World, body: e.ModelDefined) -> None:
        for item, root in zip(body.layout, body.roots, strict=True):
            if self.oracle.states[item.channel][0].state_hash != root:
                world.violation("OS1", "the root of the model is not that of its weights")

    def opened(self, world: World, body: e.RoundOpened) -> None:
        if body.key.channel.startswith("train/"):
            right = self.oracle.states[body.key.channel][body.key.round].state_hash
            if right != body.state_hash:
                world.violation("OS1", f"{body.key} pins a wrong state hash")

    def rewound(self, world: World, body: e.Rewound) -> None:
        for channel, number, root in zip(body.channels, body.rounds, body.roots, strict=True):
            if self.oracle.states[channel][number].state_hash != root:
                world.violation("OS1", f"{body} goes to a state that never was")

    def advanced(self, world: World, host: Host, event: fx.StateAdvanced) -> None:
        states = self.oracle.states[event.channel]
        if event.round >= len(states):
            world.violation("OS1", f"{host.name} is at round {event.round} of {event.channel}")
        flipped = (host.name, event.channel) in world.trouble.flipped  # see ``flips``
        if states[event.round].state_hash != event.state_hash and not flipped:
            world.violation("OS1", f"{host.name} has another state before round {event.round}")
