"""Contacts worth remembering: for a restart, and for finding those whom a split has hidden.

The routing table drops whoever does not answer; this book does not. It holds peers that have
answered this node, by when they last did, and is what a node keeps across a restart.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from random import Random

import msgspec

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.dht.ids import Contact, subnets
from swarmtrain_protocols.messages.common import Addresses, Count, Key

VERSION = 1
_FRESH_S = 60.0
"""Answers within this time of the last noted one are not noted."""


class BookEntry(msgspec.Struct, frozen=True, array_like=True):
    """``seen_s``: Unix wall clock in whole seconds at the last answer."""

    peer: Key
    addresses: Addresses
    seen_s: Count


class _Page(msgspec.Struct, frozen=True, array_like=True):
    version: int
    run: bytes
    entries: tuple[BookEntry, ...]


_decoder = msgspec.msgpack.Decoder(_Page)


class ContactBook:
    """At most ``DHT_BOOK_MAX`` peers, the longest unseen first; few of one public subnet."""

    def __init__(self) -> None:
        self._entries: OrderedDict[PeerId, BookEntry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def seen(self, contact: Contact, wall_s: float) -> None:
        """``contact`` has answered a request at these addresses."""
        known = self._entries.get(contact.peer)
        unmoved = known is not None and known.addresses == contact.addresses
        if unmoved and known is not None and wall_s - known.seen_s < _FRESH_S:
            return
        if contact.addresses:
            self._put(BookEntry(contact.peer, contact.addresses, int(wall_s)))

    def forget(self, peer: PeerId) -> None:
        """Banned, or left for good."""
        self._entries.pop(peer, None)

    def entries(self) -> list[BookEntry]:
        """Latest seen first."""
        return list(reversed(self._entries.values()))

    def draw(self, rng: Random, count: int, missed: Callable[[Contact], bool]) -> list[Contact]:
        """At most ``count`` random ones of those that ``missed`` says are not in sight."""
        contacts = [Contact(PeerId(e.peer), e.addresses) for e in self._entries.values()]
        hidden = [contact for contact in contacts if missed(contact)]
        return rng.sample(hidden, min(count, len(hidden)))

    def purge(self, wall_s: float) -> None:
        """Forget whoever has not been seen for days."""
        while self._entries:
            oldest = next(iter(self._entries.values()))
            if oldest.seen_s > wall_s - limits.DHT_BOOK_AGE_S:
                return
            self._entries.popitem(last=False)

    def load(self, entries: Iterable[BookEntry], wall_s: float) -> None:
        """Take over what an earlier life knew; what this one has seen stays in front."""
        now = list(self._entries.values())
        self._entries.clear()
        for entry in sorted(entries, key=lambda e: (e.seen_s, e.peer)):
            self._put(entry)
        for entry in now:
            self._put(entry)
        self.purge(wall_s)

    def _put(self, entry: BookEntry) -> None:
        peer = PeerId(entry.peer)
        self._entries.pop(peer, None)
        for block in subnets(entry.addresses):
            same = [p for p, e in self._entries.items() if block in subnets(e.addresses)]
            if len(same) >= limits.DHT_PER_SUBNET_IN_TABLE_MAX:
                del self._entries[same[0]]
        self._entries[peer] = entry
        if len(self._entries) > limits.DHT_BOOK_MAX:
            self._entries.popitem(last=False)


def encode_book(run: bytes, entries: Iterable[BookEntry]) -> bytes:
    """The book as bytes for a file: MessagePack [version, run, [[peer, addresses, seen_s], …]]."""
    return msgspec.msgpack.encode(_Page(VERSION, run, tuple(entries)))


def decode_book(data: bytes, run: bytes) -> tuple[BookEntry, ...]:
    """The inverse.

    Raises:
        ValueError: not such bytes, another version or run, or too many entries.
    """
    if len(data) > limits.DHT_BOOK_BYTES_MAX:
        raise ValueError("larger than a list of contacts can be")
    try:
        page = _decoder.decode(data)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if page.version != VERSION:
        raise ValueError(f"version {page.version}, not {VERSION}")
    if page.run != run:
        raise ValueError("contacts of another run")
    if len(page.entries) > limits.DHT_BOOK_MAX:
        raise ValueError("too many contacts")
    return page.entries
