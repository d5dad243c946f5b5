"""AR7, GF4: nobody is in doubt for long once trouble is over; every wait has a deadline.

That everybody gets on again is asked for by ``settle_within`` and the swarm's own goal; here is
that no single contribution is left behind: one that was open when trouble ended is decided within
``IN_DOUBT_S``, and so is every attempt.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.testing.checks.oracle import Invariant, Oracle

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host
    from swarmtrain_protocols.testing.world import World

IN_DOUBT_S = 60.0
"""The bound that is promised, after healing."""


class DoubtEnds(Invariant):
    """``since``: when an attempt was opened, as far as it is open."""

    def __init__(self, oracle: Oracle) -> None:
        super().__init__(oracle)
        self.since: dict[RoundKey, float] = {}
        self.waiting: dict[bytes, float] = {}
        """Contributions in doubt and since when."""
        self.healed_at = math.inf

    def opened(self, world: World, body: e.RoundOpened) -> None:
        self.since[body.key] = world.now
        for item in body.contributors:
            self.waiting.setdefault(item.root, world.now)

    def committed(self, world: World, body: e.RoundCommitted, right: bytes) -> None:
        self.since.pop(body.key, None)

    def aborted(self, world: World, body: e.RoundAborted) -> None:
        self.since.pop(body.key, None)

    def rewound(self, world: World, body: e.Rewound) -> None:
        for key in [key for key in self.since if key.channel in body.channels]:
            del self.since[key]

    def healed(self, world: World) -> None:
        self.healed_at = world.now

    def always(self, world: World, host: Host) -> None:
        limit_s = world.now - IN_DOUBT_S
        if limit_s < self.healed_at:
            return
        for key, since in self.since.items():
            if since < limit_s:
                world.violation("AR7", f"{key} is open since {since:.1f}")
        for channel in host.node.core.ledger.channels:
            offer = host.node.core.member.undecided(channel)
            if offer is not None and self.waiting.get(offer.root, math.inf) < limit_s:
                world.violation("AR7", f"{host.name} is in doubt about {channel} for long")
