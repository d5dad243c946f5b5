"""AR3: each contribution counts exactly once or not at all, in all parts alike.

Its trainer hears which of the two it was: what comes back is not in any round, and what counts does
not come back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.testing.checks.oracle import Invariant, Oracle

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host
    from swarmtrain_protocols.testing.site import Site
    from swarmtrain_protocols.testing.world import World


class CountedOnce(Invariant):
    """``returned``: what became of contributions that trainers have back."""

    def __init__(self, oracle: Oracle) -> None:
        super().__init__(oracle)
        self.returned: dict[bytes, str] = {}

    def committed(self, world: World, body: e.RoundCommitted, right: bytes) -> None:
        for item in self.oracle.contributors(body.key):
            known = self.oracle.counted.get(item.root)
            if known is not None:
                world.violation("AR3", f"{body.key} counts a contribution of {known}")
            if item.root in self.returned:
                world.violation("AR3", f"{body.key} counts what was {self.returned[item.root]}")

    def decided(self, world: World, host: Host, event: fx.ContributionDecided) -> None:
        counted = self.oracle.counted.get(event.root)
        if event.outcome == "committed":
            if counted != event.key:
                world.violation("AR3", f"{host.name}: {event.key} is said to count, but does not")
            return
        if counted is not None:
            world.violation("AR3", f"{host.name} gets back what {counted} counts")
        self.returned[event.root] = event.outcome


class SetsAreDelivered(Invariant):
    """A set has only what every part's computer has had, all of it at one computer (08 §2.2.9).

    ``had``: by attempt and part, what each site has had of the contributions.
    """

    def __init__(self, oracle: Oracle) -> None:
        super().__init__(oracle)
        self.had: dict[RoundKey, dict[int, dict[str, set[int]]]] = {}

    def always(self, world: World, host: Host) -> None:
        node: Site = host.node
        for attempt in node.core.member._attempts.values():
            known = self.had.setdefault(attempt.key, {})
            for part, have in attempt.have.items():
                mine = known.setdefault(part, {}).setdefault(host.name, set())
                if len(have) <= len(mine) and mine.issuperset(have):
                    continue
                mine.update(have)
                own = attempt.own_index
                root = None if own is None else attempt.opened.contributors[own].root
                if own in have and root is not None and node.plane.provide(root) is None:
                    world.violation("AR3", f"{host.name} has lost its own bytes of {attempt.key}")

    def chosen(self, world: World, body: e.RoundSet) -> None:
        wanted = {item.index for item in body.coefficients}
        parts = self.had.pop(body.key, {})
        for part in range(len(self.oracle.opened[body.key].parts)):
            if not any(mine >= wanted for mine in parts.get(part, {}).values()):
                world.violation("AR3", f"nobody could sum part {part} of {body.key}: {parts}")

    def aborted(self, world: World, body: e.RoundAborted) -> None:
        self.had.pop(body.key, None)
