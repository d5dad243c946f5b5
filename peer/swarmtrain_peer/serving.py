"""The serving side of fetches: looks up blobs and queues their chunks (spec 09-fetch.md).

Runs on the loop thread. Small chunks go out on the control link behind all messages, large ones
over a bulk connection; neither is copied before it is sealed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from swarmtrain_peer import host
from swarmtrain_peer.bulk import BulkConnection, Job
from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.messages.fetch import (
    FetchAccepted,
    FetchCancel,
    FetchChunk,
    FetchRefused,
    FetchRequest,
)

_RUNNING_MAX = 2 * limits.FETCHES_IN_FLIGHT_PER_PEER_MAX
"""The asker may hold all chunks, and ask for more, before this side has noted the last as sent."""


class Connections(Protocol):
    """Bulk connections, as ``BulkLinks`` has them."""

    def need(self, peer: PeerId) -> None:
        """Have one made if this side can."""

    def connections(self, peer: PeerId) -> list[BulkConnection]:
        """Those that are up."""


class _Served:
    """One request: its jobs, kept for a while after they are done."""

    __slots__ = ("begin_s", "jobs", "root", "unfinished")

    def __init__(self, root: bytes) -> None:
        self.root = root
        self.begin_s = host.mono_s()
        self.jobs: list[Job] = []
        self.unfinished = 0

    @property
    def comes(self) -> bool:
        """All of it is, or was, on connections that live, or waits for one."""
        return all(job.conn is None or job.conn.alive for job in self.jobs)


class Serving:
    """Answers fetch requests.

    ``send(peer, message, payload)`` queues on the open link, ``bulk`` has connections made and
    knows which are up, ``sent(root, nbytes, begin_s)`` hears what the kernel has taken,
    ``yields(root)``: those who fetch it are catching up, and rounds go first.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        provide: Callable[[bytes], Blob | None],
        send: Callable[[PeerId, Message, bytes | memoryview], bool],
        bulk: Connections,
        sent: Callable[[bytes, int, float], None],
        yields: Callable[[bytes], bool] = lambda root: False,
    ) -> None:
        self._loop = loop
        self._provide = provide
        self._send = send
        self._need_bulk = bulk.need
        self._connections = bulk.connections
        self._sent = sent
        self._yields = yields
        self._served: dict[PeerId, dict[int, _Served]] = {}
        self._waiting: dict[PeerId, list[Job]] = {}

    def wants_bulk(self, peer: PeerId) -> bool:
        """Jobs for this peer wait for a bulk connection."""
        return bool(self._waiting.get(peer))

    def receive(self, peer: PeerId, message: Message) -> None:
        """A request or its cancellation."""
        match message:
            case FetchRequest():
                self._serve(peer, message)
            case FetchCancel(request=request):
                self._drop(peer, request)

    def bulk_up(self, conn: BulkConnection) -> None:
        """A bulk connection is ready: what waits goes out."""
        waiting = self._waiting.pop(conn.peer, [])
        for job in waiting:
            self._assign(conn.peer, job)

    def bulk_lost(self, conn: BulkConnection) -> None:
        """Jobs that had begun are refused as lost; those that had not wait for a new connection."""
        for job in conn.unsent_jobs():
            served = self._served.get(conn.peer, {}).get(job.request)
            if served is None or job not in served.jobs:
                continue  # cancelled, asked for again, or the peer itself is gone
            if job.started:
                self._refuse(conn.peer, job.request, "lost")
            else:
                self._assign(conn.peer, job)

    def no_bulk(self, peer: PeerId) -> None:
        """No bulk connection can be made to this peer."""
        for job in list(self._waiting.get(peer, ())):
            self._refuse(peer, job.request, "lost")

    def peer_lost(self, peer: PeerId) -> None:
        """The control link is gone: nobody waits for an answer."""
        self._waiting.pop(peer, None)
        for served in self._served.pop(peer, {}).values():
            for job in served.jobs:
                job.cancelled = True

    def running(self, peer: PeerId) -> int:
        """Requests whose chunks are not all handed to the kernel."""
        return sum(served.unfinished > 0 for served in self._served.get(peer, {}).values())

    # Internals --------------------------------------------------------------------------------

    def _serve(self, peer: PeerId, request: FetchRequest) -> None:
        number, first, count = request.request, request.first, request.count
        before = self._served.get(peer, {}).get(number)
        if before is not None and before.comes:
            return  # asked again after a lost connection, but this one is not on it
        self._drop(peer, number)
        if self.running(peer) >= _RUNNING_MAX:
            self._refuse(peer, number, "busy")
            return
        blob = self._provide(request.root)
        if blob is None:
            self._refuse(peer, number, "unknown")
            return
        total = len(blob.chunks)
        if not 1 <= count <= limits.CHUNKS_PER_FETCH_MAX or first + count > total:
            self._refuse(peer, number, "range")
            return
        leaves = blob.leaves[first : first + count]
        accepted = FetchAccepted(
            request=number, total=total, leaves=leaves, proof=blob.proof(first, count)
        )
        if not self._send(peer, accepted, b"") or request.hashes:
            return  # the link is closing or its queue is full: the asker's deadline decides
        large: list[tuple[int, memoryview]] = []
        for index in range(first, first + count):
            chunk = blob.chunks[index]
            if chunk.nbytes > limits.INLINE_CHUNK_BYTES_MAX:
                large.append((index, chunk))
            elif not self._send(peer, FetchChunk(request=number, index=index), chunk):
                self._refuse(peer, number, "busy")
                return
            else:
                self._sent(request.root, chunk.nbytes, host.mono_s())
        if large:
            self._queue(peer, request, large, _Served(request.root))

    def _queue(
        self,
        peer: PeerId,
        request: FetchRequest,
        large: list[tuple[int, memoryview]],
        served: _Served,
    ) -> None:
        connections = sorted(self._connections(peer), key=lambda conn: conn.queued_bytes)
        streams = max(1, min(len(connections), len(large)))
        number, may_pack, yields = request.request, request.packed, self._yields(request.root)
        self._served.setdefault(peer, {})[number] = served

        def done(job: Job) -> None:
            self._done_later(peer, job)

        for i in range(streams):
            job = Job(number, large[i::streams], done, may_pack=may_pack, yields=yields)
            served.jobs.append(job)
            served.unfinished += 1
        for i, job in enumerate(served.jobs):
            if i >= len(connections) or not connections[i].send(job):
                self._assign(peer, job)

    def _assign(self, peer: PeerId, job: Job) -> None:
        connections = self._connections(peer)
        for conn in sorted(connections, key=lambda c: c.queued_bytes):
            if conn.send(job):
                return
        self._waiting.setdefault(peer, []).append(job)
        self._need_bulk(peer)

    def _done_later(self, peer: PeerId, job: Job) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._done, peer, job)

    def _done(self, peer: PeerId, job: Job) -> None:
        all_served = self._served.get(peer, {})
        served = all_served.get(job.request)
        if served is None or job not in served.jobs:
            return
        served.unfinished -= 1
        self._sent(served.root, job.nbytes, served.begin_s)
        if len(all_served) > _RUNNING_MAX:  # more than can be asked for again: forget the oldest
            done = next((n for n, s in all_served.items() if not s.unfinished), None)
            if done is not None:
                del all_served[done]

    def _drop(self, peer: PeerId, number: int) -> None:
        """Nobody wants this answer any more."""
        served = self._served.get(peer, {}).pop(number, None)
        for job in served.jobs if served else ():
            job.cancelled = True
            if job in self._waiting.get(peer, ()):
                self._waiting[peer].remove(job)

    def _refuse(self, peer: PeerId, number: int, code: str) -> None:
        self._drop(peer, number)
        self._send(peer, FetchRefused(request=number, code=code), b"")
