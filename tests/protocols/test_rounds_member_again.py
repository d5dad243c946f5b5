"""What a member says again when nothing has come of it."""

from __future__ import annotations

import math

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.messages import rounds as m
from swarmtrain_protocols.rounds.member import ANNOUNCE_AGAIN_S, Offer
from tests.protocols.rounds_kit import GROUP, TRAIN, VALUES, A, hash_of, sent
from tests.protocols.test_rounds_member import MINE, Seat, brought


def test_what_waits_for_long_is_due_again_until_it_is_listed() -> None:
    """Once per interval, however often other channels are offered meanwhile."""
    seat = Seat()
    assert seat.member.deadline() == math.inf
    seat.offer()
    assert seat.member.deadline() == ANNOUNCE_AGAIN_S
    seat.member.offer(6.0, Offer(GROUP, MINE, VALUES, "fp32", 4.0, 0, 0))
    assert not seat.member.announcement_due(ANNOUNCE_AGAIN_S - 0.01)
    assert seat.member.announcement_due(ANNOUNCE_AGAIN_S)
    assert not seat.member.announcement_due(ANNOUNCE_AGAIN_S)
    assert seat.member.deadline() == 6.0 + ANNOUNCE_AGAIN_S
    for channel in (TRAIN, GROUP):
        seat.logged(12.0, seat.opening(channel=channel))
    seat.take()
    assert not seat.member.announcement_due(1000.0)


def test_a_result_that_the_log_does_not_decide_about_is_told_again() -> None:
    """What told of it may be lost, and the leader waits for it until the attempt's deadline."""
    seat = Seat()
    opened = brought(seat)
    seat.member.stored(2.5, opened.key, hash_of("result"), True)
    seat.take()
    assert not seat.member.announcement_due(0.9 + ANNOUNCE_AGAIN_S)
    assert seat.member.deadline() <= 1.0 + ANNOUNCE_AGAIN_S
    assert seat.member.announcement_due(1.0 + ANNOUNCE_AGAIN_S)
    assert not seat.member.announcement_due(1.0 + ANNOUNCE_AGAIN_S)
    seat.logged(20.0, e.RoundCommitted(opened.key, hash_of("result")))
    assert not seat.member.announcement_due(1000.0)


def test_who_computes_a_part_says_again_what_it_has_while_no_set_is_logged() -> None:
    """Seed 619 of local steps: the word of an owner was lost, and the round stood for 80 s."""
    seat = Seat(A)
    opened = seat.opening()
    seat.logged(1.0, opened)
    assert not seat.member.announcement_due(0.9 + ANNOUNCE_AGAIN_S)
    for turn in (1, 2):
        assert seat.member.announcement_due(1.0 + turn * ANNOUNCE_AGAIN_S)
        seat.member.announce(20.0)
        (again,) = [x for _, x in sent(seat.take(), m.PartsHeld)]
        assert (again.key, again.part) == (opened.key, 0)


def test_who_lost_its_contribution_says_so_again() -> None:
    seat = Seat()
    seat.logged(1.0, seat.opening(root=hash_of("of a life before")))
    seat.take()
    assert seat.member.announcement_due(1.0 + ANNOUNCE_AGAIN_S)
    seat.member.announce(1.0 + ANNOUNCE_AGAIN_S)
    assert len(sent(seat.take(), m.Withdraw)) == 1


def test_who_has_nothing_to_tell_is_silent() -> None:
    seat = Seat()
    seat.offer()
    seat.logged(1.0, seat.opening())
    assert not seat.member.announcement_due(1.0 + ANNOUNCE_AGAIN_S)
