"""Fetching states of channels that are not served here: only what the log pins, from any donor."""

from __future__ import annotations

import math

import pytest

from swarmtrain_protocols.core import CancelFetch, Effect, Emit, Fetch, PeerId, Send
from swarmtrain_protocols.messages.member import SnapshotOffer, SnapshotQuery
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.pipeline.collect import ANSWERS_S, RANGE_CHUNKS, Collector
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.fetches import Fetches
from tests.protocols.pipeline.stage_kit import StageLog, state_hash
from tests.protocols.rounds_kit import VALUES, A, B, C, D, hash_of

CHANNEL = stage_channel(1)
TIMEOUT_S = 60.0


class Desk:
    """A collector at A; the other members may have snapshots of stage 1."""

    def __init__(self, steps: int = 3, chunk_values: int = 8) -> None:
        self.log = StageLog(A, B, C, D)
        for _ in range(steps):
            self.log.step(A, B)
        self.out: list[Effect] = []
        self.fetches = Fetches(self.out)
        self.got: list[fx.Snapshot | None] = []
        self.collector = Collector(
            me=PeerId(A),
            ledger=self.log.ledger,
            fetches=self.fetches,
            out=self.out,
            chunk_values=chunk_values,
        )

    def start(self, *ask: bytes, after: int = -1, use: str = "copy") -> None:
        self.collector.start(
            0.0,
            CHANNEL,
            use,
            [PeerId(k) for k in ask],
            lambda now, found: self.got.append(found),
            timeout_s=TIMEOUT_S,
            after=after,
        )

    def offer(self, peer: bytes, *rounds: int, now: float = 0.5, root: bytes = b"") -> None:
        roots = tuple(root or state_hash(1, r) for r in rounds)
        self.collector.offered(now, PeerId(peer), SnapshotOffer(CHANNEL, rounds, roots))

    def take(self) -> list[Effect]:
        taken = list(self.out)
        self.out.clear()
        return taken

    def fetched(self, now: float = 1.0, reason: str | None = None) -> list[Fetch]:
        """Answer every fetch that was asked for since the last call."""
        asked = [x for x in self.take() if isinstance(x, Fetch)]
        for fetch in asked:
            self.fetches.finished(now, fetch.ticket, reason)
        return asked


def test_the_newest_pinned_snapshot_is_fetched_whole() -> None:
    desk = Desk()
    desk.start(B, C, A)
    asked = [x for x in desk.take() if isinstance(x, Send)]
    assert [(x.peer, x.message) for x in asked] == [(k, SnapshotQuery(CHANNEL)) for k in (B, C)]
    desk.offer(B, 0, 1)
    assert desk.take() == []
    desk.offer(C, 2, 1)
    snapshot = fx.Snapshot(CHANNEL, 2, state_hash(1, 2), VALUES, "copy")
    (fetch,) = desk.fetched()
    assert (fetch.peer, fetch.root, fetch.purpose) == (C, snapshot.root, snapshot)
    assert (fetch.first, fetch.count) == (0, 1 + -(-VALUES // 8))
    assert desk.got == [snapshot] and not desk.collector.busy(CHANNEL, "copy")
    assert desk.collector.deadline() == math.inf


def test_what_the_log_does_not_pin_is_as_good_as_nothing() -> None:
    desk = Desk()
    desk.start(B)
    desk.offer(B, 2, root=hash_of("anything"))
    assert desk.got == [None]


def test_only_newer_ones_than_what_is_here_are_wanted() -> None:
    desk = Desk()
    desk.start(B, after=1)
    desk.offer(B, 0, 1)
    assert desk.got == [None]


def test_those_who_do_not_answer_are_waited_for_a_moment_only() -> None:
    desk = Desk()
    desk.start(B, C)
    desk.offer(B, 1)
    desk.take()
    assert desk.collector.deadline() == ANSWERS_S
    desk.collector.tick(ANSWERS_S)
    assert [f.peer for f in desk.fetched()] == [B]
    desk = Desk()
    desk.start(B, C)
    desk.collector.tick(ANSWERS_S)
    assert desk.got == [None]


def test_offers_of_those_who_were_not_asked_are_ignored() -> None:
    desk = Desk()
    desk.start(B)
    desk.take()
    desk.offer(D, 2)
    assert desk.take() == [] and desk.got == []
    desk.offer(B, 1)
    desk.offer(B, 2)
    assert [f.root for f in desk.fetched()] == [state_hash(1, 1)]


def test_another_donor_takes_over_where_one_failed() -> None:
    desk = Desk(chunk_values=1)
    desk.start(B, C)
    desk.offer(B, 2)
    desk.offer(C, 2)
    first = [x for x in desk.take() if isinstance(x, Fetch)]
    assert [x.peer for x in first] == [B, B]
    assert [(x.first, x.count) for x in first] == [(0, RANGE_CHUNKS), (16, 1 + VALUES - 16)]
    desk.fetches.finished(1.0, first[0].ticket, None)
    desk.fetches.finished(1.0, first[1].ticket, "corrupt")
    faults = [x.event for x in desk.out if isinstance(x, Emit)]
    assert faults == [fx.Notice("peer_fault", {"peer": B.hex(), "fault": "corrupt_chunk"})]
    (again,) = desk.fetched()
    assert (again.peer, again.first) == (C, 16)
    assert desk.got == [fx.Snapshot(CHANNEL, 2, state_hash(1, 2), VALUES, "copy")]


def test_if_nobody_is_left_for_the_newest_an_older_one_will_do() -> None:
    desk = Desk()
    desk.start(B, C)
    desk.offer(B, 2)
    desk.offer(C, 1)
    assert [f.peer for f in desk.fetched(reason="unknown")] == [B]
    assert [f.peer for f in desk.fetched()] == [C]
    assert desk.got == [fx.Snapshot(CHANNEL, 1, state_hash(1, 1), VALUES, "copy")]
    desk = Desk()
    desk.start(B)
    desk.offer(B, 2)
    desk.fetched(reason="unknown")
    assert desk.got == [None]


def test_it_ends_in_time_and_lets_go_of_what_is_under_way() -> None:
    desk = Desk()
    desk.start(B)
    desk.offer(B, 2)
    (fetch,) = [x for x in desk.take() if isinstance(x, Fetch)]
    assert desk.collector.deadline() == TIMEOUT_S
    desk.collector.tick(TIMEOUT_S)
    assert desk.got == [None] and desk.take() == [CancelFetch(fetch.ticket)]


def test_a_cancelled_one_calls_nobody() -> None:
    desk = Desk()
    desk.start(B)
    desk.collector.cancel(CHANNEL, "copy")
    desk.offer(B, 2)
    desk.collector.tick(TIMEOUT_S)
    assert desk.got == []
    desk.collector.cancel(CHANNEL, "copy")


def test_two_uses_of_one_state_are_fetched_apart_and_one_of_them_may_end() -> None:
    desk = Desk()
    desk.start(B)
    desk.start(B, use="rebuild/2")
    desk.offer(B, 2)
    one, other = [x for x in desk.take() if isinstance(x, Fetch)]
    purposes = [x.purpose for x in (one, other)]
    assert purposes == [
        fx.Snapshot(CHANNEL, 2, state_hash(1, 2), VALUES, use) for use in ("copy", "rebuild/2")
    ]
    desk.collector.cancel(CHANNEL, "copy")
    assert not desk.collector.busy(CHANNEL, "copy")
    for piece in (other, *desk.fetched()):
        desk.fetches.finished(1.0, piece.ticket, None)
    assert desk.got == [purposes[1]]


def test_with_nobody_to_ask_it_is_over_at_once_and_one_at_a_time_is_a_rule() -> None:
    desk = Desk()
    desk.start(A)
    assert desk.got == [None]
    desk.start(B)
    with pytest.raises(AssertionError):
        desk.start(C)
