"""The leader and members that differ: who is waited for, how long, and what being late costs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.rounds.policy import RoundPolicy
from tests.protocols.leader_kit import Chair, hash_of, held
from tests.protocols.rounds_kit import CHUNK, TRAIN, A, B, C, D

PHASE_S = 20.0
OFF = RoundPolicy("fp32", "fp32", chunk_values=CHUNK, overlap="off")
EAGER = RoundPolicy("fp32", "fp32", chunk_values=CHUNK, overlap="eager")


def chair(policy: RoundPolicy = OFF) -> Chair:
    found = Chair(A, B, C, D, policy=policy)
    found.report(1.0, A, B, C, D)
    return found


def opened_by(found: Chair, now: float) -> e.RoundOpened:
    found.leader.step(now)
    (body,) = found.commit(now)
    assert isinstance(body, e.RoundOpened)
    return body


def everybody(found: Chair, now: float, number: int = 0, **changes: object) -> e.RoundOpened:
    for peer, phase_s in ((A, PHASE_S), (B, PHASE_S + 1), (C, 5 * PHASE_S), (D, PHASE_S + 2)):
        found.ready(now, peer, phase_s=phase_s, base_round=number, **changes)
    return opened_by(found, now)


def commit(found: Chair, now: float, opened: e.RoundOpened) -> None:
    """The open attempt is decided; everybody applies it."""
    found.log.add(e.RoundSet(opened.key, (e.Coefficient(0, 1.0),)))
    found.log.add(e.RoundCommitted(opened.key, hash_of("result"), (A, B, C)))
    found.leader.reconcile(now)
    found.report(now, A, B, C, D, round=opened.key.round + 1)


def test_the_pace_of_the_faster_half_is_logged() -> None:
    found = chair()
    assert everybody(found, 2.0).phase_s == PHASE_S + 1
    assert found.log.ledger.channels[TRAIN].phase_s == PHASE_S + 1


@pytest.mark.parametrize(("policy", "share"), [(OFF, 0.1), (EAGER, 0.25)])
def test_a_slow_member_is_waited_for_a_share_of_a_phase_after_half_are_ready(
    policy: RoundPolicy, share: float
) -> None:
    found = chair(policy)
    commit(found, 30.0, everybody(found, 2.0))
    found.ready(50.0, A, phase_s=PHASE_S, base_round=1)
    found.leader.step(52.9)
    assert found.proposed == []
    found.ready(53.0, B, phase_s=PHASE_S, base_round=1)  # half of four
    found.ready(53.1, D, phase_s=PHASE_S, base_round=1)
    over = 53.0 + share * PHASE_S
    found.leader.step(over - 0.01)
    assert found.proposed == []
    assert found.leader.deadline() == pytest.approx(over, abs=0.2)
    body = opened_by(found, over)
    assert [c.member for c in body.contributors] == sorted([A, B, D])


def test_members_whose_phases_begin_at_other_times_are_not_left_out_in_turns() -> None:
    """Two are ready right after an attempt was opened, two half a phase later: all are in the
    next one, a phase after the last.
    """
    found = chair(EAGER)
    commit(found, 30.0, everybody(found, 29.0))
    for peer in (A, B):
        found.ready(31.0, peer, phase_s=PHASE_S, base_round=1)
    found.leader.step(31.0 + PHASE_S / 2)
    assert found.proposed == []
    for peer in (C, D):
        found.ready(31.0 + PHASE_S / 2, peer, phase_s=PHASE_S, base_round=1)
    assert len(opened_by(found, 31.0 + PHASE_S / 2).contributors) == 4
    late = chair(EAGER)
    commit(late, 30.0, everybody(late, 29.0))
    for peer in (A, B):
        late.ready(31.0, peer, phase_s=PHASE_S, base_round=1)
    late.leader.step(28.9 + PHASE_S)
    assert late.proposed == [], "a phase has not gone by since the last attempt"
    assert len(opened_by(late, 29.1 + PHASE_S).contributors) == 2


def test_a_fast_minority_does_not_leave_the_others_behind() -> None:
    """One of four is ready early: the clock of the grace time has not begun."""
    found = chair()
    commit(found, 30.0, everybody(found, 2.0))
    commit(found, 60.0, everybody(found, 59.0, 1))
    found.ready(61.0, C, phase_s=1.0, base_round=2)
    pace_s = PHASE_S + 1
    over = 60.0 + pace_s + 0.1 * pace_s
    found.leader.step(over - 0.1)
    assert found.proposed == [], "a phase after the decision at 60, and the grace time"
    assert opened_by(found, over + 0.1).contributors[0].member == C


def test_the_grace_of_the_run_key_counts_from_the_first_announcement() -> None:
    found = chair(RoundPolicy("fp32", "fp32", grace_s=9.0, chunk_values=CHUNK))
    for peer in (A, B, D):
        found.ready(2.0, peer, phase_s=PHASE_S)
    found.leader.step(10.9)
    assert found.proposed == []
    assert len(opened_by(found, 11.0).contributors) == 3


@pytest.mark.parametrize(("policy", "lates"), [(OFF, (0, 1, 2)), (EAGER, (0, 0, 1))])
def test_a_late_contribution_is_listed_with_its_discount(
    policy: RoundPolicy, lates: tuple[int, ...]
) -> None:
    found = chair(policy)
    commit(found, 30.0, everybody(found, 2.0))
    commit(found, 60.0, everybody(found, 50.0, 1))
    for peer, base in ((A, 2), (B, 1), (D, 0)):
        found.ready(70.0, peer, base_round=base, samples=8.0)
    body = opened_by(found, 200.0)
    found_discounts = {c.member: c.discount for c in body.contributors}
    for peer, late in zip((A, B, D), lates, strict=True):
        assert found_discounts[peer] == pytest.approx((1 + late) ** -0.5, rel=1e-15)
    found.deliver_all(200.1, body)
    (chosen,) = found.commit(200.1)
    assert isinstance(chosen, e.RoundSet)
    weights = [c.samples * c.discount for c in body.contributors]
    expected = [float(np.float32(w / math.fsum(weights))) for w in weights]
    assert [c.value for c in chosen.coefficients] == pytest.approx(expected, abs=1e-7)


def test_what_was_returned_adds_displacement_and_samples_but_no_weight() -> None:
    found = chair(OFF)
    for peer, phases in ((A, 1), (B, 1), (D, 3)):
        found.ready(2.0, peer, base_round=0, samples=8.0 * phases, age=phases - 1)
    body = opened_by(found, 200.0)
    found.deliver_all(200.1, body)
    (chosen,) = found.commit(200.1)
    assert isinstance(chosen, e.RoundSet)
    assert [c.value for c in chosen.coefficients] == pytest.approx([1 / 3] * 3, abs=1e-7)
    assert sorted(c.samples for c in body.contributors) == [8.0, 8.0, 24.0], "progress has them all"


def deliver(found: Chair, now: float, opened: e.RoundOpened, *who: bytes) -> None:
    indices = tuple(i for i, c in enumerate(opened.contributors) if c.member in who)
    for number, part in enumerate(opened.parts):
        found.say(now, part.owner, held(opened.key, number, indices))


@pytest.mark.parametrize(
    ("policy", "wait_s"),
    [(OFF, 0.1 * (PHASE_S + 1)), (EAGER, 0.75 * (PHASE_S + 1 - 2 * 1.0))],
)
def test_bytes_that_are_late_do_not_hold_the_set_back(policy: RoundPolicy, wait_s: float) -> None:
    found = chair(policy)
    opened = everybody(found, 2.0)
    deliver(found, 2.5, opened, A)
    deliver(found, 3.0, opened, A, B)  # half of four, one second after the opening
    deliver(found, 3.1, opened, A, B, D)
    found.leader.step(3.0 + wait_s - 0.01)
    assert found.proposed == []
    assert found.leader.deadline() == pytest.approx(3.0 + wait_s, abs=0.2)
    found.leader.step(3.0 + wait_s)
    (chosen,) = found.commit(3.0 + wait_s)
    assert isinstance(chosen, e.RoundSet)
    members = [opened.contributors[c.index].member for c in chosen.coefficients]
    assert members == sorted([A, B, D])


def test_nobody_is_left_out_while_the_minimum_is_not_there() -> None:
    found = chair(RoundPolicy("fp32", "fp32", min_peers=4, chunk_values=CHUNK, overlap="off"))
    opened = everybody(found, 2.0)
    deliver(found, 3.0, opened, A, B, D)
    found.leader.step(30.0)
    assert found.proposed == []
    deliver(found, 31.0, opened, A, B, C, D)
    (chosen,) = found.commit(31.0)
    assert isinstance(chosen, e.RoundSet)
    assert len(chosen.coefficients) == 4


def test_slow_links_take_turns() -> None:
    """In mode off D's uplink needs 4.6 s more than the window: 2.1 s a round are given to that."""
    found = chair()
    rates = {"up_bytes_per_s": 0.0, "down_bytes_per_s": 0.0}
    counted: list[int] = []
    for number in range(8):
        at = 100.0 * (number + 1)
        for peer in (A, B, C):
            found.ready(at, peer, phase_s=PHASE_S + 1, base_round=number, **rates)
        slow = {"up_bytes_per_s": 1.25 * 80 / 6.7}  # 80 bytes are a contribution in fp32
        found.ready(at, D, phase_s=PHASE_S + 1, base_round=number, **slow)
        opened = opened_by(found, at)
        deliver(found, at + 0.1, opened, A, B, C)
        if not found.proposed:
            found.leader.step(at + 0.1 + 2.2)
            assert not found.proposed, "its turn: longer than the window"
            deliver(found, at + 7.0, opened, A, B, C, D)
        (chosen,) = found.commit(at + 7.0)
        assert isinstance(chosen, e.RoundSet)
        counted.append(len(chosen.coefficients))
        found.log.add(e.RoundCommitted(opened.key, hash_of("result"), (A, B, C)))
        found.leader.reconcile(at + 8.0)
        found.report(at + 8.0, A, B, C, D, round=number + 1)
    assert counted == [3, 3, 3, 4, 3, 3, 3, 4]


def test_a_slow_link_gets_no_part() -> None:
    found = chair()
    for peer, rate in ((A, 4e6), (B, 4e6), (C, 4e5), (D, 4e6)):
        found.ready(2.0, peer, up_bytes_per_s=rate, down_bytes_per_s=8e6)
    body = opened_by(found, 2.0)
    assert sorted({p.owner for p in body.parts}) == sorted([A, B, D])


def test_progress_is_the_samples_of_committed_sets_and_goes_back_with_a_rewind() -> None:
    found = chair()
    channel = found.log.ledger.channels[TRAIN]
    for number in range(3):
        opened = everybody(found, 2.0 + 20 * number, number, samples=5.0)
        both = (e.Coefficient(0, 0.5), e.Coefficient(2, 0.5))
        found.log.add(e.RoundSet(opened.key, both))
        assert channel.samples == 10.0 * number, "nothing counts before its commit"
        found.log.add(e.RoundCommitted(opened.key, hash_of("result"), (A, B, C)))
        found.leader.reconcile(10.0 + 20 * number)
        found.report(10.0 + 20 * number, A, B, C, D, round=number + 1)
    assert channel.samples == 30.0
    assert found.log.add(e.Rewound(1, "test", (TRAIN,), (1,), (hash_of("state 1"),)))
    assert channel.samples == 10.0
