"""A blob from several donors: fast and slow ones, liars, and those who stall at the end."""

from __future__ import annotations

import math

import pytest

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import CancelFetch, Effect, Fetch, PeerId
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.download import (
    ARRIVED,
    BASE_TIMEOUT_S,
    FAILED,
    RANGE_CHUNKS_MAX,
    RANGES_PER_DONOR,
    REST_S_MAX,
    SLOWDOWN_MAX,
    TAKEOVER_FACTOR,
    TAKEOVER_S,
    Donors,
    Download,
)
from swarmtrain_protocols.rounds.fetches import Fetches
from tests.protocols.rounds_kit import TRAIN, A, B, C, events, faults, hash_of, of_kind, take

CHUNK_BYTES = 2 * 1024 * 1024
ROOT = hash_of("state 4")
SNAPSHOT = fx.Snapshot(TRAIN, 4, ROOT, 1000)


class Scene:
    """One download, and donors that send at rates of their own. Time moves by hand."""

    def __init__(self, total: int = 40, have: tuple[int, ...] = ()) -> None:
        self.out: list[Effect] = []
        self.fetches = Fetches(self.out)
        self.book = Donors()
        self.total = total
        self.ended: list[tuple[float, str]] = []
        self.done: list[int] = list(have)
        self.flying: list[Fetch] = []
        self.told: list[Effect] = []
        self.again()

    def again(self) -> Download:
        self.download = Download(
            SNAPSHOT,
            total=self.total,
            chunk_nbytes=CHUNK_BYTES,
            book=self.book,
            fetches=self.fetches,
            out=self.out,
            ended=lambda at, how: self.ended.append((at, how)),
        )
        return self.download

    def begin(self, now: float, *donors: PeerId) -> None:
        for donor in donors:
            self.download.add_donor(now, donor)
        self.download.start(now, self.done)
        self.look()

    def look(self) -> None:
        effects = take(self.out)
        self.told += effects
        gone = {x.ticket for x in of_kind(effects, CancelFetch)}
        self.flying = [x for x in [*self.flying, *of_kind(effects, Fetch)] if x.ticket not in gone]

    def answer(self, now: float, fetch: Fetch, reason: str | None = None) -> None:
        self.flying.remove(fetch)
        if reason is None:
            self.done += range(fetch.first, fetch.first + fetch.count)
        self.fetches.finished(now, fetch.ticket, reason)
        self.look()

    def of(self, donor: PeerId) -> list[Fetch]:
        return [x for x in self.flying if x.peer == donor]

    def play(self, now: float, rates: dict[PeerId, float], until: float = 1e6) -> float:
        """Every donor sends one range after another at its rate (0: never), up to the end."""
        busy = dict.fromkeys(rates, now)
        while not self.ended and now < until:
            times = [
                (busy[d] + self.of(d)[0].count * CHUNK_BYTES / rate, d)
                for d, rate in rates.items()
                if rate and self.of(d)
            ]
            at, donor = min(times, default=(math.inf, A))
            due = min(self.fetches.deadline(), self.download.deadline())
            if due < at:
                now = max(now, due)
                self.fetches.tick(now)
                self.download.tick(now)
                self.look()
                continue
            assert at < math.inf, "nothing goes on and nothing is waited for"
            now = busy[donor] = max(now, at)
            self.answer(now, self.of(donor)[0])
        return now

    def dropped(self) -> list[tuple[str, str]]:
        notices = events(self.told, fx.Notice)
        return [
            (str(x.fields["peer"]), str(x.fields["reason"]))
            for x in notices
            if x.name == "donor_dropped"
        ]


def test_each_chunk_comes_once_and_the_faster_donor_sends_more() -> None:
    scene = Scene(200)
    scene.begin(0.0, A, B)
    end = scene.play(0.0, {A: 8e6, B: 1e6})
    assert sorted(scene.done) == list(range(200))
    assert scene.ended == [(end, ARRIVED)]
    assert scene.download.used[A] > 4 * scene.download.used[B]
    assert end < 1.25 * 200 * CHUNK_BYTES / 9e6, "both uplinks are used to the end"
    assert scene.dropped() == []


def test_first_ranges_are_short_and_grow_with_the_measured_rate() -> None:
    scene = Scene(200)
    scene.begin(0.0, A)
    assert [x.count for x in scene.flying] == [1] * RANGES_PER_DONOR
    scene.play(0.0, {A: 50e6}, until=0.5)
    assert max(x.count for x in scene.flying) == RANGE_CHUNKS_MAX


def test_the_header_of_a_state_says_nothing_of_a_rate() -> None:
    """It comes after one round trip, however slow its donor is."""
    scene = Scene(17)
    scene.begin(0.0, A, B, C)
    (header,) = [x for x in scene.flying if x.first == 0]
    scene.answer(0.4, header)
    assert header.count == 1 and scene.book.rate(header.peer) is None
    assert [x.count for x in scene.of(header.peer)] == [1] * RANGES_PER_DONOR
    end = scene.play(0.4, {A: 0.3e6, B: 0.3e6, C: 0.3e6})
    assert scene.dropped() == []
    assert end < 1.25 * 16 * CHUNK_BYTES / 0.9e6 + 2 * CHUNK_BYTES / 0.3e6


def test_what_is_here_already_is_not_asked_for() -> None:
    have = (0, 1, 2, 7, 39)
    scene = Scene(40, have)
    scene.begin(0.0, A)
    scene.play(0.0, {A: 5e6})
    assert sorted(scene.done) == list(range(40))
    assert scene.download.here == len(have)
    assert sum(scene.download.used.values()) == 40 - len(have)


def test_all_here_needs_nobody() -> None:
    scene = Scene(8, tuple(range(8)))
    scene.begin(1.0)
    assert scene.ended == [(1.0, ARRIVED)] and scene.flying == []


def test_a_chunk_outside_of_the_blob_is_our_own_mistake() -> None:
    with pytest.raises(LocalProtocolError):
        Scene(8).download.start(0.0, [8])


def test_a_donor_that_stalls_at_99_percent_is_taken_over_from() -> None:
    """The last range is late by what another donor would need for it, not by a deadline."""
    scene = Scene(100)
    scene.begin(0.0, A, B)
    last = scene.play(0.0, {A: 10e6, B: 10e6}, until=8.0)
    assert len(scene.done) > 50 and not scene.ended
    end = scene.play(last, {A: 10e6, B: 0.0})
    assert sorted(scene.done) == list(range(100)) and scene.ended == [(end, ARRIVED)]
    assert scene.dropped() == [(B.hex(), "slow")]
    without = last + (100 * CHUNK_BYTES) / 10e6
    assert end < without + TAKEOVER_S + TAKEOVER_FACTOR * RANGE_CHUNKS_MAX * CHUNK_BYTES / 10e6
    assert scene.book.rests(end, B) and not scene.book.rests(end, A)


def test_a_donor_that_stalls_alone_fails_by_a_deadline_from_its_measured_rate() -> None:
    scene = Scene(100)
    scene.begin(0.0, A)
    last = scene.play(0.0, {A: 1e6}, until=20.0)
    rate = scene.book.rate(A)
    assert rate is not None and rate == pytest.approx(1e6, rel=0.3)
    longest = max(x.count for x in scene.flying)
    coming = (RANGES_PER_DONOR + 1) * longest * CHUNK_BYTES
    end = scene.play(last, {A: 0.0})
    assert scene.ended == [(end, FAILED)]
    assert (A.hex(), "timeout") in scene.dropped()
    assert end - last <= BASE_TIMEOUT_S + SLOWDOWN_MAX * coming / rate + 1.0
    assert scene.book.rate(A) < rate, "what it promised is not believed again"


def test_nobody_is_waited_for_below_the_minimum_rate() -> None:
    """However slow a donor was before: absurdly slow is the same as gone."""
    scene = Scene(4)
    scene.book.sent(A, 100, 100.0)  # one byte per second
    scene.begin(0.0, A)
    (fetch, other) = scene.flying
    assert scene.fetches.deadline() <= BASE_TIMEOUT_S + fetch.count * CHUNK_BYTES / (
        limits.FETCH_RATE_BYTES_PER_S_MIN
    )
    assert other.count == 1


def test_a_liar_is_named_and_never_asked_for_this_state_again() -> None:
    scene = Scene(40)
    scene.begin(0.0, A, B)
    scene.answer(1.0, scene.of(A)[0], "corrupt")
    assert faults(scene.told) == [("corrupt_chunk", A)]
    assert scene.dropped() == [(A.hex(), "corrupt")]
    for fetch in scene.of(A):  # what it had been asked for may still come
        scene.answer(1.1, fetch)
    end = scene.play(1.1, {B: 5e6})
    assert sorted(scene.done) == list(range(40)) and scene.ended == [(end, ARRIVED)]
    scene.again().add_donor(end, A)
    assert scene.download.donors == []


def test_only_a_liar_is_left() -> None:
    scene = Scene(40)
    scene.begin(0.0, A)
    for fetch in list(scene.flying):
        scene.answer(1.0, fetch, "corrupt")
    assert scene.ended == [(1.0, FAILED)]


@pytest.mark.parametrize("reason", ["refused:unknown", "refused:busy", "disconnected", "timeout"])
def test_a_donor_that_fails_is_replaced_and_rests(reason: str) -> None:
    scene = Scene(40)
    scene.begin(0.0, A, B)
    scene.answer(1.0, scene.of(A)[0], reason)
    assert (scene.dropped() == []) == reason.startswith("refused")
    scene.play(1.0, {A: 5e6, B: 5e6})
    assert sorted(scene.done) == list(range(40))
    scene.book.failed(100.0, A)
    scene.again()
    scene.download.add_donor(100.5, A)
    scene.download.add_donor(100.5, C)
    scene.download.start(100.5, ())
    scene.look()
    assert scene.of(A) == [] and len(scene.of(C)) == RANGES_PER_DONOR


def test_who_failed_lately_is_asked_if_there_is_no_other() -> None:
    scene = Scene(40)
    scene.book.failed(0.0, A)
    scene.begin(0.5, A)
    assert len(scene.of(A)) == RANGES_PER_DONOR
    for _ in range(20):
        scene.book.failed(1.0, A)
    assert scene.book.rests(1.0 + REST_S_MAX - 0.1, A)
    assert not scene.book.rests(1.0 + REST_S_MAX, A)


def test_hashes_come_first_from_whoever_gives_them() -> None:
    total = limits.CHUNKS_PER_FETCH_MAX + 10
    scene = Scene(total)
    hashed: list[float] = []
    for donor in (A, B):
        scene.download.add_donor(0.0, donor)
    scene.download.ask_hashes(0.0, hashed.append)
    scene.look()
    (first,) = scene.flying
    assert first.purpose == fx.SnapshotLeaves(SNAPSHOT) and first.peer == A
    scene.answer(0.1, first, "refused:unknown")
    spans = []
    while scene.flying:
        (fetch,) = scene.flying
        assert fetch.peer == B
        spans.append((fetch.first, fetch.count))
        scene.answer(0.2, fetch)
    assert spans == [(0, limits.CHUNKS_PER_FETCH_MAX), (limits.CHUNKS_PER_FETCH_MAX, 10)]
    assert hashed == [0.2]
    scene.download.start(0.3, range(5, total))
    scene.look()
    assert sum(x.count for x in scene.flying) <= 5


def test_without_anybody_who_gives_hashes_it_fails() -> None:
    scene = Scene(40)
    scene.download.add_donor(0.0, A)
    scene.download.ask_hashes(0.0, lambda at: None)
    scene.look()
    scene.answer(1.0, scene.flying[0], "timeout")
    assert scene.ended == [(1.0, FAILED)]


def test_cancelled_it_says_nothing_more() -> None:
    scene = Scene(40)
    scene.begin(0.0, A, B)
    scene.download.cancel()
    scene.look()
    assert scene.flying == [] and scene.ended == []
    scene.download.add_donor(1.0, C)
    scene.look()
    assert scene.flying == [] and scene.download.deadline() == math.inf


def test_the_book_is_bounded() -> None:
    book = Donors()
    for number in range(2 * limits.MEMBERS_MAX):
        book.sent(PeerId(number.to_bytes(32, "big")), 1000, 1.0)
    assert book.rate(PeerId((0).to_bytes(32, "big"))) is None
    assert book.rate(PeerId((2 * limits.MEMBERS_MAX - 1).to_bytes(32, "big"))) == 1000.0
