"""GF1: a member is in at most one attempt of a (generation, channel, round) at a time.

An attempt has a key of its own, is opened once, and only when the one before it is over; a member
is listed in it once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.testing.checks.oracle import Invariant, Oracle

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.world import World


class OneAttempt(Invariant):
    """``live``: by channel, the attempt that is open."""

    def __init__(self, oracle: Oracle) -> None:
        super().__init__(oracle)
        self.live: dict[str, RoundKey] = {}

    def opened(self, world: World, body: e.RoundOpened) -> None:
        before = self.live.get(body.key.channel)
        if before is not None:
            world.violation("GF1", f"{body.key} is opened while {before} is")
        if body.key in self.oracle.opened:
            world.violation("GF1", f"{body.key} is opened twice")
        members = [item.member for item in body.contributors]
        if len(set(members)) < len(members):
            world.violation("GF1", f"a member is listed twice in {body.key}")
        self.live[body.key.channel] = body.key

    def chosen(self, world: World, body: e.RoundSet) -> None:
        if self.live.get(body.key.channel) != body.key:
            world.violation("GF1", f"a set for {body.key}, which is not open")
        if body.key in self.oracle.chosen:
            world.violation("GF1", f"{body.key} has two sets")

    def committed(self, world: World, body: e.RoundCommitted, right: bytes) -> None:
        self._over(world, body.key)

    def aborted(self, world: World, body: e.RoundAborted) -> None:
        self._over(world, body.key)

    def _over(self, world: World, key: RoundKey) -> None:
        if self.live.pop(key.channel, None) != key:
            world.violation("GF1", f"{key} is decided, and is not open")

    def rewound(self, world: World, body: e.Rewound) -> None:
        for channel in body.channels:
            self.live.pop(channel, None)
