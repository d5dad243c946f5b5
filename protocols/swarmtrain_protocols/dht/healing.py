"""Finding back those who are out of sight: after a restart, and when a split of the network ends.

Two halves that have lost each other forget each other: every table drops who does not answer. So a
node now and then tries somebody from its book who has not answered lately. Who answers is a
contact again, and a lookup for this node's own place, through it, makes the two halves one.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from swarmtrain_protocols import limits
from swarmtrain_protocols.dht.events import DhtRejoined
from swarmtrain_protocols.dht.ids import Contact
from swarmtrain_protocols.dht.search import Search, nothing

if TYPE_CHECKING:
    from swarmtrain_protocols.dht.kademlia import DhtCore
    from swarmtrain_protocols.messages.dht import Reply


class Healing:
    """The part of a ``DhtCore`` that tries remembered peers."""

    def __init__(self, core: DhtCore, now: float) -> None:
        self._core = core
        self.next_at = now + limits.DHT_LONELY_S
        self.tried = 0

    def tick(self, now: float) -> None:
        """Try several if this node is alone, else one at a time."""
        if now < self.next_at:
            return
        core = self._core
        lonely = len(core.table) == 0
        wait_s = limits.DHT_LONELY_S if lonely else limits.DHT_HEAL_S
        self.next_at = now + wait_s * (0.5 + core.rng.random())
        count = limits.DHT_LONELY_ASKED if lonely else 1
        for contact in core.book.draw(core.rng, count):
            self.tried += 1
            core.ping(now, contact, partial(self._answered, contact))

    def _answered(self, contact: Contact, now: float, reply: Reply | None) -> None:
        core = self._core
        core.heard(now, reply, contact=contact)
        if reply is not None:
            core.emit(DhtRejoined(contact.peer))
            core.searches.start(now, Search(core.me.id, nothing, seeds=(contact,), gauge=True))
