"""Copies of stages with workers of the next one: who keeps them, and how often they are renewed."""

from __future__ import annotations

import math

from swarmtrain_protocols.core import Effect, Fetch, PeerId, Send
from swarmtrain_protocols.messages.member import SnapshotOffer
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.pipeline.buddy import (
    CHECK_S,
    COPY_STEPS,
    COPY_TIME_SHARE,
    Buddy,
    buddy_of,
)
from swarmtrain_protocols.pipeline.collect import Collector
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.fetches import Fetches
from tests.protocols.pipeline.stage_kit import StageLog, state_hash
from tests.protocols.rounds_kit import IDS, VALUES, A, B, C, D, E

ONE = stage_channel(1)


def test_a_copy_is_kept_by_a_worker_of_the_next_stage_that_does_not_serve_it() -> None:
    log = StageLog(*IDS[:6])
    log.assign(A, 0, 1)
    log.assign(B, 1, 2)
    log.assign(C, 2)
    log.assign(D, 2)
    assert buddy_of(log.ledger, 1) in (C, D)
    assert buddy_of(log.ledger, 2) == A, "the ends come after the last"
    assert buddy_of(log.ledger, 0) == B
    log.assign(B, 0, 1)
    assert buddy_of(log.ledger, 0) is None, "who serves the stage needs no copy of it"


def test_copies_of_several_stages_spread() -> None:
    log = StageLog(*IDS, blocks=4)
    for member in IDS:
        log.assign(member, 1, 3)
    assert len({buddy_of(log.ledger, stage) for stage in (0, 2)}) == 2


class Desk:
    """D keeps a copy of stage 1, which A and B (or A alone) serve."""

    def __init__(self, *, endangered: bool = False) -> None:
        self.log = StageLog(A, B, C, D, E)
        self.log.assign(A, 0, 1)
        if not endangered:
            self.log.assign(B, 0, 1)
        self.log.assign(D, 2)
        self.out: list[Effect] = []
        self.fetches = Fetches(self.out)
        self.collector = Collector(
            me=PeerId(D), ledger=self.log.ledger, fetches=self.fetches, out=self.out
        )
        self.buddy = Buddy(
            me=PeerId(D),
            ledger=self.log.ledger,
            out=self.out,
            collector=self.collector,
            replicas_min=2,
        )

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.log.step(A)

    def look(self, now: float) -> list[bytes]:
        """Who is asked for snapshots."""
        self.buddy.tick(now)
        asked = [x.peer for x in self.out if isinstance(x, Send)]
        self.out.clear()
        return list(asked)

    def give(self, now: float, step: int) -> None:
        """All who were asked offer the state before ``step``; it is fetched."""
        offer = SnapshotOffer(ONE, (step,), (state_hash(1, step),))
        for peer in (A, B):
            self.collector.offered(now, PeerId(peer), offer)
        for fetch in [x for x in self.out if isinstance(x, Fetch)]:
            self.fetches.finished(now, fetch.ticket, None)


def test_a_copy_is_made_after_the_first_step_and_renewed_every_few() -> None:
    desk = Desk()
    assert desk.buddy.stages() == [1]
    assert desk.look(0.0) == [], "the first weights can be made by anybody"
    desk.steps(1)
    assert desk.look(1.0) == [] and desk.buddy.deadline() == CHECK_S
    assert desk.look(CHECK_S) == [A, B]
    desk.give(CHECK_S, 0)
    assert px.KeepCopy(fx.Snapshot(ONE, 0, state_hash(1, 0), VALUES, "copy")) in desk.out
    desk.out.clear()
    desk.steps(COPY_STEPS - 2)
    assert desk.look(2 * CHECK_S) == []
    desk.steps(1)
    assert desk.look(3 * CHECK_S) == [A, B]


def test_an_endangered_stage_is_copied_whenever_there_is_something_newer() -> None:
    desk = Desk(endangered=True)
    desk.steps(1)
    assert desk.look(0.0) == [A]
    desk.give(0.0, 0)
    desk.out.clear()
    assert desk.look(CHECK_S) == [A]


def test_copies_take_a_small_share_of_the_time_unless_the_stage_is_endangered() -> None:
    desk = Desk()
    desk.steps(1)
    assert desk.look(0.0) == [A, B]
    desk.give(50.0, 0)
    desk.out.clear()
    desk.steps(COPY_STEPS)
    rested = 50.0 / COPY_TIME_SHARE
    assert desk.look(rested - 1.0) == []
    assert desk.look(rested + CHECK_S) == [A, B]
    desk = Desk(endangered=True)
    desk.steps(1)
    assert desk.look(0.0) == [A]
    desk.give(50.0, 0)
    desk.out.clear()
    assert desk.look(55.0) == [A]


def test_a_copy_that_is_not_needed_any_more_is_dropped() -> None:
    desk = Desk()
    desk.steps(1)
    desk.look(0.0)
    desk.give(0.0, 0)
    desk.out.clear()
    desk.log.assign(D, 0, 1)
    desk.buddy.tick(CHECK_S)
    assert desk.out == [px.DropCopy(ONE)]
    desk.out.clear()
    desk.buddy.tick(2 * CHECK_S)
    assert desk.out == []


def test_runs_without_stages_have_no_buddies() -> None:
    desk = Desk()
    desk.log.ledger.pipeline.stages.clear()
    assert desk.buddy.deadline() == math.inf
