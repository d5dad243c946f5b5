"""OS2: outer steps follow each other without gap or repeat, and a committed one is not lost.

A run goes back only if nobody alive holds what is said to be lost; ``swarm.excused`` says when that
may happen. A round is committed with a majority of its holders (of one or two: all).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.testing.checks.oracle import Invariant

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.world import World


class NothingIsLost(Invariant):
    """The order of commits, who held them, and false alarms."""

    def committed(self, world: World, body: e.RoundCommitted, right: bytes) -> None:
        key, opened = body.key, self.oracle.opened[body.key]
        states = self.oracle.states.get(key.channel)
        if states is not None and len(states) != key.round + 1:
            world.violation("OS2", f"{key} committed after {len(states) - 1} rounds")
        holders = [member for member in opened.holders if member in body.held_by]
        need = len(opened.holders) if len(opened.holders) <= 2 else len(opened.holders) // 2 + 1
        if len(holders) < need or len(set(body.held_by)) < len(body.held_by):
            world.violation("OS2", f"{key}: {len(holders)} of {len(opened.holders)} hold it")

    def rewound(self, world: World, body: e.Rewound) -> None:
        for channel, number in zip(body.channels, body.rounds, strict=True):
            states = self.oracle.states[channel]
            for host in world.hosts.values():
                held = host.node.plane.states.get(channel) if host.node is not None else None
                if held is not None and held.round == len(states) - 1 > number:
                    world.violation("OS2", f"{host.name} holds the newest {channel}: {body}")
