"""The serving side of fetches: looks up blobs and queues their chunks (spec 03b-fetch.md).

Runs on the loop thread. Small chunks go out on the control link behind all messages, large ones
over a bulk connection; neither is copied before it is sealed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

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


class Serving:
    """Answers fetch requests.

    ``send(peer, message, payload)`` queues on the open link, ``need_bulk`` has a bulk connection
    made if this side can, ``connections`` are those that are up.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        provide: Callable[[bytes], Blob | None],
        send: Callable[[PeerId, Message, bytes | memoryview], bool],
        need_bulk: Callable[[PeerId], None],
        connections: Callable[[PeerId], list[BulkConnection]],
    ) -> None:
        self._loop = loop
        self._provide = provide
        self._send = send
        self._need_bulk = need_bulk
        self._connections = connections
        self._jobs: dict[PeerId, dict[int, list[Job]]] = {}
        self._waiting: dict[PeerId, list[Job]] = {}
        self._answered: dict[PeerId, dict[int, BulkConnection]] = {}

    def wants_bulk(self, peer: PeerId) -> bool:
        """Jobs for this peer wait for a bulk connection."""
        return bool(self._waiting.get(peer))

    def receive(self, peer: PeerId, message: Message) -> None:
        """A request or its cancellation."""
        match message:
            case FetchRequest():
                self._serve(peer, message)
            case FetchCancel(request=request):
                for job in self._jobs.get(peer, {}).get(request, ()):
                    job.cancelled = True
                    if job in self._waiting.get(peer, ()):
                        self._waiting[peer].remove(job)
                        self._done(peer, job)

    def bulk_up(self, conn: BulkConnection) -> None:
        """A bulk connection is ready: what waits goes out."""
        waiting = self._waiting.pop(conn.peer, [])
        for job in waiting:
            self._assign(conn.peer, job)

    def bulk_lost(self, conn: BulkConnection) -> None:
        """Jobs that had begun are refused as lost; those that had not wait for a new connection."""
        for job in conn.unsent_jobs():
            if job.request not in self._jobs.get(conn.peer, {}):
                continue  # the peer itself is gone
            if job.started:
                self._refuse(conn.peer, job.request, "lost")
            else:
                self._assign(conn.peer, job)

    def no_bulk(self, peer: PeerId) -> None:
        """No bulk connection can be made to this peer."""
        for job in self._waiting.pop(peer, []):
            self._refuse(peer, job.request, "lost")

    def peer_lost(self, peer: PeerId) -> None:
        """The control link is gone: nobody waits for an answer."""
        self._waiting.pop(peer, None)
        self._answered.pop(peer, None)
        for jobs in self._jobs.pop(peer, {}).values():
            for job in jobs:
                job.cancelled = True

    # Internals --------------------------------------------------------------------------------

    def _serve(self, peer: PeerId, request: FetchRequest) -> None:
        number, first, count = request.request, request.first, request.count
        running = self._jobs.get(peer, {})
        answered = self._answered.get(peer, {}).get(number)
        if number in running or (answered is not None and answered.alive):
            return  # asked again after a lost connection, but this one was on another
        if len(running) >= _RUNNING_MAX:
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
        if not self._send(peer, accepted, b""):
            return  # the link is closing or its queue is full: the asker's deadline decides
        large: list[tuple[int, memoryview]] = []
        for index in range(first, first + count):
            chunk = blob.chunks[index]
            if chunk.nbytes > limits.INLINE_CHUNK_BYTES_MAX:
                large.append((index, chunk))
            elif not self._send(peer, FetchChunk(request=number, index=index), chunk):
                self._refuse(peer, number, "busy")
                return
        if large:
            self._queue(peer, number, large)

    def _queue(self, peer: PeerId, number: int, large: list[tuple[int, memoryview]]) -> None:
        streams = max(1, min(len(self._connections(peer)), len(large)))
        jobs = [
            Job(number, large[i::streams], lambda job: self._done_later(peer, job))
            for i in range(streams)
        ]
        self._jobs.setdefault(peer, {})[number] = jobs
        for job in jobs:
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
        running = self._jobs.get(peer, {})
        jobs = running.get(job.request, [])
        if job in jobs:
            jobs.remove(job)
            if job.conn is not None and not job.cancelled:
                answered = self._answered.setdefault(peer, {})
                answered[job.request] = job.conn
                if len(answered) > limits.FETCHES_IN_FLIGHT_PER_PEER_MAX:
                    del answered[next(iter(answered))]
            if not jobs:
                del running[job.request]
        if not running:
            self._jobs.pop(peer, None)

    def _refuse(self, peer: PeerId, number: int, code: str) -> None:
        for job in self._jobs.get(peer, {}).pop(number, ()):
            job.cancelled = True
        self._send(peer, FetchRefused(request=number, code=code), b"")
