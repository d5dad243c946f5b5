"""Fetches: chunks of a blob, named by its root, into the caller's memory (spec 09-fetch.md).

The asking side is here (``Fetches``), the serving side in ``serving.py``, connections in
``bulk.py``. Everything runs on the loop thread except what says otherwise: frames are received,
decrypted and hashed on the pool's threads, straight into the destinations.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from swarmtrain_peer.bulk import BulkConnection, BulkPool
from swarmtrain_protocols import limits
from swarmtrain_protocols.bulklink import Header
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.errors import LocalProtocolError, PeerFault
from swarmtrain_protocols.merkle import leaf_hash, verify_range
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.messages.fetch import (
    FetchAccepted,
    FetchCancel,
    FetchChunk,
    FetchRefused,
    FetchRequest,
)
from swarmtrain_protocols.packing import unpack

_LEAVES_ON_LOOP_MAX = 64
"""More leaves than that are checked on a thread: the loop must not stall for a tree."""
_ASK_MAX = 8
"""Times a request is sent if bulk connections are lost before anything came over them."""


class FetchHandler(Protocol):
    """Who asked: exactly one of the two is called per fetch that is not cancelled."""

    def fetched(self, ticket: int) -> None: ...

    def fetch_failed(self, ticket: int, reason: str) -> None: ...

    def peer_fault(self, peer: PeerId | None, code: str, why: str) -> None: ...


class Fetch:
    """One fetch. Chunk state is shared with the pool's threads, under ``lock``."""

    def __init__(
        self,
        ticket: int,
        request: int,
        peer: PeerId,
        root: bytes,
        first: int,
        total: int,
        destinations: Sequence[memoryview],
        hashes: int = 0,
    ) -> None:
        count = hashes or len(destinations)
        self.count, self.only_hashes = count, bool(hashes)
        self.ticket, self.request, self.peer, self.root = ticket, request, peer, root
        self.first, self.total, self.destinations = first, total, destinations
        self.uses_bulk = any(d.nbytes > limits.INLINE_CHUNK_BYTES_MAX for d in destinations)
        self.asked = 0
        self.spoilt = False
        self.timer: asyncio.TimerHandle | None = None
        self.lock = threading.Condition()
        self.active = True
        self.touched: list[BulkConnection] = []
        self._writers = 0
        self._filled = [0] * count
        self._packed: dict[int, bytearray] = {}
        self._hashes: list[bytes | None] = [None] * count
        self._hashes_missing = 0 if hashes else count
        self._leaves: tuple[bytes, ...] | None = None

    def begin(self, conn: BulkConnection, header: Header) -> memoryview | None:
        """Any thread: where a frame goes; None once nobody wants it any more.

        Raises:
            PeerFault: ``malformed``: not the next bytes of a chunk that was asked for.
        """
        index = header.chunk - self.first
        with self.lock:
            if not self.active:
                return None
            if conn not in self.touched:
                self.touched.append(conn)
            if not 0 <= index < len(self.destinations):
                self.spoilt = True
                raise PeerFault("malformed", f"chunk {header.chunk} was not asked for")
            destination = self._place(index, header)
            if destination is None or header.offset < self._filled[index]:
                return None  # sent twice: the other side could not know that it had arrived
            if header.chunk_bytes != destination.nbytes or header.offset > self._filled[index]:
                self.spoilt = True
                raise PeerFault("malformed", f"chunk {header.chunk} of wrong size or order")
            self._writers += 1
            self._filled[index] += header.nbytes
        return destination[header.offset : header.offset + header.nbytes]

    def _place(self, index: int, header: Header) -> memoryview | None:
        """Where a chunk's bytes go in the form in which they come; None in another than before.

        A packed chunk is smaller than the chunk, so no more memory is taken than was asked for.
        """
        destination, packed = self.destinations[index], self._packed.get(index)
        if self._filled[index] and header.packed != (packed is not None):
            return None
        if not header.packed:
            return destination
        if packed is None and header.chunk_bytes < destination.nbytes:
            packed = self._packed[index] = bytearray(header.chunk_bytes)
        return memoryview(b"" if packed is None else packed)

    def end(self, header: Header, ok: bool) -> bool:
        """Any thread: the frame is written. True if it completed its chunk.

        Raises:
            PeerFault: ``malformed``: what came packed does not unpack to the chunk's size.
        """
        ok = ok and header.offset + header.nbytes == header.chunk_bytes
        index = header.chunk - self.first
        try:
            if ok and header.packed:
                unpack(self._packed[index], self.destinations[index])
                self._packed[index] = bytearray()  # its form is remembered, its bytes are not
        except PeerFault:
            self.spoilt = True
            raise
        finally:
            with self.lock:
                self._writers -= 1
                self.lock.notify_all()
        return ok and self.active

    def put(self, index: int, payload: bytes) -> bool:
        """Loop thread: a chunk from the control link; False if it is not one that was asked for."""
        if not 0 <= index < len(self.destinations):
            return False
        destination = self.destinations[index]
        if destination.nbytes != len(payload):
            return False
        if self._filled[index]:
            return True  # sent twice, as in ``begin``
        destination[:] = payload
        self._filled[index] = len(payload)
        return True

    def add_hash(self, index: int, digest: bytes) -> bool:
        """Any thread: True if with it everything is there (``verdict`` is final)."""
        with self.lock:
            if self._hashes[index] is None:
                self._hashes[index] = digest
                self._hashes_missing -= 1
            return self.complete

    def add_leaves(self, leaves: tuple[bytes, ...]) -> bool:
        """Any thread: proven leaves; True if with them everything is there."""
        with self.lock:
            self._leaves = leaves
            return self.complete

    @property
    def leaves(self) -> tuple[bytes, ...]:
        """Leaf hashes of the chunks, proven against the root; empty before that."""
        return self._leaves or ()

    @property
    def complete(self) -> bool:
        """All chunks are hashed and the leaves are proven, or a chunk is already known wrong."""
        return self._leaves is not None and (not self._hashes_missing or not self.matches)

    @property
    def matches(self) -> bool:
        """No chunk so far differs from its leaf."""
        assert self._leaves is not None
        return all(
            h is None or h == leaf for h, leaf in zip(self._hashes, self._leaves, strict=True)
        )

    def stop(self) -> None:
        """No thread writes to the destinations once this returns (microseconds)."""
        with self.lock:
            self.active = False
            while self._writers:
                self.lock.wait()


class Fetches:
    """The asking side.

    ``send(peer, message, dial)`` is the transport's, ``need_bulk`` has a bulk connection made.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pool: BulkPool,
        handler: FetchHandler,
        send: Callable[[PeerId, Message, bool], bool],
        need_bulk: Callable[[PeerId], None],
    ) -> None:
        self._loop = loop
        self._pool = pool
        self._handler = handler
        self._send = send
        self._need_bulk = need_bulk
        self._next_request = 0
        self._by_request: dict[int, Fetch] = {}
        self._by_ticket: dict[int, Fetch] = {}
        self._active: dict[PeerId, int] = {}
        self._queues: dict[PeerId, deque[Fetch]] = {}
        self._repeat_soon: set[PeerId] = set()
        self.on_leaves: Callable[[int, int, tuple[bytes, ...]], None] = lambda t, f, leaves: None
        """Hears (ticket, first chunk, leaf hashes) as soon as they are proven."""
        self.proven: tuple[bytes, ...] = ()
        """Leaf hashes of the fetch that ``handler.fetched`` is being told of."""

    def fetch(
        self,
        ticket: int,
        peer: PeerId,
        root: bytes,
        first: int,
        total: int,
        destinations: Sequence[memoryview],
        timeout_s: float,
        *,
        hashes: int = 0,
    ) -> None:
        """See ``Transport.fetch``; ``hashes`` > 0: that many leaf hashes and no chunks."""
        if ticket in self._by_ticket:
            raise LocalProtocolError(f"ticket {ticket} is in use")
        count = hashes or len(destinations)
        if not 1 <= count <= limits.CHUNKS_PER_FETCH_MAX:
            raise LocalProtocolError(f"{count} chunks in one fetch")
        if first < 0 or first + count > total or len(root) != 32:
            raise LocalProtocolError("the range is outside of the blob")
        views = [memoryview(d).cast("B") for d in destinations]
        if any(view.readonly or not view.nbytes for view in views):
            raise LocalProtocolError("a destination is read-only or empty")
        queue = self._queues.setdefault(peer, deque())
        if len(queue) >= limits.FETCHES_QUEUED_PER_PEER_MAX:
            raise LocalProtocolError("too many fetches wait for this peer")
        self._next_request += 1
        number = self._next_request
        fetch = Fetch(ticket, number, peer, root, first, total, views, hashes)
        self._by_request[fetch.request] = fetch
        self._by_ticket[ticket] = fetch
        fetch.timer = self._loop.call_later(timeout_s, self._fail, fetch, "timeout")
        queue.append(fetch)
        self._start(peer)

    def cancel(self, ticket: int) -> None:
        """Forget a fetch; unknown tickets are ignored, for the answer may have been on its way."""
        fetch = self._by_ticket.get(ticket)
        if fetch is not None:
            self._forget(fetch)

    def wants_bulk(self, peer: PeerId) -> bool:
        """A fetch from this peer waits for chunks that need a bulk connection."""
        return any(f.peer == peer and f.uses_bulk and f.asked for f in self._by_request.values())

    def peer_lost(self, peer: PeerId) -> None:
        """The control link is gone, or never came about."""
        lost = [f for f in self._by_request.values() if f.peer == peer]
        for fetch in sorted(lost, key=lambda f: f.asked):  # those that wait first: none may start
            self._fail(fetch, "disconnected")

    def bulk_lost(self, conn: BulkConnection, faulty: bool) -> None:
        """A bulk connection ended: what came over it in part has failed.

        What had not begun is asked for again: its answer may have been on that connection.
        """
        for fetch in [f for f in self._by_request.values() if conn in f.touched]:
            self._fail(fetch, "corrupt" if faulty else "disconnected")
        self.ask_again(conn.peer)

    def ask_again(self, peer: PeerId) -> None:
        """Soon, once for all losses of this turn: repeat requests of which nothing has come."""
        if peer not in self._repeat_soon:
            self._repeat_soon.add(peer)
            self._loop.call_soon(self._repeat_all, peer)

    def _repeat_all(self, peer: PeerId) -> None:
        self._repeat_soon.discard(peer)
        for fetch in [f for f in self._by_request.values() if f.peer == peer and f.asked]:
            if fetch.uses_bulk and not fetch.touched:
                self._repeat(fetch)

    def no_bulk(self, peer: PeerId) -> None:
        """No bulk connection to this peer can be made."""
        for fetch in [f for f in self._by_request.values() if f.peer == peer and f.uses_bulk]:
            self._fail(fetch, "disconnected")

    def receive(self, peer: PeerId, message: Message, payload: bytes) -> None:
        """An answer of a provider."""
        match message:
            case FetchAccepted(request=request):
                if fetch := self._of(peer, request):
                    self._accepted(fetch, message)
            case FetchRefused(request=request, code=code):
                if fetch := self._of(peer, request):
                    if code == "lost":
                        self._repeat(fetch)
                    else:
                        self._fail(fetch, f"refused:{code}")
            case FetchChunk(request=request, index=index):
                if fetch := self._of(peer, request):
                    self._inline(fetch, index - fetch.first, payload)

    # Internals --------------------------------------------------------------------------------

    def _of(self, peer: PeerId, request: int) -> Fetch | None:
        fetch = self._by_request.get(request)
        return fetch if fetch is not None and fetch.peer == peer else None

    def _ask(self, fetch: Fetch, dial: bool) -> bool:
        fetch.asked += 1
        request = FetchRequest(
            request=fetch.request,
            root=fetch.root,
            first=fetch.first,
            count=fetch.count,
            packed=True,
            hashes=fetch.only_hashes,
        )
        return self._send(fetch.peer, request, dial)

    def _repeat(self, fetch: Fetch) -> None:
        if fetch.touched or fetch.asked >= _ASK_MAX:
            self._fail(fetch, "disconnected")
        else:
            self._ask(fetch, dial=False)
            self._need_bulk(fetch.peer)

    def _start(self, peer: PeerId) -> None:
        queue = self._queues.get(peer)
        while queue and self._active.get(peer, 0) < limits.FETCHES_IN_FLIGHT_PER_PEER_MAX:
            fetch = queue.popleft()
            self._active[peer] = self._active.get(peer, 0) + 1
            if not self._ask(fetch, dial=True):
                self._loop.call_soon(self._fail, fetch, "disconnected")
            elif fetch.uses_bulk:
                self._need_bulk(peer)
        if not queue:
            self._queues.pop(peer, None)

    def _accepted(self, fetch: Fetch, accepted: FetchAccepted) -> None:
        if accepted.total != fetch.total or len(accepted.leaves) != fetch.count:
            self._corrupt(fetch, "a blob of another shape")
        elif len(accepted.leaves) <= _LEAVES_ON_LOOP_MAX:
            self._proven(fetch, accepted, self._check(fetch, accepted))
        else:
            self._pool.submit(
                lambda: self._later(self._proven, fetch, accepted, self._check(fetch, accepted))
            )

    @staticmethod
    def _check(fetch: Fetch, accepted: FetchAccepted) -> bool:
        return verify_range(fetch.root, fetch.total, fetch.first, accepted.leaves, accepted.proof)

    def _proven(self, fetch: Fetch, accepted: FetchAccepted, proven: bool) -> None:
        if not proven:
            self._corrupt(fetch, "the leaves do not prove")
            return
        if fetch.active:
            self.on_leaves(fetch.ticket, fetch.first, accepted.leaves)
        if fetch.active and fetch.add_leaves(accepted.leaves):
            self._finish(fetch)

    def _inline(self, fetch: Fetch, index: int, payload: bytes) -> None:
        if not fetch.put(index, payload):
            self._corrupt(fetch, "a chunk of wrong size or order")
        elif fetch.add_hash(index, leaf_hash(payload)):
            self._finish(fetch)

    def begin(self, conn: BulkConnection, header: Header) -> memoryview | None:
        """Pool thread: where a frame of a bulk connection goes."""
        fetch = self._of(conn.peer, header.request)
        return None if fetch is None else fetch.begin(conn, header)

    def end(self, conn: BulkConnection, header: Header, ok: bool) -> None:
        """Pool thread: a frame is in place; hashes the chunk if it is complete."""
        fetch = self._of(conn.peer, header.request)
        if fetch is not None and fetch.end(header, ok):
            index = header.chunk - fetch.first
            if fetch.add_hash(index, leaf_hash(fetch.destinations[index])):
                self._later(self._finish, fetch)

    def _later(self, call: Callable[..., None], *args: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *args)

    def _finish(self, fetch: Fetch) -> None:
        if not fetch.active:
            return
        if not fetch.matches:
            self._corrupt(fetch, "a chunk does not match its hash")
            return
        self._forget(fetch)
        self.proven = fetch.leaves
        self._handler.fetched(fetch.ticket)

    def _corrupt(self, fetch: Fetch, why: str) -> None:
        if fetch.active:
            self._handler.peer_fault(fetch.peer, "corrupt", why)
            self._fail(fetch, "corrupt")

    def _fail(self, fetch: Fetch, reason: str) -> None:
        if fetch.active:
            self._forget(fetch)
            self._handler.fetch_failed(fetch.ticket, "corrupt" if fetch.spoilt else reason)

    def _forget(self, fetch: Fetch) -> None:
        complete = fetch.complete
        fetch.stop()
        if fetch.timer is not None:
            fetch.timer.cancel()
        del self._by_request[fetch.request]
        del self._by_ticket[fetch.ticket]
        if not fetch.asked:
            self._queues[fetch.peer].remove(fetch)
            return
        if not complete:
            self._send(fetch.peer, FetchCancel(request=fetch.request), False)
        self._active[fetch.peer] -= 1
        if not self._active[fetch.peer]:
            del self._active[fetch.peer]
        self._start(fetch.peer)
