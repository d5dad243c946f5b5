"""Lookups with a purpose: drives ``Lookup`` with real requests, and collects records on the way.

Records are validated as they come in. A node that answers with one that does not verify is named,
and counts as if it had not answered.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from swarmtrain_protocols import limits
from swarmtrain_protocols.dht.ids import Contact, id_bytes
from swarmtrain_protocols.dht.lookup import Lookup
from swarmtrain_protocols.dht.records import FAULTS, rank, refusal
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.messages.dht import (
    FindNode,
    FindValue,
    Nodes,
    SignedRecord,
    StoreReply,
    Values,
)

if TYPE_CHECKING:
    from swarmtrain_protocols.dht.kademlia import DhtCore
    from swarmtrain_protocols.dht.requests import Reply


@dataclass(slots=True, eq=False)
class Search:
    """A lookup with a purpose. ``key``: records are collected on the way."""

    target: int
    finish: Callable[[float, Search], None]
    key: bytes = b""
    seeds: tuple[Contact, ...] = ()
    found: dict[bytes, SignedRecord] = field(default_factory=dict)
    lookup: Lookup | None = None
    give_up_at: float = math.inf
    ended: bool = False


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

    def tick(self, now: float) -> None:
        """End searches that take too long with what they have."""
        for search in [s for s in self._active if s.give_up_at <= now]:
            if search.lookup is not None:
                search.lookup.stop()
            self._advance(now, search)

    def deadline(self) -> float:
        return min((s.give_up_at for s in self._active), default=math.inf)

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
        search.lookup = Lookup(search.target, start, own=self._core.me.peer)
        search.give_up_at = now + limits.DHT_LOOKUP_TIMEOUT_S
        self._core.table.looked_up(now, search.target)
        self._active.append(search)
        self._advance(now, search)

    def _advance(self, now: float, search: Search) -> None:
        """Ask whoever is to be asked next; end the search if it is done."""
        if search.ended or search.lookup is None:
            return
        for contact in search.lookup.next_queries():
            self._query(now, search, contact, b"", 0)
        if not search.lookup.done:
            return
        search.ended = True
        self._active.remove(search)
        search.finish(now, search)
        self._start_queued(now)

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
        self._core.heard(now, contact, reply)
        lookup = search.lookup
        if search.ended or lookup is None:
            return
        if reply is None:
            lookup.failed(contact.peer)
        else:
            assert not isinstance(reply, StoreReply)
            page = reply if isinstance(reply, Values) else None
            if page is not None and not self._collect(now, search, contact, after, page):
                lookup.failed(contact.peer)
            elif page is not None and page.more and taken < limits.DHT_RECORDS_PER_KEY_MAX:
                lookup.learn(self._core.hinted(page.contacts, lookup))
                taken += len(page.records)
                self._query(now, search, contact, page.records[-1].publisher, taken)
            else:
                lookup.answered(contact.peer, self._core.hinted(reply.contacts, lookup))
        self._advance(now, search)

    def _collect(
        self, now: float, search: Search, contact: Contact, after: bytes, page: Values
    ) -> bool:
        """Take the valid records of a page; False (and a fault) if the page breaks the rules."""
        core = self._core
        last = after
        for record in page.records:
            if record.key != search.key or record.publisher <= last:
                self._core.blame(
                    PeerFault("dht_page", "other records than asked for", contact.peer)
                )
                return False
            last = record.publisher
            held = search.found.get(record.publisher)
            if held == record:
                continue  # already verified
            why = refusal(core.keyring, core.run, record, core.wall(now))
            if why in FAULTS:
                self._core.blame(
                    PeerFault(FAULTS[why], "a DHT record that does not verify", contact.peer)
                )
                return False
            if not why and (held is None or rank(record) > rank(held)):
                search.found[record.publisher] = record
        if page.more and not page.records:
            self._core.blame(
                PeerFault("dht_page", "an empty page that is not the last", contact.peer)
            )
            return False
        return True
