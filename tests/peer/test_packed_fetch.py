"""Packed chunks over loopback: the same bytes arrive, and hostile ones name the peer."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
import zstandard

from swarmtrain_peer import linkrate
from swarmtrain_peer.bulk import BulkConnection, BulkPool, Job
from swarmtrain_peer.linkrate import LinkRate
from swarmtrain_peer.transfers import Fetch
from swarmtrain_protocols import limits
from swarmtrain_protocols.bulklink import BulkKeys, Header
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.messages.fetch import FetchRequest
from swarmtrain_protocols.packing import pack
from tests.peer.test_transport import go
from tests.peer.transport_kit import Node, same

FRAME = limits.FRAME_BYTES_BULK_MAX
PEER = PeerId(b"p" * 32)


def text(nbytes: int, seed: int = 1) -> bytes:
    """Half noise, half not: its frames stay long when packed."""
    rng = random.Random(seed)
    return b"".join(rng.randbytes(64) + bytes(64) for _ in range(nbytes // 128 + 1))[:nbytes]


def forced(monkeypatch: pytest.MonkeyPatch, form: Callable[[memoryview], Any]) -> None:
    monkeypatch.setattr(LinkRate, "packed", lambda self, chunk: form(chunk))


@pytest.mark.parametrize("size", [20_000, FRAME, 5 * FRAME + 17])
def test_packed_chunks_arrive_and_cost_less(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    forced(monkeypatch, pack)

    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            await a.join(b)
            blob = b.hold(Blob.of([text(size, i) for i in range(3)]))
            buffers = a.fetch(1, b, blob)
            await a.until("fetched", 1)
            assert same(buffers, blob) and not a.saw("fault")
            assert a.transport.stats["bulk_received_bytes"] < 0.7 * blob.nbytes

    go(main())


def test_packed_and_plain_chunks_in_one_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    forced(monkeypatch, pack)

    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            await a.join(b)
            noise = random.Random(2).randbytes(300_000)
            blob = b.hold(Blob.of([text(300_000), noise, text(70_000), b"tiny", noise[1:]]))
            buffers = a.fetch(1, b, blob)
            await a.until("fetched", 1)
            assert same(buffers, blob)

    go(main())


def test_a_loopback_path_is_never_worth_it() -> None:
    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            await a.join(b)
            blob = b.hold(Blob.of([bytes(FRAME)] * 16))
            for ticket in range(4):
                a.fetch(ticket, b, blob)
                await a.until("fetched", ticket)
            assert a.transport.stats["bulk_received_bytes"] > 60 * FRAME

    go(main())


def test_whoever_does_not_take_packed_chunks_gets_plain_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forced(monkeypatch, pack)

    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            await a.join(b)
            ask = a.transport._fetches._send

            def plain(peer: PeerId, message: Any, dial: bool) -> bool:
                if isinstance(message, FetchRequest):
                    message = FetchRequest(
                        request=message.request,
                        root=message.root,
                        first=message.first,
                        count=message.count,
                    )
                return ask(peer, message, dial)

            a.transport._fetches._send = plain
            blob = b.hold(Blob.of([text(300_000)]))
            buffers = a.fetch(1, b, blob)
            await a.until("fetched", 1)
            assert same(buffers, blob)
            assert a.transport.stats["bulk_received_bytes"] > blob.nbytes

    go(main())


def bomb(chunk: memoryview) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(bytes(64 * chunk.nbytes))


def longer(chunk: memoryview) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(bytes(chunk.nbytes + 1))


def noise(chunk: memoryview) -> bytes:
    return random.Random(1).randbytes(chunk.nbytes // 2)


def as_long(chunk: memoryview) -> bytes:
    return bytes(chunk)


def another(chunk: memoryview) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(bytes(chunk.nbytes))


@pytest.mark.parametrize("form", [bomb, longer, noise, as_long, another])
def test_hostile_packed_chunks_are_refused_and_the_peer_is_named(
    form: Callable[[memoryview], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    forced(monkeypatch, form)

    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            await a.join(b)
            blob = b.hold(Blob.of([text(300_000)]))
            a.fetch(1, b, blob)
            await a.until("failed", 1, "corrupt")
            fault = await a.until("fault", b.id)
            assert fault[2] == ("corrupt" if form is another else "malformed")
            monkeypatch.undo()
            buffers = a.fetch(2, b, blob)
            await a.until("fetched", 2)
            assert same(buffers, blob)

    go(main())


# -- one fetch, frame by frame ----------------------------------------------------------------


def make_fetch(*sizes: int) -> tuple[Fetch, list[bytearray]]:
    buffers = [bytearray(size) for size in sizes]
    views = [memoryview(buffer) for buffer in buffers]
    return Fetch(1, 1, PEER, b"r" * 32, 10, 100, views), buffers


def put(fetch: Fetch, header: Header, data: bytes) -> bool:
    """A frame arrives; true if it completed its chunk."""
    out = fetch.begin(CONN, header)
    if out is None:
        return False
    out[:] = data[header.offset : header.offset + header.nbytes]
    return fetch.end(header, True)


CONN: Any = object()


def test_frames_of_a_packed_chunk_in_order() -> None:
    fetch, (buffer,) = make_fetch(5000)
    packed = pack(text(5000))
    assert packed is not None
    n = len(packed)
    assert not put(fetch, Header(1000, 0, n, 1, 10, True), packed)
    assert not put(fetch, Header(1000, 0, n, 1, 10, True), packed)  # repeated: dropped
    assert not put(fetch, Header(1000, 0, 5000, 1, 10), bytes(5000))  # in another form: dropped
    assert put(fetch, Header(n - 1000, 1000, n, 1, 10, True), packed)
    assert buffer == text(5000)
    assert not put(fetch, Header(n, 0, n, 1, 10, True), packed)  # all of it again
    assert not put(fetch, Header(5000, 0, 5000, 1, 10), bytes(5000))
    assert buffer == text(5000)


@pytest.mark.parametrize(
    "header",
    [
        Header(100, 0, 5000, 1, 10, True),  # as long as the chunk
        Header(100, 0, 6000, 1, 10, True),
        Header(100, 50, 1000, 1, 10, True),  # begins in the middle
    ],
)
def test_packed_frames_that_cannot_be(header: Header) -> None:
    fetch, _ = make_fetch(5000)
    with pytest.raises(PeerFault, match="malformed"):
        fetch.begin(CONN, header)
    assert fetch.spoilt


def test_a_packed_chunk_does_not_change_its_size() -> None:
    fetch, _ = make_fetch(5000)
    packed = pack(text(5000))
    assert packed is not None
    assert not put(fetch, Header(100, 0, len(packed), 1, 10, True), packed)
    with pytest.raises(PeerFault, match="malformed"):
        fetch.begin(CONN, Header(100, 100, len(packed) + 1, 1, 10, True))


def test_a_wrong_packed_chunk_lets_go_of_its_memory() -> None:
    """``stop`` must not wait for ever for a writer that has failed."""
    fetch, _ = make_fetch(5000)
    with pytest.raises(PeerFault, match="malformed"):
        put(fetch, Header(100, 0, 100, 1, 10, True), bytes(100))
    stopped = threading.Thread(target=fetch.stop)
    stopped.start()
    stopped.join(5)
    assert not stopped.is_alive() and fetch.spoilt


# -- the sending side measures ----------------------------------------------------------------


class Quiet:
    """A sink for the side that only sends."""

    def begin(self, conn: BulkConnection, header: Header) -> memoryview | None:
        return None

    def end(self, conn: BulkConnection, header: Header, ok: bool) -> None: ...

    def closed(self, conn: BulkConnection, fault: PeerFault | None) -> None: ...


def test_a_path_that_drains_slowly_is_noticed_and_packed_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clock is the test's: 50 kB a second leave the buffer."""
    now = [0.0]
    monkeypatch.setattr(linkrate.host, "mono_s", lambda: now[0])
    pool = BulkPool(1)
    left, right = socket.socketpair()
    left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    right.settimeout(0.05)
    keys = BulkKeys(b"s" * 32, b"i" * 16, b"r" * 16, True)
    conn = pool.add(left, PEER, keys, Quiet())
    done = threading.Event()
    plain = text(FRAME)
    chunks = [(i, memoryview(plain)) for i in range(12)]
    assert conn.send(Job(1, chunks, lambda job: done.set(), may_pack=True))
    received = 0
    while not done.is_set():
        with contextlib.suppress(TimeoutError):  # it has sent all and says so in a moment
            received += len(right.recv(65536))
        now[0] += 65536 / 50e3
    assert conn.rate.bytes_per_s is not None and conn.rate.bytes_per_s < 1e6
    assert received < 0.8 * 12 * FRAME
    right.close()
    pool.close()
