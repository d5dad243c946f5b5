"""The file of remembered contacts: a restarted site finds the network though its seeds are gone.

The book itself, its bounds and its form are specification 03. The file is a convenience: without
it, or if it cannot be read or written, the site goes on with the addresses of ticket and log.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from swarmtrain_peer.events import EventLog
from swarmtrain_peer.site import write_private
from swarmtrain_protocols import limits
from swarmtrain_protocols.dht.contacts import ContactBook, decode_book, encode_book
from swarmtrain_protocols.errors import SwarmError


class ContactsFile:
    """Loads a book at the start and keeps the file up to date with it. ``path`` None: no file."""

    def __init__(self, path: Path | None, run: bytes, events: EventLog) -> None:
        self._path = path
        self._run = run
        self._events = events
        self._saved: tuple[bytes, ...] = ()
        self._failed = False

    def load(self, book: ContactBook, wall_s: float) -> None:
        """Put into ``book`` what an earlier life knew."""
        if self._path is None:
            return
        try:
            data = self._path.read_bytes()
            book.load(decode_book(data, self._run), wall_s)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            self._complain(f"{self._path}: {error}")
        self._saved = _peers(book)

    def save(self, book: ContactBook) -> None:
        """Write the file if other peers are in the book than at the last time."""
        peers = _peers(book)
        if self._path is None or peers == self._saved:
            return
        self._write(self._path, encode_book(self._run, book.entries()), peers)

    async def keep(self, book: ContactBook) -> None:
        """Save now and then, until cancelled."""
        while True:
            await asyncio.sleep(limits.DHT_BOOK_SAVE_S)
            peers = _peers(book)
            if self._path is not None and peers != self._saved:
                data = encode_book(self._run, book.entries())
                await asyncio.to_thread(self._write, self._path, data, peers)

    def _write(self, path: Path, data: bytes, peers: tuple[bytes, ...]) -> None:
        try:
            write_private(path, data)
        except SwarmError as error:
            self._complain(f"{error.what}: {error.why}")
            return
        self._failed = False
        self._saved = peers

    def _complain(self, reason: str) -> None:
        if not self._failed:  # once, until it works again
            self._failed = True
            self._events.emit("contacts_unreadable", reason=reason)


def _peers(book: ContactBook) -> tuple[bytes, ...]:
    return tuple(sorted(entry.peer for entry in book.entries()))
