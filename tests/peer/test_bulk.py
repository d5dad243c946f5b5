"""The pool of threads and one bulk connection, over socket pairs."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import threading
from collections.abc import Iterator

import pytest

from swarmtrain_peer import host
from swarmtrain_peer.bulk import BulkConnection, BulkPool, Job
from swarmtrain_peer.poller import SelectorPoller, make_poller
from swarmtrain_protocols import bulklink, limits
from swarmtrain_protocols.bulklink import BulkKeys, Header, pack_header
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.noise import TAG_BYTES
from tests.peer.test_transport import go
from tests.peer.transport_kit import Node, blob_of, same

PEER = PeerId(b"p" * 32)
WAIT_S = 10.0


class Collector:
    """A sink that keeps whole chunks by (request, chunk) and signals every change."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.chunks: dict[tuple[int, int], bytearray] = {}
        self.complete: list[tuple[int, int]] = []
        self.closes: list[PeerFault | None] = []

    def begin(self, conn: BulkConnection, header: Header) -> memoryview | None:
        if header.request == 666:
            return None
        chunk = self.chunks.setdefault(
            (header.request, header.chunk), bytearray(header.chunk_bytes)
        )
        return memoryview(chunk)[header.offset : header.offset + header.nbytes]

    def end(self, conn: BulkConnection, header: Header, ok: bool) -> None:
        with self.changed:
            if ok and header.offset + header.nbytes == header.chunk_bytes:
                self.complete.append((header.request, header.chunk))
            self.changed.notify_all()

    def closed(self, conn: BulkConnection, fault: PeerFault | None) -> None:
        with self.changed:
            self.closes.append(fault)
            self.changed.notify_all()

    def wait(self, complete: int = 0, closes: int = 0) -> None:
        with self.changed:
            assert self.changed.wait_for(
                lambda: len(self.complete) >= complete and len(self.closes) >= closes, WAIT_S
            ), (self.complete, self.closes)


def _keys(initiator: bool) -> BulkKeys:
    return BulkKeys(b"s" * 32, b"i" * 16, b"r" * 16, initiator)


@pytest.fixture(params=[make_poller, SelectorPoller])
def pool(request: pytest.FixtureRequest) -> Iterator[BulkPool]:
    pool = BulkPool(2, request.param())
    yield pool
    pool.close()


def _pair(pool: BulkPool, sink: Collector) -> tuple[BulkConnection, BulkConnection]:
    left, right = socket.socketpair()
    return (
        pool.add(left, PEER, _keys(True), sink),
        pool.add(right, PEER, _keys(False), sink),
    )


def _job(request: int, *chunks: bytes) -> tuple[Job, threading.Event]:
    done = threading.Event()
    views = [(i, memoryview(chunk)) for i, chunk in enumerate(chunks)]
    return Job(request, views, lambda job: done.set()), done


def test_chunks_of_all_sizes_both_ways(pool: BulkPool) -> None:
    rng = random.Random(3)
    sink = Collector()
    a, b = _pair(pool, sink)
    frame = limits.FRAME_BYTES_BULK_MAX
    chunks = [rng.randbytes(n) for n in (1, 5000, frame - 1, frame, frame + 1, 3 * frame + 7)]
    events = []
    for conn, request in ((a, 1), (b, 2), (a, 3)):
        job, done = _job(request, *chunks)
        assert conn.send(job)
        events.append(done)
    sink.wait(complete=18)
    for request in (1, 2, 3):
        assert [bytes(sink.chunks[request, i]) for i in range(6)] == chunks
    assert all(done.wait(WAIT_S) for done in events)
    assert a.idle and b.idle and a.queued_bytes == 0
    assert a.sent_bytes == b.received_bytes > 2 * b.sent_bytes - 1
    a.abandon()
    sink.wait(closes=2)
    assert sink.closes == [None, None]
    assert not a.alive and not b.send(_job(9, b"x")[0])


def test_two_threads_serve_many_connections(pool: BulkPool) -> None:
    sink = Collector()
    data = os.urandom(200_000)
    pairs = [_pair(pool, sink) for _ in range(20)]
    for i, (a, b) in enumerate(pairs):
        a.send(_job(2 * i, data)[0])
        b.send(_job(2 * i + 1, data)[0])
    sink.wait(complete=40)
    assert all(chunk == data for chunk in sink.chunks.values())
    assert sum(thread.name.startswith("bulk-") for thread in threading.enumerate()) == 2


def test_a_cancelled_job_stops_at_the_next_frame(pool: BulkPool) -> None:
    sink = Collector()
    a, _ = _pair(pool, sink)
    job, done = _job(1, *[bytes(limits.FRAME_BYTES_BULK_MAX)] * 50)
    job.cancelled = True
    after, _ = _job(2, b"after")
    assert a.send(job) and a.send(after)
    sink.wait(complete=1)
    assert sink.complete == [(2, 0)] and done.is_set()


def test_frames_that_nobody_wants_are_discarded(pool: BulkPool) -> None:
    sink = Collector()
    a, _ = _pair(pool, sink)
    assert a.send(_job(666, bytes(3_000_000))[0]) and a.send(_job(2, b"wanted")[0])
    sink.wait(complete=1)
    assert list(sink.chunks) == [(2, 0)]


def _hostile(pool: BulkPool, sink: Collector, data: bytes) -> None:
    left, right = socket.socketpair()
    pool.add(left, PEER, _keys(True), sink)
    with right:
        right.sendall(data)
        sink.wait(closes=1)


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (b"\xff" * 32, "oversize"),
        (b"\x00" * 32, "malformed"),
        (pack_header(Header(5, 0, 5, 1, 0)) + bytes(5 + TAG_BYTES), "tampered"),
    ],
)
def test_hostile_frames_end_the_connection(pool: BulkPool, header: bytes, code: str) -> None:
    sink = Collector()
    _hostile(pool, sink, header)
    (fault,) = sink.closes
    assert fault is not None and fault.code == code and fault.peer == PEER
    assert not sink.complete


def test_a_cut_in_mid_frame_completes_nothing(pool: BulkPool) -> None:
    sink = Collector()
    left, right = socket.socketpair()
    pool.add(left, PEER, _keys(True), sink)
    sealed = bytearray(1000 + TAG_BYTES)
    head = pack_header(Header(1000, 0, 1000, 1, 0))
    _keys(False).sender.seal(bytes(1000), head, memoryview(sealed))
    right.sendall(head + sealed[:-1])
    right.close()
    sink.wait(closes=1)
    assert sink.closes == [None] and not sink.complete


def test_caps_hold_over_all_connections_and_the_end_comes_through() -> None:
    """Bytes never outrun the clock: an upper bound that a slow machine cannot break."""
    rate = 4_000_000
    begin_s = host.mono_s()
    pool = BulkPool(2, caps_bytes_per_s=(rate, 2 * rate))
    sink = Collector()
    pairs = [_pair(pool, sink) for _ in range(3)]
    data = os.urandom(300_000)
    for number, (a, b) in enumerate(pairs):
        a.send(_job(2 * number, data)[0])
        b.send(_job(2 * number + 1, data)[0])
    sink.wait(complete=6)
    received = sum(conn.received_bytes for pair in pairs for conn in pair)
    assert received > 6 * len(data)
    assert received <= rate * (host.mono_s() - begin_s) + pool.up.burst_bytes
    assert all(chunk == data for chunk in sink.chunks.values())
    pairs[0][0].send(_job(9, data, data, data)[0])
    pairs[0][0].abandon()
    sink.wait(closes=2)
    pool.close()
    assert len(sink.closes) == 6


def test_tasks_run_in_order_and_the_end_leaves_nothing() -> None:
    before = len(os.listdir("/proc/self/fd"))
    pool = BulkPool(1)
    sink = Collector()
    pairs = [_pair(pool, sink) for _ in range(5)]
    ran: list[int] = []
    last = threading.Event()
    for i in range(100):
        pool.submit(lambda i=i: ran.append(i))  # type: ignore[misc]
    pool.submit(last.set)
    assert last.wait(WAIT_S)
    assert ran == list(range(100))
    pool.close()
    assert len(sink.closes) == 10 and not any(conn.alive for pair in pairs for conn in pair)
    assert len(os.listdir("/proc/self/fd")) == before
    assert not any(thread.name.startswith("bulk-") for thread in threading.enumerate())


def test_connections_are_few_and_idle_ones_make_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five peers, room for two connections: all fetches succeed, idle connections are evicted."""
    monkeypatch.setattr(limits, "BULK_CONNECTIONS_MAX", 2)

    async def main() -> None:
        nodes = [Node(i + 1) for i in range(6)]
        hub, others = nodes[0], nodes[1:]
        for node in nodes:
            await node.__aenter__()
        blob = blob_of(300_000)
        for i, other in enumerate(others):
            other.hold(blob)
            await (hub.join(other) if i % 2 else other.join(hub))
        got = [hub.fetch(i, other, blob) for i, other in enumerate(others)]
        for i in range(len(others)):
            await hub.until("fetched", i)
        assert all(same(buffers, blob) for buffers in got)
        assert len(hub.transport._bulk._used_at) <= 3  # one may be on its way out
        assert hub.transport.stats["bulk_evicted"] >= 3
        for node in nodes:
            await node.transport.close()

    go(main())


def test_recorded_opening_cannot_be_replayed() -> None:
    """Who records a bulk connection's opening and plays it again is not let in."""

    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            await a.join(b)
            blob = b.hold(blob_of(300_000))
            secret = b.transport._bulk._pairs[a.id].secret
            opening = bulklink.PREFACE + bulklink.link_tag(secret) + b"n" * 16
            loop = asyncio.get_running_loop()
            host, port = b.address.split(":")
            with socket.socket() as sock:
                sock.setblocking(False)
                await loop.sock_connect(sock, (host, int(port)))
                await loop.sock_sendall(sock, opening)
                answer = await loop.sock_recv(sock, 100)
                assert len(answer) == bulklink.ANSWER_BYTES
                await loop.sock_sendall(sock, b"x" * TAG_BYTES)  # cannot be made without the secret
                assert await loop.sock_recv(sock, 100) == b""
            assert b.transport.stats["bulk_refused"] == 1
            buffers = a.fetch(1, b, blob)
            await a.until("fetched", 1)
            assert same(buffers, blob)

    go(main())
