"""Copies of records: kept where they belong while nodes come, go and disagree.

A holder never pushes blindly. It asks for what the other holds under the key, naming the digest of
what it has itself: mostly the answer is "the same". Otherwise both sides end up with the newer of
each record, which is also how the views of two halves that had lost each other grow together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.dht.ids import Contact, id_from_bytes
from swarmtrain_protocols.dht.records import digest_of, rank
from swarmtrain_protocols.messages.dht import FindValue, Reply, SignedRecord, Values

if TYPE_CHECKING:
    from swarmtrain_protocols.dht.kademlia import DhtCore
    from swarmtrain_protocols.dht.search import Search


@dataclass(slots=True)
class _Sync:
    """One comparison with one contact, page by page."""

    key: bytes
    contact: Contact
    theirs: dict[bytes, SignedRecord] = field(default_factory=dict)


class Replication:
    """The part of a ``DhtCore`` that keeps copies where they belong."""

    def __init__(self, core: DhtCore) -> None:
        self._core = core

    def tick(self, now: float) -> None:
        """Compare what has come due with the k nearest known.

        Who is none of the k nearest asks three of them whether they have the same, no more: its
        copy is from when it was nearer, and ends with the life of the record.
        """
        core = self._core
        done: dict[bytes, None] = {}
        for record in core.held.due(now, limits.DHT_REPLICATE_BATCH_MAX):
            core.held.schedule(record, self.next_time(now))
            done[record.key] = None
        for key in done:
            nearest = core.table.closest(id_from_bytes(key), limits.DHT_K)
            count = limits.DHT_PATHS if self._is_far(key, nearest) else limits.DHT_K
            for contact in nearest[:count]:
                self.compare(now, contact, key)

    def _is_far(self, key: bytes, near: list[Contact]) -> bool:
        """True if k contacts, ``near`` the nearest known, are nearer to ``key`` than this node."""
        own, target = self._core.me.id, id_from_bytes(key)
        return len(near) >= limits.DHT_K and near[-1].id ^ target < own ^ target

    def next_time(self, now: float) -> float:
        """Jittered, so that one holder is first and its comparison puts the others off."""
        return now + limits.DHT_REPLICATE_S * (1.0 + self._core.rng.random())

    def compared(self, now: float, key: bytes) -> None:
        """Somebody who holds the same has come to compare: that counts for this node too."""
        self._core.held.put_off(key, self.next_time(now))

    def newcomer(self, now: float, newcomer: Contact) -> None:
        """Give a new contact the records that it is among the k nearest for.

        Only the nearest holder does, so that the newcomer gets one copy of each.
        """
        core = self._core
        for key in core.held.keys()[: limits.DHT_HANDOFF_KEYS_MAX]:
            target = id_from_bytes(key)
            nearest = core.table.closest(target, 1, newcomer.peer)
            if nearest and nearest[0].id ^ target < core.me.id ^ target:
                continue
            if newcomer in core.table.closest(target, limits.DHT_K):
                self.compare(now, newcomer, key)

    def left(self, now: float, gone: Contact) -> None:
        """A contact is lost: its copies are made anew soon, by one of the nearest that remain."""
        core = self._core
        for key in core.held.keys()[: limits.DHT_HANDOFF_KEYS_MAX]:
            target = id_from_bytes(key)
            near = core.table.closest(target, limits.DHT_K)
            if len(near) >= limits.DHT_K and gone.id ^ target > near[-1].id ^ target:
                continue  # it was not among the k nearest
            nearer = sum(c.id ^ target < core.me.id ^ target for c in near)
            if nearer < limits.DHT_PATHS:
                at = now + limits.DHT_LEFT_JITTER_S * core.rng.random()
                core.held.put_off(key, at)

    def repair(self, now: float, search: Search, records: list[SignedRecord]) -> None:
        """Give what a search has found to nearest nodes that answered without it."""
        core = self._core
        assert search.lookup is not None
        given = 0
        for contact in search.lookup.closest():
            token = search.tokens.get(contact.peer, b"")
            had = search.holdings.get(contact.peer)
            if not token or had is None or given >= limits.DHT_REPAIRS_MAX:
                continue
            for record in records:
                if had.get(record.publisher, (-1, 0, b"")) < rank(record):
                    core.ask_to_store(now, contact, record, token, self._heard(contact))
                    given += 1

    def compare(self, now: float, contact: Contact, key: bytes) -> None:
        """Bring this node and ``contact`` to the newer of each record under ``key``."""
        self._ask(now, _Sync(key, contact), b"")

    def _ask(self, now: float, sync: _Sync, after: bytes) -> None:
        core = self._core
        known = digest_of(core.held.under(sync.key, core.wall(now)))
        if not known:
            return  # expired meanwhile
        question = FindValue(core.requests.next_number(), sync.key, after, known)
        done = partial(self._answered, sync, after)
        core.requests.ask(now, sync.contact, question, Values, done)

    def _answered(self, sync: _Sync, after: bytes, now: float, reply: Reply | None) -> None:
        core = self._core
        core.heard(now, reply, contact=sync.contact)
        if not isinstance(reply, Values) or reply.same:
            return
        page = core.searches.checked(now, sync.contact, sync.key, after, reply)
        if page is None:
            return
        near = core.table.closest(id_from_bytes(sync.key), limits.DHT_K)
        far = self._is_far(sync.key, near)
        for record in page:
            sync.theirs[record.publisher] = record
            if not far:
                core.accept(now, record)
        if reply.more and len(sync.theirs) < limits.DHT_RECORDS_PER_KEY_MAX:
            self._ask(now, sync, reply.records[-1].publisher)
            return
        for record in core.held.under(sync.key, core.wall(now)):
            other = sync.theirs.get(record.publisher)
            if other is None or rank(other) < rank(record):
                heard = self._heard(sync.contact)
                core.ask_to_store(now, sync.contact, record, reply.token, heard)

    def _heard(self, contact: Contact) -> partial[None]:
        return partial(self._core.heard, contact=contact)


Holdings = dict[PeerId, dict[bytes, tuple[int, int, bytes]]]
"""Per node the rank of the record of each publisher that it answered with."""
