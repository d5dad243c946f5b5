"""Fetches over loopback: right bytes in place, or one typed failure that names the peer."""

from __future__ import annotations

import asyncio
import os
import time

import pytest

from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.messages.fetch import BulkClosed, FetchChunk, FetchRequest
from tests.peer.test_transport import LEAVE, go
from tests.peer.transport_kit import WAIT_S, Node, blob_of, same

INLINE = limits.INLINE_CHUNK_BYTES_MAX
FRAME = limits.FRAME_BYTES_BULK_MAX


@pytest.mark.parametrize("asker_dialled", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [
        (1,),
        (INLINE,),
        (INLINE + 1,),
        (FRAME,),
        (FRAME + 1,),
        (3 * FRAME + 17, 5, INLINE, INLINE + 1, 200_000),
        tuple(range(1, 300)),
    ],
    ids=lambda sizes: f"{len(sizes)}x{sizes[0]}",
)
def test_every_size_arrives(sizes: tuple[int, ...], asker_dialled: bool) -> None:
    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            await (a.join(b) if asker_dialled else b.join(a))
            blob = b.hold(blob_of(*sizes))
            buffers = a.fetch(7, b, blob)
            await a.until("fetched", 7)
            assert same(buffers, blob)
            first = len(sizes) // 2
            part = a.fetch(8, b, blob, first, 1)
            await a.until("fetched", 8)
            assert same(part, blob, first) and len(part) == 1
            assert not a.saw("fault") and not b.saw("fault")

    go(main())


def test_both_directions_at_once_over_one_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LONG_PATH_RTT_S", 1e9)

    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            await a.join(b)
            blob_a, blob_b = a.hold(blob_of(*[FRAME] * 8)), b.hold(blob_of(*[FRAME] * 8, seed=2))
            got_a = [a.fetch(i, b, blob_b) for i in range(3)]
            got_b = [b.fetch(i, a, blob_a) for i in range(3)]
            for i in range(3):
                await a.until("fetched", i)
                await b.until("fetched", i)
            assert all(same(g, blob_b) for g in got_a) and all(same(g, blob_a) for g in got_b)
            stats = a.transport.stats
            assert stats["bulk_received_bytes"] >= 24 * FRAME
            # A pool thread counts what it sent after the other side may have it all.
            async with asyncio.timeout(WAIT_S):
                while a.transport.stats["peers"][b.id]["bulk_sent_bytes"] < 24 * FRAME:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert sum(stats["bulk_congestion"].values()) == limits.BULK_STREAMS_PER_PEER

    go(main())


def _streams(node: Node, other: Node) -> int:
    return len(node.transport._bulk.connections(other.id))


def test_a_long_path_is_striped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LONG_PATH_RTT_S", 0.0)

    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            await a.join(b)
            before: dict[tuple[bytes, bytes], int] = {}
            for asker, other in ((a, b), (b, a)):
                blob = other.hold(blob_of(*[300_000] * 64))
                ticket = 0
                while min(_streams(asker, other), _streams(other, asker)) < 4:
                    ticket += 1
                    buffers = asker.fetch(ticket, other, blob)
                    await asker.until("fetched", ticket)
                    assert same(buffers, blob)
                for conn in asker.transport._bulk.connections(other.id):
                    before[asker.id, conn.name] = conn.received_bytes
                buffers = asker.fetch(0, other, blob)
                await asker.until("fetched", 0)
                assert same(buffers, blob)
                for conn in asker.transport._bulk.connections(other.id):
                    got = conn.received_bytes - before[asker.id, conn.name]
                    assert got >= 16 * 300_000  # each has carried a quarter
            assert _streams(a, b) == limits.BULK_STREAMS_LONG_PATH

    go(main())


def test_more_fetches_than_may_be_in_flight_wait_their_turn() -> None:
    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            await a.join(b)
            blob = b.hold(blob_of(30_000, 100))
            count = 3 * limits.FETCHES_IN_FLIGHT_PER_PEER_MAX
            got = [a.fetch(i, b, blob) for i in range(count)]
            for i in range(count):
                await a.until("fetched", i)
            assert all(same(g, blob) for g in got)
            assert not a.saw("failed")

    go(main())


def test_a_fetch_dials_if_an_address_is_known() -> None:
    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            blob = b.hold(blob_of(FRAME, 10))
            a.fetch(1, b, blob)
            await a.until("failed", 1, "disconnected")  # no address
            a.transport.learn(b.id, [b.address])
            buffers = a.fetch(2, b, blob)
            await a.until("fetched", 2)
            assert same(buffers, blob)

    go(main())


def test_hashes_alone_come_without_chunks() -> None:
    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            await a.join(b)
            blob = b.hold(blob_of(*[FRAME] * 8))
            before = b.transport.stats["bulk_sent_bytes"]
            a.transport.fetch_hashes(5, b.id, blob.root, 2, 4, 8, WAIT_S)
            await a.until("fetched", 5)
            assert a.leaves == tuple(blob.leaves[2:6])
            assert b.transport.stats["bulk_sent_bytes"] == before
            a.transport.fetch_hashes(6, b.id, blob.root, 0, 4, 9, WAIT_S)
            assert await a.until("failed", 6) == ("failed", 6, "corrupt"), "another length"

    go(main())


def test_rounds_go_on_while_somebody_slow_fetches_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways among two, while a third takes from both, over one stream and over several."""
    monkeypatch.setattr(limits, "LONG_PATH_RTT_S", 0.0)

    async def main() -> None:
        async with Node(1) as a, Node(2) as b, Node(3, down_bytes_per_s=3_000_000) as slow:
            await a.join(b)
            state = blob_of(*[2 * FRAME] * 8)
            for donor in (a, b):
                await slow.join(donor)
                donor.hold(state)
                donor.history[state.root] = None
            taken = [slow.fetch(i, (a, b)[i % 2], state, i, 1, timeout_s=60.0) for i in range(8)]
            for ticket in range(100, 140):
                blob = blob_of(*[FRAME] * 3, seed=ticket)
                a.hold(blob)
                b.hold(blob)
                got = [a.fetch(ticket, b, blob), b.fetch(ticket, a, blob)]
                await a.until("fetched", ticket)
                await b.until("fetched", ticket)
                assert all(same(buffers, blob) for buffers in got)
            for i in range(8):
                await slow.until("fetched", i)
                assert same(taken[i], state, i)

    go(main())


def test_refusals() -> None:
    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            await a.join(b)
            blob = blob_of(10, 20)
            a.fetch(1, b, blob)
            await a.until("failed", 1, "refused:unknown")
            b.hold(blob)
            views = [memoryview(bytearray(20))]
            a.transport.fetch(2, b.id, blob.root, 2, 3, views, 5.0)  # b knows of two chunks
            await a.until("failed", 2, "refused:range")
            assert not a.saw("fault") and not b.saw("fault")

    go(main())


class _Liar(Blob):
    """Leaves of one blob, chunks of another."""

    def __init__(self, blob: Blob, chunks: list[bytes]) -> None:
        super().__init__(list(blob.chunks), blob.leaves)
        self.chunks = tuple(memoryview(chunk) for chunk in chunks)


@pytest.mark.parametrize("size", [100, 100_000, 2 * FRAME + 5])
@pytest.mark.parametrize("what", ["flipped", "longer", "shorter"])
def test_wrong_bytes_are_corrupt_and_the_peer_is_named(size: int, what: str) -> None:
    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            await a.join(b)
            blob = blob_of(size, 50)
            bad = bytearray(blob.chunks[0])
            if what == "flipped":
                bad[-1] ^= 1
            elif what == "longer":
                bad.append(0)
            else:
                bad.pop()
            b.blobs[blob.root] = _Liar(blob, [bytes(bad), bytes(blob.chunks[1])])
            a.fetch(1, b, blob)
            await a.until("failed", 1, "corrupt")
            fault = await a.until("fault", b.id)
            assert fault[2] in ("corrupt", "malformed")
            b.hold(blob)  # honest again: the link still works
            buffers = a.fetch(2, b, blob)
            await a.until("fetched", 2)
            assert same(buffers, blob)

    go(main())


def test_a_blob_of_another_shape_or_with_a_wrong_proof_is_corrupt() -> None:
    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            await a.join(b)
            blob, other = blob_of(10, 20, 30), blob_of(10, 20, 30, seed=9)
            b.blobs[blob.root] = other
            a.fetch(1, b, blob)
            await a.until("failed", 1, "corrupt")
            b.blobs[blob.root] = blob_of(10, 20)
            a.fetch(2, b, blob, 0, 2)
            await a.until("failed", 2, "corrupt")
            many = blob_of(*[10] * 200)
            b.blobs[many.root] = blob_of(*[10] * 200, seed=5)
            a.fetch(3, b, many)
            await a.until("failed", 3, "corrupt")  # checked on a thread
            assert sum(event[0] == "fault" for event in a.events) == 3

    go(main())


def test_timeout_and_late_answer() -> None:
    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            await a.join(b)
            blob = b.hold(blob_of(FRAME, 10))
            b.transport._table.links[a.id]._transport.pause_reading()  # type: ignore[union-attr]
            buffers = a.fetch(1, b, blob, timeout_s=0.05)
            await a.until("failed", 1, "timeout")
            b.transport._table.links[a.id]._transport.resume_reading()  # type: ignore[union-attr]
            buffers = a.fetch(2, b, blob)
            await a.until("fetched", 2)
            assert same(buffers, blob)
            assert not a.saw("fault")  # what came late was nobody's fault

    go(main())


def test_nothing_is_written_after_cancel() -> None:
    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            await a.join(b)
            blob = b.hold(blob_of(*[FRAME] * 32))
            for ticket in range(5):
                buffers = a.fetch(ticket, b, blob)
                for _ in range(200 * ticket):
                    await asyncio.sleep(0)
                a.transport.cancel(ticket)
                before = [bytes(buffer) for buffer in buffers]
                after = a.fetch(100 + ticket, b, blob)
                await a.until("fetched", 100 + ticket)
                assert before == buffers
                assert same(after, blob)
                assert same(buffers, blob) or not a.saw("fetched", ticket)
            a.transport.cancel(12345)  # unknown tickets are ignored

    go(main())


def test_a_peer_killed_in_mid_fetch() -> None:
    async def main() -> None:
        async with Node(1) as a:
            b = Node(2)
            await b.__aenter__()
            await a.join(b)
            blob = b.hold(blob_of(*[FRAME] * 64))
            small = b.hold(blob_of(INLINE + 1))
            a.fetch(0, b, blob)
            for ticket in range(1, 70):  # more than may be in flight: those that wait fail as well
                a.fetch(ticket, b, small)
            await a.bulk_flows(2 * FRAME)
            b.transport._table.links[a.id]._transport.abort()  # type: ignore[union-attr]
            for ticket in range(70):
                event = await a.until("failed", ticket)
                assert event[2] == "disconnected"
            await b.transport.close()

    go(main())


def test_a_lost_bulk_connection_fails_what_was_on_it_and_a_new_one_is_made() -> None:
    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            for asker, other in ((a, b), (b, a)):
                if not asker.transport.connected_peers():
                    await asker.join(other)
                blob = other.hold(blob_of(*[FRAME] * 40))
                asker.fetch(1, other, blob)
                await asker.bulk_flows(3 * FRAME)
                for conn in asker.transport._bulk.connections(other.id):
                    conn.abandon()
                assert (await asker.until("failed", 1))[2] == "disconnected"
                buffers = asker.fetch(2, other, blob)
                await asker.until("fetched", 2)
                assert same(buffers, blob)

    go(main())


def test_a_connection_that_only_one_side_has_lost() -> None:
    """The provider's end looks alive: it is told, and answers over a new connection."""

    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            await a.join(b)
            blob = b.hold(blob_of(FRAME))
            a.fetch(1, b, blob)
            await a.until("fetched", 1)
            (mine,) = a.transport._bulk.connections(b.id)[:1]
            theirs = next(c for c in b.transport._bulk.connections(a.id) if c.name == mine.name)
            assert a.transport.send(b.id, BulkClosed(connection=mine.name))
            assert a.transport.send(b.id, BulkClosed(connection=b"unknown, ignored"))
            buffers = a.fetch(2, b, blob)
            await a.until("fetched", 2)
            assert same(buffers, blob) and not theirs.alive
            assert theirs.sent_bytes < 2 * FRAME

    go(main())


def test_messages_pass_while_bulk_flows() -> None:
    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            await a.join(b)
            blob = b.hold(blob_of(*[FRAME] * 64))
            buffers = a.fetch(1, b, blob)
            passed = 0
            while not a.saw("fetched", 1):
                assert b.transport.send(a.id, LEAVE)
                await a.until("message", b.id)
                passed += 1
            assert passed >= 3 and same(buffers, blob)

    go(main())


def test_chunks_that_nobody_asked_for() -> None:
    async def main() -> None:
        async with Node(1) as a, Node(2) as b, Node(3) as c:
            await a.join(b)
            await a.join(c)
            blob = b.hold(blob_of(10, FRAME))
            b.transport._table.links[a.id].send(FetchChunk(request=77, index=0), b"x" * 10)
            buffers = a.fetch(1, b, blob)  # its number is 1
            c.transport._table.links[a.id].send(FetchChunk(request=1, index=0), b"x" * 10)
            await a.until("fetched", 1)
            assert same(buffers, blob)

    go(main())


def test_requests_over_the_limit_are_refused_as_busy() -> None:
    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            await b.join(a)
            blob = b.hold(blob_of(INLINE + 1))
            b.transport._serving._need_bulk = lambda peer: None  # jobs stay where they are
            link = a.transport._table.links[b.id]
            many = 2 * limits.FETCHES_IN_FLIGHT_PER_PEER_MAX
            for i in range(100, 100 + many):
                link.send(FetchRequest(request=i, root=blob.root, first=0, count=1))
                link.send(FetchRequest(request=i, root=blob.root, first=0, count=1))  # ignored
            a.fetch(0, b, blob)
            await a.until("failed", 0, "refused:busy")
            assert b.transport._serving.running(a.id) == many

    go(main())


def test_misuse() -> None:
    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            blob = blob_of(10)
            view = memoryview(bytearray(10))

            def fetch(ticket: int, first: int, total: int, views: list[memoryview]) -> None:
                a.transport.fetch(ticket, b.id, blob.root, first, total, views, 1.0)

            for first, total, views in (
                (0, 1, []),
                (1, 1, [view]),
                (-1, 1, [view]),
                (0, 1, [memoryview(b"readonly")]),
                (0, 1, [memoryview(bytearray())]),
                (0, 5000, [view] * 1025),
            ):
                with pytest.raises(LocalProtocolError):
                    fetch(1, first, total, views)
            fetch(1, 0, 1, [view])
            with pytest.raises(LocalProtocolError):
                fetch(1, 0, 1, [view])

    go(main())


def test_speed() -> None:
    """A floor far below what an idle machine does: it catches a copy or a codec on the loop."""

    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            await a.join(b)
            data = memoryview(os.urandom(32 * FRAME))
            blob = b.hold(Blob.of([data[i * FRAME : (i + 1) * FRAME] for i in range(32)]))
            tiny = b.hold(blob_of(1000))
            best_s, tiny_s = 9.0, []
            for i in range(4):
                start = time.perf_counter()
                buffers = a.fetch(i, b, blob)
                await a.until("fetched", i)
                best_s = min(best_s, time.perf_counter() - start)
                assert same(buffers, blob)
            for i in range(100, 150):
                start = time.perf_counter()
                a.fetch(i, b, tiny)
                await a.until("fetched", i)
                tiny_s.append(time.perf_counter() - start)
            assert 32 * FRAME / best_s > 0.02e9
            assert min(tiny_s) < 0.01

    go(main())
