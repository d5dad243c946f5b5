"""AR1, OS2, CO2: all sites apply the same entries at the same indices, for ever.

A round's outcome is an entry, so two members cannot adopt different outcomes while this holds; a
leader that was replaced cannot commit, because what it wrote would be a second entry somewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.node_events import LedgerChanged
from swarmtrain_protocols.testing.checks.base import Checker

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host
    from swarmtrain_protocols.testing.world import World


class LogIsOne(Checker):
    """``history[i]`` is entry i as the first site applied it: (body bytes, accepted)."""

    def __init__(self) -> None:
        self.history: dict[int, tuple[bytes, bool]] = {}
        self.bodies: dict[int, e.EntryBody] = {}
        self.applied: dict[str, int] = {}

    def emitted(self, world: World, host: Host, event: object) -> None:
        if not isinstance(event, LedgerChanged):
            return
        for index, body, accepted in event.entries:
            before = self.applied.get(host.name)
            if before is not None and index != before + 1 and index != 0:
                # A snapshot may jump forward; nothing may go back inside an incarnation.
                if index <= before:
                    world.violation("log-order", f"{host.name} applies {index} after {before}")
                world.seen["log:jump"] += 1
            self.applied[host.name] = index
            found = (e.encode_body(body), accepted)
            known = self.history.setdefault(index, found)
            if known != found:
                world.violation(
                    "log-fork", f"{host.name} has {body} ({accepted}) at {index}, others {known}"
                )
            if index not in self.bodies:
                self.bodies[index] = body
                self.first(world, host, index, body, accepted)

    def first(
        self, world: World, host: Host, index: int, body: e.EntryBody, accepted: bool
    ) -> None:
        """Entry ``index`` was applied for the first time anywhere; for subclasses."""

    def crashed(self, world: World, host: Host) -> None:
        self.applied.pop(host.name, None)
