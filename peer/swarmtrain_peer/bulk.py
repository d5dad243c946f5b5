"""Bulk connections: non-blocking sockets served by one fixed pool of threads.

Threads share one poller in one-shot mode, so each readiness goes to exactly one thread and a
connection needs no thread of its own. Bytes are received into a frame buffer and decrypted
straight into the destination; system calls, AES and hashes release the interpreter lock. The event
loop sees only whole chunks.

Per connection there is at most one thread reading and one writing at a time; each half has a file
descriptor of its own (the second a duplicate), so that they are armed separately.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from swarmtrain_peer import host
from swarmtrain_peer.buffers import Buffers
from swarmtrain_peer.caps import Cap, Queue
from swarmtrain_peer.donorshare import FRAME_BYTES, SHARE, DonorShare, unsent_bytes
from swarmtrain_peer.linkrate import LinkRate
from swarmtrain_peer.poller import Poller, make_poller
from swarmtrain_peer.workers import Broken, only_told, start_thread
from swarmtrain_protocols import bulklink, limits
from swarmtrain_protocols.bulklink import BulkKeys, Header
from swarmtrain_protocols.core import PeerId, short_id
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.noise import TAG_BYTES

_TURN_BYTES = 8 * limits.FRAME_BYTES_BULK_MAX
"""A connection gives its thread back after that many bytes, so that others get their turn."""


class Sink(Protocol):
    """Where received frames go; called on the pool's threads."""

    def begin(self, conn: BulkConnection, header: Header) -> memoryview | None:
        """Memory for the plaintext, None to discard it; a PeerFault ends the connection."""

    def end(self, conn: BulkConnection, header: Header, ok: bool) -> None:
        """The memory that ``begin`` gave is written (or, not ok, spoilt)."""

    def closed(self, conn: BulkConnection, fault: PeerFault | None) -> None:
        """The connection is gone; nothing more comes of it."""


class Job:
    """Chunks of one request to be sent; ``done`` is called on a pool thread.

    ``may_pack``: the asker takes packed chunks too. ``yields``: it is for somebody who is catching
    up; rounds go first, and it has a share of the uplink only.
    """

    __slots__ = (
        "cancelled",
        "chunks",
        "conn",
        "done",
        "may_pack",
        "nbytes",
        "offset",
        "packed",
        "request",
        "started",
        "yields",
    )

    def __init__(
        self,
        request: int,
        chunks: list[tuple[int, memoryview]],
        done: Callable[[Job], None],
        *,
        may_pack: bool = False,
        yields: bool = False,
    ) -> None:
        self.request = request
        self.chunks = deque(chunks)
        self.nbytes = sum(chunk.nbytes for _, chunk in chunks)
        self.done = done
        self.may_pack = may_pack
        self.yields = yields
        self.offset = 0
        """Bytes of the first chunk that are sent."""
        self.packed: bytes | None = None
        """The first chunk, packed."""
        self.conn: BulkConnection | None = None
        self.started = False
        self.cancelled = False


class BulkConnection:
    """One established bulk connection to an authenticated peer."""

    def __init__(
        self,
        pool: BulkPool,
        sock: socket.socket,
        peer: PeerId,
        keys: BulkKeys,
        sink: Sink,
        name: bytes,
    ) -> None:
        self.peer = peer
        self.name = name
        self.received_bytes = 0
        self.sent_bytes = 0
        self.queued_bytes = 0
        self.rate = LinkRate()
        self._pool = pool
        self._sock = sock
        self._keys = keys
        self._sink = sink
        self._lock = threading.Lock()
        self._jobs: deque[Job] = deque()
        self._yielding: deque[Job] = deque()
        self._out_yields = False
        self._held_by: Queue = pool.up_queue
        self._in_line = False
        """It waits for one of the queues."""
        self._reading = self._writing = False
        self._write_wanted = False
        self._read_held = self._write_held = False
        self._dead = self._finished = False
        self._fault: PeerFault | None = None
        self._head = bytearray(bulklink.HEADER_BYTES)
        self._body: memoryview | None = None
        self._header: Header | None = None
        self._got = 0
        self._out: memoryview | None = None
        self._out_at = 0
        self._out_end = 0
        sock.setblocking(False)
        self.read_fd = sock.fileno()
        self.write_fd = os.dup(self.read_fd)

    @property
    def idle(self) -> bool:
        """Nothing is queued to be sent."""
        return not self._jobs and not self._yielding

    def round_bytes_wait(self) -> bool:
        """See ``donorshare.Sender``."""
        if self._dead or self._finished:
            return False
        if self._jobs:
            return True
        return not self._out_yields and unsent_bytes(self._sock) > 0

    @property
    def alive(self) -> bool:
        return not self._dead

    def progress(self) -> tuple[int, int]:
        """See ``donorshare.Sender``."""
        return self.sent_bytes, 0 if self._finished else unsent_bytes(self._sock)

    def send(self, job: Job) -> bool:
        """Queue a job; False if the connection is gone. Any thread."""
        with self._lock:
            if self._dead or self._finished:
                return False
            job.conn = self
            (self._yielding if job.yields else self._jobs).append(job)
            self.queued_bytes += job.nbytes
            if not job.yields:
                self._pool.share.busy(self)
            held = self._write_held and self._held_by is self._pool.share_queue
            if self._writing or (self._write_wanted and (job.yields or not held)):
                return True
            self._write_wanted = True
            self._pool.arm_write(self)
        return True

    def abandon(self) -> None:
        """End the connection: nothing begins after this call, ``Sink.closed`` follows."""
        with self._lock, contextlib.suppress(OSError):  # already reset by the other side
            self._dead = True
            if not self._finished:  # then the number may be somebody else's
                self._sock.shutdown(socket.SHUT_RDWR)

    def unsent_jobs(self) -> list[Job]:
        """Jobs that were not completely handed to the kernel. After ``Sink.closed``."""
        return [*self._jobs, *self._yielding]

    # On pool threads --------------------------------------------------------------------------

    def on_readable(self) -> None:
        """Receive until there is nothing more, the turn is over or the connection ends."""
        with self._lock:
            if self._reading or self._finished:
                return  # a stale wake-up of a descriptor that was used before
            self._reading = True
        alive = False
        try:
            alive = self._receive()
        except PeerFault as fault:
            fault.peer = self.peer
            self._fault = fault
        except OSError:
            pass  # reset by the other side: the same as its end
        with self._lock:
            self._reading = False
            if alive and not self._dead:
                if self._read_held:
                    self._pool.down_queue.wait(self._read_on)
                else:
                    self._pool.arm_read(self)
                return
        self.abandon()
        self._finish()

    def _read_on(self) -> None:
        """The cap lets bytes pass again; a connection that died meanwhile finds its end so."""
        with self._lock:
            if not self._finished:
                self._pool.arm_read(self)

    def _receive(self) -> bool:
        budget = _TURN_BYTES
        self._read_held = False
        head = memoryview(self._head)
        while budget > 0 and not self._dead:
            header = self._header
            view = head
            if header is not None:
                self._body = self._body or self._pool.buffers.lend()
                view = self._body[: header.nbytes + TAG_BYTES]
            allowed = self._pool.down.take(len(view) - self._got)
            if not allowed:
                self._read_held = True
                return True
            count = 0
            try:
                count = self._sock.recv_into(view[self._got : self._got + allowed])
            except BlockingIOError:
                return True
            finally:
                self._pool.down.charge(count - allowed)
            if count == 0:
                return False
            self._got += count
            self.received_bytes += count
            budget -= count
            if self._got < len(view):
                continue
            self._got = 0
            if header is None:
                self._header = bulklink.parse_header(self._head)
            else:
                self._header = None
                self._open(header, view)
                self._pool.buffers.back(self._body)
                self._body = None
        return True

    def _open(self, header: Header, sealed: memoryview) -> None:
        with self._lock:
            if self._dead:
                return  # bytes that were on their way when it was given up
            out = self._sink.begin(self, header)
        into = memoryview(bytearray(header.nbytes)) if out is None else out
        ok = False
        try:
            self._keys.receiver.open(sealed, bytes(self._head), into)
            ok = True
        finally:
            if out is not None:
                self._sink.end(self, header, ok)

    def on_writable(self) -> None:
        """Send until the kernel takes no more, the turn is over or the queue is empty."""
        with self._lock:
            self._write_wanted = False
            if self._writing or self._finished:
                return
            self._writing = True
        more = False
        try:
            more = self._transmit()
        except OSError:
            self.abandon()
        with self._lock:
            self._writing = False
            again = (more or not self.idle) and not self._dead and not self._write_wanted
            if again:
                self._write_wanted = True
                if self._write_held and not (self._out_yields and self._jobs):
                    if not self._in_line:
                        self._in_line = True
                        self._held_by.wait(self._write_on)
                else:
                    self._pool.arm_write(self)
        self._finish()

    def _write_on(self) -> None:
        with self._lock:
            self._in_line = False
            if not self._dead and not self._finished:
                self._pool.arm_write(self)

    def _transmit(self) -> bool:
        """True if the socket should be armed again."""
        budget = _TURN_BYTES
        self._write_held = False
        while budget > 0 and not self._dead:
            out = self._out = self._out or self._pool.buffers.lend()
            if self._out_at == self._out_end and not self._fill(out):
                self._pool.buffers.back(out)
                self._out = None
                self.rate.idle()
                return False
            # What stands before a round's chunk has to get out of its way.
            shared = self._out_yields and not self._jobs
            allowed = self._pool.up.take(self._out_end - self._out_at)
            granted = self._pool.share.take(allowed) if shared and allowed else allowed
            if not granted:
                self._pool.up.charge(-allowed)
                self._held_by = self._pool.share_queue if allowed else self._pool.up_queue
                self._write_held = True
                self.rate.full(host.mono_s(), self.sent_bytes)
                return True
            count = 0
            try:
                count = self._sock.send(out[self._out_at : self._out_at + granted])
            except BlockingIOError:
                self.rate.full(host.mono_s(), self.sent_bytes)
                return True
            finally:
                self._pool.up.charge(count - allowed)
                if shared:
                    self._pool.share.charge(count - granted)
            self._out_at += count
            self.sent_bytes += count
            budget -= count
        return True

    def _next_job(self) -> Job | None:
        """The one whose chunks are to be sent now; says of others that they are done."""
        while True:
            with self._lock:
                queue = self._jobs or self._yielding
                if not queue:
                    return None
                job = queue[0]
                if not job.cancelled and job.chunks:
                    return job
                queue.popleft()
                self.queued_bytes -= job.nbytes
            job.done(job)

    def _fill(self, out: memoryview) -> bool:
        """Seal the next frame into the output buffer; False if there is none."""
        job = self._next_job()
        if job is None:
            return False
        job.started, self._out_yields = True, job.yields
        number, chunk = job.chunks[0]
        if not job.offset:
            job.packed = self.rate.packed(chunk) if job.may_pack else None
        packed = job.packed is not None
        if job.packed is not None:
            chunk = memoryview(job.packed)
        most = FRAME_BYTES if job.yields else limits.FRAME_BYTES_BULK_MAX
        nbytes = min(chunk.nbytes - job.offset, most)
        header = Header(nbytes, job.offset, chunk.nbytes, job.request, number, packed)
        head = bulklink.pack_header(header)
        self._out_at, self._out_end = 0, len(head) + nbytes + TAG_BYTES
        out[: len(head)] = head
        plain = chunk[job.offset : job.offset + nbytes]
        self._keys.sender.seal(plain, head, out[len(head) : self._out_end])
        job.offset += nbytes
        if job.offset == chunk.nbytes:
            job.chunks.popleft()
            job.offset, job.packed = 0, None
        return True

    def _finish(self) -> None:
        with self._lock:
            if not self._dead or self._reading or self._writing or self._finished:
                return
            self._finished = True
        self._pool.forget(self)
        self._pool.share.forget(self)
        self._pool.buffers.back(self._body)
        self._pool.buffers.back(self._out)
        self._sock.close()
        os.close(self.write_fd)
        self._sink.closed(self, self._fault)

    def __repr__(self) -> str:
        return f"BulkConnection({short_id(self.peer)})"


class BulkPool:
    """A fixed number of threads for all bulk connections and for hashing.

    ``up`` and ``down`` are the caps of the site; control links charge them too. ``share`` is what
    those who are catching up may have of the uplink. ``broken`` hears what ends one of the threads.
    """

    def __init__(
        self,
        threads: int,
        poller: Poller | None = None,
        caps_bytes_per_s: tuple[int, int] = (0, 0),
        donor_share: float = SHARE,
        broken: Broken = only_told,
    ) -> None:
        self.up, self.down = map(Cap, caps_bytes_per_s)
        self.share = DonorShare(donor_share, caps_bytes_per_s[0])
        self.up_queue, self.down_queue = Queue(self.up, broken), Queue(self.down, broken)
        self.share_queue = Queue(self.share, broken)
        self.buffers = Buffers(bulklink.HEADER_BYTES + limits.FRAME_BYTES_BULK_MAX + TAG_BYTES)
        self._poller = poller or make_poller()
        self._connections: dict[int, BulkConnection] = {}
        self._tasks: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_fd = self._wake_read.fileno()
        self._poller.add(self._wake_fd)
        self._poller.arm(self._wake_fd, write=False)
        self._threads = [start_thread(f"bulk-{i}", self._work, broken) for i in range(threads)]

    def add(
        self, sock: socket.socket, peer: PeerId, keys: BulkKeys, sink: Sink, name: bytes = b""
    ) -> BulkConnection:
        """Serve an established connection from now on; both sides know it by ``name``."""
        conn = BulkConnection(self, sock, peer, keys, sink, name)
        for fd in (conn.read_fd, conn.write_fd):
            self._connections[fd] = conn
            self._poller.add(fd)
        self.share.add(conn)
        self._poller.arm(conn.read_fd, write=False)
        return conn

    def submit(self, task: Callable[[], None]) -> None:
        """Run ``task`` on a thread of the pool, in order of submission."""
        self._tasks.append(task)
        self._wake_write.send(b"x")

    # Called under the connection's lock before it is finished: the descriptor is still its own.

    def arm_read(self, conn: BulkConnection) -> None:
        """Have ``on_readable`` called once."""
        self._poller.arm(conn.read_fd, write=False)

    def arm_write(self, conn: BulkConnection) -> None:
        """Have ``on_writable`` called once."""
        self._poller.arm(conn.write_fd, write=True)

    def forget(self, conn: BulkConnection) -> None:
        """Take a connection out before its descriptors are closed."""
        for fd in (conn.read_fd, conn.write_fd):
            del self._connections[fd]
            self._poller.remove(fd)

    def close(self) -> None:
        """End all connections and threads; blocks until the threads have ended."""
        for conn in list(self._connections.values()):
            conn.abandon()
        for queue in (self.up_queue, self.down_queue, self.share_queue):
            queue.close()
        self._stopping = True
        self._wake_write.send(b"x" * len(self._threads))
        for thread in self._threads:
            thread.join()
        for conn in list(self._connections.values()):
            conn.on_readable()
        self._poller.close()
        self._wake_read.close()
        self._wake_write.close()

    def _work(self) -> None:
        while not self._stopping:
            fd = self._poller.wait()
            if fd is None:
                continue
            if fd == self._wake_fd:
                self._run_task()
                continue
            conn = self._connections.get(fd)
            if conn is None:
                continue  # finished by another thread in this moment
            if fd == conn.read_fd:
                conn.on_readable()
            else:
                conn.on_writable()

    def _run_task(self) -> None:
        self._wake_read.recv(1)  # one byte per task: there is always one here
        self._poller.arm(self._wake_fd, write=False)
        if not self._stopping:
            self._tasks.popleft()()
