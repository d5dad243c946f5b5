"""Lookups with a purpose: drives ``Lookup`` with real requests, and collects records on the way.

Records are validated as they come in. A node that answers with one that does not verify is named,
and counts as if it had not answered. Where the nearest nodes lie denser than chance allows, the
search also asks whoever is found around random points nearby (``density.py``).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.dht.events import DhtCrowded
from swarmtrain_protocols.dht.ids import Contact, id_bytes
from swarmtrain_protocols.dht.lookup import Lookup
from swarmtrain_protocols.dht.records import FAULTS, rank, refusal
from swarmtrain_protocols.dht.replication import Holdings
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.messages.dht import (
    FindNode,
    FindValue,
    Nodes,
    Reply,
    SignedRecord,
    StoreReply,
    Values,
)

if TYPE_CHECKING:
    from swarmtrain_protocols.dht.kademlia import DhtCore


def _never() -> bool:
    return False


@dataclass(slots=True, eq=False)
class Search:
    """A lookup with a purpose. ``key``: records are collected on the way.

    ``guarded``: somebody may profit from crowding the target (it is a key). ``gauge``: nobody may
    (it is this node's id, or random), so that the density there tells the size of the network.
    """

    target: int
    finish: Callable[[float, Search], None]
    key: bytes = b""
    seeds: tuple[Contact, ...] = ()
    heard: Callable[[float, Search, Contact], None] | None = None
    """Called with each node that has answered."""
    waits: Callable[[], bool] = _never
    """True while nobody else is to be asked; ``Searches.go_on`` says that this may have changed."""
    guarded: bool = False
    gauge: bool = False
    alpha: int = limits.DHT_ALPHA
    """How many answers are awaited at a time."""
    found: dict[bytes, SignedRecord] = field(default_factory=dict)
    holdings: Holdings = field(default_factory=dict)
    tokens: dict[PeerId, bytes] = field(default_factory=dict)
    lookup: Lookup | None = None
    give_up_at: float = math.inf
    ended: bool = False
    probes: int = 0
    """Lookups around random points nearby that have not ended yet."""


class Searches:
    """The searches of one core: some active, the rest in a bounded queue."""

    def __init__(self, core: DhtCore) -> None:
        self._core = core
        self._active: list[Search] = []
        self._queued: deque[Search] = deque()
        self._starting = False

    def __len__(self) -> int:
        return len(self._active) + len(self._queued)

    def start(self, now: float, search: Search) -> bool:
        """Start a search as soon as there is room; False if too many wait already."""
        if len(self._queued) >= limits.DHT_SEARCHES_QUEUED_MAX:
            return False
        self._queued.append(search)
        self._start_queued(now)
        return True

    def go_on(self, now: float, search: Search) -> None:
        """Ask further, unless the search is over or still waits."""
        self._advance(now, search)

    def tick(self, now: float) -> None:
        """End searches that take too long with what they have."""
        for search in [s for s in self._active if s.give_up_at <= now]:
            if search.lookup is not None:
                search.lookup.stop()
            search.probes = 0
            self._advance(now, search)

    def deadline(self) -> float:
        if not self._active:
            return math.inf
        return min(s.give_up_at for s in self._active)

    def _start_queued(self, now: float) -> None:
        # A loop and a flag instead of recursion: a search without contacts ends at once, and
        # hundreds of them may be waiting.
        if self._starting:
            return
        self._starting = True
        while self._queued and len(self._active) < limits.DHT_SEARCHES_ACTIVE_MAX:
            self._begin(now, self._queued.popleft())
        self._starting = False

    def _begin(self, now: float, search: Search) -> None:
        start = [*self._core.table.closest(search.target, limits.DHT_K), *search.seeds]
        own = self._core.me.peer
        search.lookup = Lookup(search.target, start, own=own, alpha=search.alpha)
        search.give_up_at = now + limits.DHT_LOOKUP_TIMEOUT_S
        self._core.table.looked_up(now, search.target)
        self._active.append(search)
        self._advance(now, search)

    def _advance(self, now: float, search: Search) -> None:
        """Ask whoever is to be asked next; end the search if it is done."""
        if search.ended or search.lookup is None:
            return
        while not (search.waits() or self._may_agree(search)):
            queries = search.lookup.next_queries()
            if not queries:
                break
            for contact in queries:
                if self._core.may_ask(now, contact):
                    self._query(now, search, contact, b"", 0)
                else:
                    search.lookup.failed(contact.peer)
        if search.probes or not search.lookup.done:
            return
        if search.guarded and not search.lookup.stopped:
            search.guarded = False
            if self._surrounded(search.target, search.lookup.closest()):
                self._look_around(now, search)
                return
        search.ended = True
        self._active.remove(search)
        if search.gauge and not search.lookup.stopped:
            self._core.density.observe(search.target, search.lookup.closest())
        search.finish(now, search)
        self._start_queued(now)

    def _surrounded(self, target: int, closest: list[Contact]) -> bool:
        """True if the k nearest may all have been put there. Where there are few, all are asked."""
        density = self._core.density
        few = len(closest) < limits.DHT_K or density.size < 2 * limits.DHT_K
        return not few and density.crowded(target, closest)

    def _look_around(self, now: float, search: Search) -> None:
        """The k nearest may all belong to one: find those that chance has put near the target.

        Points nearby are drawn at random, so that nobody can have made keys for them.
        """
        core = self._core
        core.count("dht_crowded")
        core.emit(DhtCrowded(id_bytes(search.target)))
        search.probes = limits.DHT_CROWD_PROBES
        for _ in range(limits.DHT_CROWD_PROBES):
            point = search.target ^ core.rng.randrange(core.density.radius())
            self._begin(now, Search(point, partial(self._looked_around, search)))

    def _looked_around(self, search: Search, now: float, probe: Search) -> None:
        if search.probes == 0:
            return  # given up meanwhile
        assert search.lookup is not None and probe.lookup is not None
        reach = 2 * self._core.density.radius()
        near = [c for c in probe.lookup.spread() if c.id ^ search.target < reach]
        search.lookup.widen(near)
        search.probes -= 1
        if search.probes == 0:
            self._advance(now, search)

    def _query(
        self, now: float, search: Search, contact: Contact, after: bytes, taken: int
    ) -> None:
        """Ask for nodes, or for the records behind publisher ``after``; ``taken`` came before."""
        number = self._core.requests.next_number()
        done = partial(self._answered, search, contact, after, taken)
        slow = partial(self._slow, search, contact)
        if search.key:
            question = FindValue(number, search.key, after)
            self._core.requests.ask(now, contact, question, Values, done, slow)
        else:
            query = FindNode(number, id_bytes(search.target))
            self._core.requests.ask(now, contact, query, Nodes, done, slow)

    def _slow(self, search: Search, contact: Contact, now: float) -> None:
        if search.lookup is not None:
            search.lookup.slow(contact.peer)
            self._advance(now, search)

    def _answered(
        self,
        search: Search,
        contact: Contact,
        after: bytes,
        taken: int,
        now: float,
        reply: Reply | None,
    ) -> None:
        self._core.heard(now, reply, contact=contact)
        lookup = search.lookup
        if search.ended or lookup is None:
            return
        if reply is None:
            lookup.failed(contact.peer)
        else:
            assert not isinstance(reply, StoreReply)
            if reply.token:
                search.tokens[contact.peer] = reply.token
            page = reply if isinstance(reply, Values) else None
            if page is not None and not self._collect(now, search, contact, after, page):
                lookup.failed(contact.peer)
            elif page is not None and page.more and taken < limits.DHT_RECORDS_PER_KEY_MAX:
                hinted = self._core.hinted(page.contacts, lookup, contact.peer)
                lookup.hear(contact.peer, hinted)
                taken += len(page.records)
                self._query(now, search, contact, page.records[-1].publisher, taken)
            else:
                hinted = self._core.hinted(reply.contacts, lookup, contact.peer)
                lookup.answered(contact.peer, hinted)
                if search.heard is not None:
                    search.heard(now, search, contact)
                if page is not None and self._agreed(search):
                    lookup.stop()
        self._advance(now, search)

    def _may_agree(self, search: Search) -> bool:
        """True if those who could agree have all been asked and none has said otherwise yet."""
        if not search.found or search.lookup is None:
            return False
        waits = False
        truth = {publisher: rank(record) for publisher, record in search.found.items()}
        for contact in search.lookup.nearest(limits.DHT_AGREE):
            if search.lookup.awaits(contact.peer):
                waits = True
            elif search.holdings.get(contact.peer) != truth:
                return False
        return waits

    def _agreed(self, search: Search) -> bool:
        """True if as many of the nearest as it takes hold the same, and nobody holds anything else.

        They must be as far apart as chance would put them: a few keys made to lie beside the target
        could otherwise agree on half of the truth.
        """
        lookup = search.lookup
        assert lookup is not None
        if not search.found or len(search.holdings) < limits.DHT_AGREE:
            return False
        truth = {publisher: rank(record) for publisher, record in search.found.items()}
        if any(holding and holding != truth for holding in search.holdings.values()):
            return False
        nearest = lookup.nearest(limits.DHT_AGREE)
        if any(search.holdings.get(contact.peer) != truth for contact in nearest):
            return False
        return not self._core.density.crowded(search.target, nearest)

    def _collect(
        self, now: float, search: Search, contact: Contact, after: bytes, page: Values
    ) -> bool:
        """Take the valid records of a page; False (and a fault) if the page breaks the rules."""
        records = self.checked(now, contact, search.key, after, page, search.found)
        if records is None:
            return False
        holdings = search.holdings.setdefault(contact.peer, {})
        for record in records:
            holdings[record.publisher] = rank(record)
            held = search.found.get(record.publisher)
            if held is None or rank(record) > rank(held):
                search.found[record.publisher] = record
        return True

    def checked(
        self,
        now: float,
        contact: Contact,
        key: bytes,
        after: bytes,
        page: Values,
        verified: dict[bytes, SignedRecord] | None = None,
    ) -> list[SignedRecord] | None:
        """The believable records of a page; None (and a fault) if the page breaks the rules.

        ``verified``: by publisher, records that need not be checked again.
        """
        core = self._core
        last = after
        good: list[SignedRecord] = []
        for record in page.records:
            if record.key != key or record.publisher <= last:
                core.blame(PeerFault("dht_page", "other records than asked for", contact.peer))
                return None
            last = record.publisher
            known = verified is not None and verified.get(record.publisher) == record
            why = "" if known else refusal(core.keyring, core.run, record, core.wall(now))
            if why in FAULTS:
                core.blame(PeerFault(FAULTS[why], "a DHT record that does not hold", contact.peer))
                return None
            if not why:
                good.append(record)
        if page.more and not page.records:
            core.blame(PeerFault("dht_page", "an empty page that is not the last", contact.peer))
            return None
        return good


def nothing(_now: float, _search: Search) -> None:
    """A lookup whose only purpose is what it leaves in the routing table."""
