"""What comes at the wrong time: results before their attempt, contributions after a rewind."""

from __future__ import annotations

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import Fetch, PeerId
from swarmtrain_protocols.messages import rounds as m
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.attempt import PART_DOMAIN, part_statement
from swarmtrain_protocols.rounds.member import EARLY_MAX
from tests.protocols.rounds_kit import (
    GROUP,
    IDS,
    RINGS,
    RUN,
    TRAIN,
    A,
    B,
    C,
    D,
    faults,
    hash_of,
    key,
    of_kind,
    opening,
    sent,
)
from tests.protocols.test_rounds_member import LEADER, Seat, decided


def test_a_result_that_is_announced_before_the_attempt_begins_here_is_kept() -> None:
    """In a step everything is fixed by one entry: an owner may be done before others read it."""
    seat = Seat()
    body = opening(seat.log.ledger, [A, B, C], owners=(A, B))
    ring = RINGS[IDS.index(PeerId(A))]
    root = hash_of("part 0")
    statement = part_statement(RUN, body.key, 0, root)
    result = m.PartResult(body.key, 0, root, A, ring.sign(PART_DOMAIN, statement))
    seat.member.receive(0.0, PeerId(A), result)
    late = seat.logged(0.1, body, e.RoundSet(body.key, (e.Coefficient(0, 1.0),)))
    wanted = [x for x in of_kind(late, Fetch) if isinstance(x.purpose, fx.ResultPart)]
    assert [(x.peer, x.root) for x in wanted] == [(A, root)]
    assert faults(late) == []


def test_early_results_are_bounded_and_of_what_is_ahead() -> None:
    seat = Seat()
    done = seat.log.open([A, B, C])
    seat.log.choose(done)
    seat.log.commit(done, hash_of("result"))
    late = m.PartResult(done.key, 0, hash_of("x"), A, bytes(64))
    seat.member.receive(0.0, PeerId(A), late)
    seat.member.receive(0.0, PeerId(D), m.PartResult(key(5), 0, hash_of("x"), A, bytes(64)))
    assert not seat.member._early, "what is over, and what strangers say"
    for number in range(2 * EARLY_MAX):
        ahead = m.PartResult(key(2 + number), 0, hash_of("x"), A, bytes(64))
        seat.member.receive(0.0, PeerId(A), ahead)
    assert len(seat.member._early) == EARLY_MAX


def test_a_takeover_that_comes_before_the_log_tells_who_leads_is_heard_then() -> None:
    """A new leader speaks as soon as it is one; its first entry may reach the deputy later."""
    seat = Seat()
    opened = seat.opening()
    seat.logged(1.0, opened)
    seat.member.receive(1.1, PeerId(B), m.TakeOver(opened.key, 0, C))
    seat.member.receive(1.1, IDS[6], m.TakeOver(opened.key, 0, C))
    assert of_kind(seat.take(), Fetch) == []
    seat.member.leader = PeerId(B)
    seat.member.announce(1.2)
    effects = seat.take()
    assert [x.peer for x in of_kind(effects, Fetch)] == [A, B]
    assert [(to, x.part) for to, x in sent(effects, m.PartsHeld)] == [(B, 0)]
    assert not seat.member._early, "heard once, and strangers never"


def test_a_takeover_that_comes_before_its_attempt_is_heard_when_it_begins() -> None:
    seat = Seat()
    body = opening(seat.log.ledger, [A, B, C], owners=(A, B))
    seat.member.leader = PeerId(B)
    seat.member.receive(0.0, PeerId(B), m.TakeOver(body.key, 0, C))
    assert seat.take() == []
    effects = seat.logged(0.1, body)
    assert [x.peer for x in of_kind(effects, Fetch)] == [A, B]


def test_what_was_begun_from_a_state_that_was_rewound_is_returned() -> None:
    """A trainer hands over after the rewind what it had begun before; no leader would take it."""
    seat = Seat()
    seat.log.add(e.Rewound(1, "by order", (TRAIN,), (0,), (hash_of("state 0"),), True))
    seat.member.rewound(1.0)
    seat.offer(base_round=2)
    seat.take()
    seat.member.state_is(TRAIN, 2)
    seat.member.state_is(GROUP, 0)
    assert decided(seat.take()) == [] and seat.member.undecided(TRAIN) is not None
    seat.member.state_is(TRAIN, 0)
    assert decided(seat.take()) == [("aborted", 0.0)]
    seat.offer(base_round=0)
    seat.member.state_is(TRAIN, 0)
    assert decided(seat.take()) == [] and seat.member.undecided(TRAIN) is not None


def test_owners_report_to_the_leader_what_arrives() -> None:
    seat = Seat(A)
    effects = seat.logged(1.0, seat.opening())
    (first,) = sent(effects, m.PartsHeld)
    assert first[0] == LEADER
    for fetch in of_kind(effects, Fetch):
        seat.fetches.finished(1.1, fetch.ticket, None)
    seat.member.leader = None
    for asked in of_kind(seat.take(), fx.MeasurePart):
        seat.member.measured(1.1, asked, 2.0)
    seat.member.flush_reports()
    assert seat.take() == []
    seat.member.leader = PeerId(B)
    seat.member.announce(1.2)
    ((to, report),) = sent(seat.take(), m.PartsHeld)
    assert (to, len(report.contributors)) == (B, 2)  # its own died with an earlier life
    assert report.squares == (2.0, 2.0)
