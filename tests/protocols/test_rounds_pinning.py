"""Which state the next round is applied to, where the log does not pin it yet (08 §2.2, rule 5)."""

from __future__ import annotations

import math

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.messages.member import StateReport
from swarmtrain_protocols.rounds.pinning import HASH_PATIENCE_S, NO_MAJORITY, Pins
from tests.protocols.leader_kit import Chair
from tests.protocols.rounds_kit import TRAIN, A, B, C, D, Log, hash_of

RIGHT, WRONG = hash_of("right"), hash_of("wrong")


def after_a_round(*members: bytes) -> Log:
    """Everybody is a member; round 0 was committed and A and B were heard to hold it."""
    log = Log(*members)
    opened = log.open(members)
    log.choose(opened)
    assert log.add(e.RoundCommitted(opened.key, hash_of("result"), (A, B)))
    return log


def at(number: int, state_hash: bytes = RIGHT) -> StateReport:
    return StateReport(0, TRAIN, number, state_hash, True, True)


def test_the_quickest_is_not_believed_while_others_apply_the_result() -> None:
    pins, everybody = Pins(after_a_round(A, B, C).ledger), (A, B, C)
    reports = {A: at(1, WRONG), C: at(0)}
    assert pins.standing(5.0, TRAIN, 1, reports, everybody) is None
    assert not pins.tied(TRAIN)
    reports[B] = at(1)
    assert pins.standing(5.1, TRAIN, 1, reports, everybody) is None  # one each, and C is to come
    assert not pins.tied(TRAIN)
    reports[C] = at(1)
    assert pins.standing(5.2, TRAIN, 1, reports, everybody) == ((B, C), RIGHT)


def test_two_of_three_are_enough_at_once() -> None:
    pins = Pins(after_a_round(A, B, C).ledger)
    assert pins.standing(5.0, TRAIN, 1, {A: at(1), B: at(1), C: at(0)}, (A, B, C)) == (
        (A, B),
        RIGHT,
    )


def test_a_holder_that_is_linked_is_waited_for_and_not_for_ever() -> None:
    """B held the result and is about to apply it, or hangs."""
    pins = Pins(after_a_round(A, B).ledger)
    assert pins.standing(5.0, TRAIN, 1, {A: at(1)}, (A, B)) is None
    assert pins.deadline(5.0) == 5.0 + HASH_PATIENCE_S
    assert pins.standing(4.9 + HASH_PATIENCE_S, TRAIN, 1, {A: at(1)}, (A, B)) is None
    assert pins.standing(5.0 + HASH_PATIENCE_S, TRAIN, 1, {A: at(1)}, (A, B)) == ((A,), RIGHT)
    assert pins.deadline(5.0 + HASH_PATIENCE_S) == math.inf


def test_who_was_heard_counts_while_its_link_is_down() -> None:
    """A's memory has flipped a bit, and for a moment A is the only one that can be heard."""
    pins = Pins(after_a_round(A, B, C).ledger)
    assert pins.standing(5.0, TRAIN, 1, {A: at(1, WRONG), B: at(1), C: at(0)}, (A, B, C)) is None
    assert pins.standing(5.2, TRAIN, 1, {A: at(1, WRONG)}, (A, C)) is None
    assert pins.tied(TRAIN), "nobody knows which of the two is right"
    assert pins.standing(5.4, TRAIN, 1, {A: at(1, WRONG), C: at(1)}, (A, C)) == ((C,), RIGHT)


def test_who_has_thrown_its_state_away_counts_no_more() -> None:
    pins = Pins(after_a_round(A, B).ledger)
    assert pins.standing(5.0, TRAIN, 1, {A: at(1, WRONG), B: at(1)}, (A, B)) is None
    assert pins.standing(5.2, TRAIN, 1, {B: at(1)}, (B,)) is None
    assert pins.standing(9.0, TRAIN, 1, {A: at(0), B: at(1)}, (A, B)) == ((B,), RIGHT)


def test_states_of_another_round_do_not_count() -> None:
    log = after_a_round(A, B, C)
    pins = Pins(log.ledger)
    assert pins.standing(5.0, TRAIN, 1, {A: at(1, WRONG), B: at(1)}, (A, B)) is None
    assert pins.standing(9.0, TRAIN, 2, {C: at(2)}, (C,)) == ((C,), RIGHT)


def test_nobody_waits_for_a_holder_that_is_gone() -> None:
    pins = Pins(after_a_round(A, B).ledger)
    assert pins.standing(5.0, TRAIN, 1, {A: at(1)}, (A,)) == ((A,), RIGHT)


def test_a_newcomer_that_is_far_behind_holds_up_nobody() -> None:
    pins = Pins(after_a_round(A, B, C, D).ledger)
    reports = {A: at(1), B: at(1), D: StateReport(0, TRAIN, 0, RIGHT, False, True)}
    assert pins.standing(5.0, TRAIN, 1, reports, (A, B, C, D)) == ((A, B), RIGHT)


def test_what_the_log_pins_needs_no_majority() -> None:
    log = after_a_round(A, B, C)
    pinned = log.open((A, B, C)).state_hash
    pins = Pins(log.ledger)
    assert pins.standing(5.0, TRAIN, 1, {C: at(1, pinned)}, (A, B, C)) == ((C,), pinned)
    assert pins.standing(5.0, TRAIN, 1, {C: at(1, WRONG)}, (A, B, C)) is None
    assert not pins.tied(TRAIN)


def committed(*members: bytes) -> Chair:
    chair = Chair(*members)
    opened = chair.open(*members)
    chair.choose(opened)
    for peer in members:
        chair.hold(1.2, peer, opened)
    chair.commit(1.2)
    return chair


def test_a_run_that_paused_for_a_tie_goes_on_with_the_third() -> None:
    """One of two has a flipped bit while the third is down: nobody has to resume the run."""
    chair = committed(A, B, C)
    chair.gone(1.25, C)
    chair.report(1.3, A, round=1)
    chair.report(1.3, B, round=1, state_hash=hash_of("another"))
    for peer in (A, B):
        chair.ready(1.4, peer, base_round=1)
    assert {type(x) for x in chair.proposed} == {e.Paused}
    chair.proposed = [e.Paused(NO_MAJORITY)]
    chair.commit(1.5)
    chair.leader.step(60.0)
    assert chair.proposed == []
    chair.links.append(C)
    chair.report(61.0, C, round=1)
    assert chair.commit(61.0) == [e.Resumed(NO_MAJORITY)]
    chair.ready(61.1, A, base_round=1)
    chair.leader.step(70.0)
    (opened,) = chair.proposed
    assert isinstance(opened, e.RoundOpened)
    assert (opened.holders, opened.state_hash) == ((A, C), hash_of("state 1"))


def test_a_pause_by_order_is_not_ended_by_equal_states() -> None:
    chair = committed(A, B)
    assert chair.log.add(e.Paused("the operator wants it"))
    chair.report(1.3, A, B, round=1)
    chair.leader.step(100.0)
    assert chair.proposed == []
