"""What those who are catching up may have of the uplink."""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Iterator

import pytest

from swarmtrain_peer import donorshare, host
from swarmtrain_peer.bulk import BulkConnection, BulkPool, Job
from swarmtrain_peer.donorshare import (
    BUSY_FACTOR,
    BYTES_PER_S_MIN,
    REMEMBER_S,
    SHARE,
    UNKNOWN_BYTES_PER_S,
    DonorShare,
    unsent_bytes,
)
from swarmtrain_protocols.bulklink import BulkKeys, Header
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.errors import PeerFault

PEER = PeerId(b"p" * 32)
MIB = 1024 * 1024


class Sender:
    def __init__(self, waits: bool) -> None:
        self.waits = waits
        self.handed = self.unsent = 0

    def round_bytes_wait(self) -> bool:
        return self.waits

    def progress(self) -> tuple[int, int]:
        return self.handed, self.unsent


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [1000.0]
    monkeypatch.setattr(host, "mono_s", lambda: now[0])
    yield now


def test_without_a_measurement_there_is_no_limit(clock: list[float]) -> None:
    share = DonorShare()
    assert share.uplink_bytes_per_s is None
    assert share.allowed_bytes_per_s() == math.inf
    assert share.take(100 * MIB) == 100 * MIB and share.wait_s() == 0.0


def test_a_fifth_of_what_was_measured_passes(clock: list[float]) -> None:
    share = DonorShare()
    share.measured(clock[0], 1e6)
    passed = 0
    for _ in range(1000):
        clock[0] += 0.01
        passed += share.take(MIB)
    assert passed == pytest.approx(SHARE * 1e6 * 10.0, rel=0.02)


def test_the_most_is_remembered_for_a_while(clock: list[float]) -> None:
    share = DonorShare(0.5)
    share.measured(1000.0, 3e6)
    share.measured(1100.0, 0.5e6)  # a slow member is not a slow uplink
    assert share.uplink_bytes_per_s == 3e6 and share.allowed_bytes_per_s() == 1.5e6
    share.measured(1000.0 + REMEMBER_S + 1, 0.5e6)
    assert share.uplink_bytes_per_s == 3e6
    share.measured(1000.0 + 2 * REMEMBER_S + 10, 0.5e6)
    assert share.uplink_bytes_per_s == 0.5e6


def test_what_all_have_carried_counts_while_one_is_never_empty(clock: list[float]) -> None:
    share, busy, other = DonorShare(), Sender(False), Sender(False)
    for sender in (busy, other):
        share.add(sender)

    def pass_on(seconds: float, unsent: int, *carried: int) -> float | None:
        clock[0] += seconds
        for sender, nbytes in zip((busy, other), carried, strict=True):
            sender.handed += nbytes
        busy.unsent, busy.handed = unsent, busy.handed + unsent - busy.unsent
        share.look()
        return share.uplink_bytes_per_s

    assert pass_on(1.0, 0, 5_000_000, 0) is None, "handed over, and gone: no limit was met"
    assert pass_on(0.1, 500_000, 0, 0) is None, "it begins"
    assert pass_on(0.1, 300_000, 100_000, 50_000) is None, "too short a time"
    assert pass_on(0.1, 300_000, 100_000, 50_000) == pytest.approx(300_000 / 0.2)
    assert pass_on(0.1, 0, 200_000, 0) == pytest.approx(1.5e6), "it ran empty in between"
    assert pass_on(5.0, 400_000, 0, 0) == pytest.approx(1.5e6)
    share.forget(busy)
    assert pass_on(1.0, 400_000, 9_000_000, 0) == pytest.approx(1.5e6)


def test_what_the_user_allows_is_the_uplink_at_most(clock: list[float]) -> None:
    share = DonorShare(0.2, 500_000)
    assert share.allowed_bytes_per_s() == 100_000
    share.measured(clock[0], 9e6)
    assert share.allowed_bytes_per_s() == 100_000
    share = DonorShare(0.2, 500_000)
    share.measured(clock[0], 200_000)
    assert share.allowed_bytes_per_s() == 40_000


def test_while_bytes_of_a_round_wait_the_share_is_smaller(clock: list[float]) -> None:
    share, sender = DonorShare(), Sender(True)
    share.busy(sender)
    assert share.allowed_bytes_per_s() == UNKNOWN_BYTES_PER_S
    share.measured(clock[0], 10e6)
    assert share.allowed_bytes_per_s() == pytest.approx(10e6 * SHARE * BUSY_FACTOR)
    sender.waits = False
    assert share.allowed_bytes_per_s() == pytest.approx(10e6 * SHARE)
    sender.waits = True
    assert not share.rounds_wait(), "it says so again with its next chunk"
    share.busy(sender)
    share.forget(sender)
    assert not share.rounds_wait()


def test_never_less_than_what_an_asker_waits_for(clock: list[float]) -> None:
    share = DonorShare(0.01)
    share.measured(clock[0], 1000.0)
    assert share.allowed_bytes_per_s() == BYTES_PER_S_MIN


def test_the_kernel_tells_what_it_has_not_sent() -> None:
    left, right = socket.socketpair()
    assert unsent_bytes(left) == 0
    left.send(bytes(5000))
    assert unsent_bytes(left) >= 5000
    right.recv(5000, socket.MSG_WAITALL)
    assert unsent_bytes(left) == 0
    left.close()
    right.close()
    assert unsent_bytes(left) == 0, "closed meanwhile"


# -- in a pool ----------------------------------------------------------------------------------


class Sink:
    """Takes everything; notes which request each frame was of."""

    def __init__(self) -> None:
        self.frames: list[tuple[int, int]] = []
        self.news = threading.Condition()

    def begin(self, conn: BulkConnection, header: Header) -> memoryview | None:
        with self.news:
            self.frames.append((header.request, header.nbytes))
            self.news.notify_all()
        return None

    def end(self, conn: BulkConnection, header: Header, ok: bool) -> None: ...

    def closed(self, conn: BulkConnection, fault: PeerFault | None) -> None: ...

    def wait(self, request: int, nbytes: int) -> None:
        with self.news:
            assert self.news.wait_for(lambda: self.of(request) >= nbytes, 20.0), self.frames

    def of(self, request: int) -> int:
        return sum(n for number, n in self.frames if number == request)


@pytest.fixture
def pair() -> Iterator[tuple[BulkPool, BulkConnection, Sink]]:
    """A pool whose uplink is known, a connection out of it, and who hears what comes."""
    pool, there = BulkPool(2), BulkPool(1)
    sink = Sink()
    left, right = socket.socketpair()
    names = b"s" * 32, b"a" * 16, b"b" * 16
    conn = pool.add(left, PEER, BulkKeys(*names, True), Sink())
    there.add(right, PEER, BulkKeys(*names, False), sink)
    yield pool, conn, sink
    pool.close()
    there.close()


def test_a_chunk_of_a_round_passes_one_that_is_held_back(
    pair: tuple[BulkPool, BulkConnection, Sink],
) -> None:
    """On the same connection, and within a chunk: it waits for no more than a frame."""
    pool, conn, sink = pair
    pool.share.measured(host.mono_s(), 1e6)
    state = memoryview(bytes(2 * MIB))
    assert conn.send(Job(1, [(0, state)], lambda job: None, yields=True))
    sink.wait(1, donorshare.FRAME_BYTES)
    assert sink.of(1) < MIB, "a fifth of a megabyte per second"
    assert conn.send(Job(2, [(0, memoryview(bytes(3 * MIB)))], lambda job: None))
    sink.wait(2, 3 * MIB)
    assert sink.of(1) < MIB
    assert not conn.idle


def test_nothing_is_lost_and_all_is_sent_in_the_end(
    pair: tuple[BulkPool, BulkConnection, Sink],
) -> None:
    pool, conn, sink = pair
    pool.share.measured(host.mono_s(), 50e6)
    for number in range(4):
        chunk = memoryview(bytes(MIB + number))
        assert conn.send(Job(number, [(0, chunk)], lambda job: None, yields=number % 2 == 0))
    for number in range(4):
        sink.wait(number, MIB + number)
        assert sink.of(number) == MIB + number
