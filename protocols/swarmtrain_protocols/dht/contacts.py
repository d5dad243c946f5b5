"""Contacts worth remembering: for a restart, and for finding those whom a split has hidden.

The routing table drops whoever does not answer; this book does not. It holds peers that have
answered this node, by when they last did, and is what a node keeps across a restart.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
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
        self._blocks: dict[str, int] = {}
        """Entries per public subnet."""
        self._hidden: dict[PeerId, None] = {}
        """Entries of an earlier life, and those that did not answer lately."""

    def __len__(self) -> int:
        return len(self._entries)

    def seen(self, contact: Contact, wall_s: float) -> None:
        """``contact`` has answered a request at these addresses."""
        self._hidden.pop(contact.peer, None)
        known = self._entries.get(contact.peer)
        unmoved = known is not None and known.addresses == contact.addresses
        if unmoved and known is not None and wall_s - known.seen_s < _FRESH_S:
            return
        if contact.addresses:
            self._put(BookEntry(contact.peer, contact.addresses, int(wall_s)))

    def lost(self, peer: PeerId) -> None:
        """``peer`` does not answer any more; it may be behind a split of the network."""
        if peer in self._entries:
            self._hidden[peer] = None

    def forget(self, peer: PeerId) -> None:
        """Banned, or left for good."""
        self._take_out(peer)
        self._hidden.pop(peer, None)

    def entries(self) -> list[BookEntry]:
        """Latest seen first."""
        return list(reversed(self._entries.values()))

    def draw(self, rng: Random, count: int) -> list[Contact]:
        """At most ``count`` random ones of those that are out of sight."""
        drawn = rng.sample(list(self._hidden), min(count, len(self._hidden)))
        return [Contact(peer, self._entries[peer].addresses) for peer in drawn]

    def purge(self, wall_s: float) -> None:
        """Forget whoever has not been seen for days."""
        while self._entries:
            oldest = next(iter(self._entries.values()))
            if oldest.seen_s > wall_s - limits.DHT_BOOK_AGE_S:
                return
            self.forget(PeerId(oldest.peer))

    def load(self, entries: Iterable[BookEntry], wall_s: float) -> None:
        """Take over what an earlier life knew; what this one has seen stays in front."""
        now = list(self._entries.values())
        hidden = list(self._hidden)
        self._entries.clear()
        self._blocks.clear()
        for entry in sorted(entries, key=lambda e: (e.seen_s, e.peer)):
            self._put(entry)
        self._hidden = dict.fromkeys(self._entries)
        for entry in now:
            self._hidden.pop(PeerId(entry.peer), None)
            self._put(entry)
        for peer in hidden:
            self.lost(peer)
        self.purge(wall_s)

    def _put(self, entry: BookEntry) -> None:
        peer = PeerId(entry.peer)
        self._take_out(peer)
        for block in subnets(entry.addresses):
            if self._blocks.get(block, 0) >= limits.DHT_PER_SUBNET_IN_TABLE_MAX:
                oldest = next(p for p, e in self._entries.items() if block in subnets(e.addresses))
                self.forget(oldest)
            self._blocks[block] = self._blocks.get(block, 0) + 1
        self._entries[peer] = entry
        if len(self._entries) > limits.DHT_BOOK_MAX:
            self.forget(next(iter(self._entries)))

    def _take_out(self, peer: PeerId) -> None:
        entry = self._entries.pop(peer, None)
        for block in subnets(entry.addresses) if entry is not None else ():
            self._blocks[block] -= 1
            if not self._blocks[block]:
                del self._blocks[block]


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
