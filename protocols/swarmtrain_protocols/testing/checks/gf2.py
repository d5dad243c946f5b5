"""GF2, GF3: everybody in a round has the same plan, and the plan fits: it is one entry of the log.

Contributors are members in member order, what is listed of them is what they made, the parts cover
the vector once, and nobody owns a part who is suspended while others are there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.testing.checks.oracle import Invariant

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.world import World


class PlansFit(Invariant):
    """The member list, the part table and the holders of an attempt."""

    def opened(self, world: World, body: e.RoundOpened) -> None:
        members = [c.member for c in body.contributors]
        if members != sorted(set(members)) or not members:
            world.violation("GF2", f"contributors of {body.key} are not in member order")
        if list(body.holders) != sorted(set(body.holders)) or not body.holders:
            world.violation("GF2", f"holders of {body.key} are not in member order")
        for item in body.contributors:
            made = self.oracle.truth.contributions.get(item.root)
            if made is None or (made.member, made.samples) != (item.member, item.samples):
                world.violation("GF2", f"{body.key} lists a contribution nobody made")
        self._parts(world, body)

    def _parts(self, world: World, body: e.RoundOpened) -> None:
        covered = [(p.first, p.count) for p in body.parts]
        place = 0
        for start, count in sorted(covered):
            if start != place or count < 1:
                world.violation("GF2", f"parts of {body.key} overlap or leave gaps: {covered}")
            place += count
        if place != -(-body.values // self.oracle.chunk_values):
            world.violation("GF2", f"parts of {body.key} do not cover the vector")
