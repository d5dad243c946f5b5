"""The leader of rounds, driven by hand: when to open, whom to sum, what to decide, whom to name."""

from __future__ import annotations

import math

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.ledger import ZERO_HASH
from swarmtrain_protocols.rounds.leader import RECHECK_S
from swarmtrain_protocols.rounds.policy import RoundPolicy
from tests.protocols.leader_kit import Chair
from tests.protocols.rounds_kit import (
    CHUNK,
    GROUP,
    TRAIN,
    VALUES,
    A,
    B,
    C,
    D,
    hash_of,
    joined,
)

# --- opening -------------------------------------------------------------------------------------


def test_a_round_opens_when_all_who_train_are_ready() -> None:
    chair = Chair(A, B, C)
    chair.report(0.5, A, B, C)
    chair.ready(1.0, C)
    chair.ready(1.0, A)
    assert chair.proposed == []
    chair.ready(1.0, B)
    (opened,) = chair.commit(1.0)
    assert isinstance(opened, e.RoundOpened)
    assert [c.member for c in opened.contributors] == [A, B, C]
    assert opened.holders == (A, B, C)
    assert opened.state_hash == hash_of("state 0")
    assert (opened.values, opened.scatter_codec, opened.gather_codec) == (VALUES, "fp32", "fp32")
    assert sum(p.count for p in opened.parts) == 3


def test_after_the_grace_time_the_quorum_will_do() -> None:
    chair = Chair(A, B, C)
    chair.report(0.5, A, B, C)
    chair.ready(3.0, A)
    assert chair.leader.deadline() == 4.0
    chair.leader.step(3.9)
    assert chair.proposed == []
    chair.leader.step(4.0)
    (opened,) = chair.proposed
    assert isinstance(opened, e.RoundOpened)
    assert [c.member for c in opened.contributors] == [A]


def test_fewer_than_the_minimum_never_open() -> None:
    chair = Chair(A, B, policy=RoundPolicy("fp32", "fp32", min_peers=2, chunk_values=CHUNK))
    chair.report(0.5, A)
    chair.ready(1.0, A)
    chair.leader.step(1e4)
    assert chair.proposed == []
    assert chair.leader.deadline() == 1e4 + RECHECK_S  # looks again, but does not spin


def test_members_that_do_not_train_or_lag_are_not_waited_for() -> None:
    chair = Chair(A, B, C, D)
    chair.report(0.5, A, B)
    chair.report(0.5, C, trains=False)
    chair.report(0.5, D, ready=False)
    chair.leader.step(3.0)  # a new leader waits a moment for reports
    chair.ready(3.0, A)
    assert chair.proposed == []
    chair.ready(3.0, B)
    assert len(chair.proposed) == 1


def test_nothing_opens_while_the_run_is_paused_or_over_and_everything_after_a_resume() -> None:
    chair = Chair(A)
    chair.report(0.5, A)
    chair.ready(1.0, A)
    (opened,) = chair.proposed
    chair.proposed.clear()
    # The pause reaches the log first: the opening behind it is ignored by everybody.
    assert chair.log.add(e.Paused("wait"))
    assert not chair.log.add(opened)
    chair.leader.reconcile(2.0)
    chair.leader.step(50.0)
    assert chair.proposed == []
    chair.log.add(e.Resumed(""))
    chair.leader.reconcile(60.0)
    assert [type(x) for x in chair.proposed] == [e.RoundOpened]
    chair.proposed.clear()
    chair.log.add(e.RunEnded("enough"))
    chair.ready(61.0, A)
    assert chair.proposed == [] and chair.leader.deadline() == math.inf


def test_a_refused_proposal_is_made_again() -> None:
    """The log takes nothing while it is cut off from a majority; nothing may hang on that."""
    chair = Chair(A, B)
    chair.refusing = True
    chair.report(1.0, A, B)
    chair.ready(1.0, A)
    chair.ready(1.0, B)
    assert chair.proposed == []
    chair.refusing = False
    assert chair.leader.deadline() < 3.0
    chair.leader.step(3.0)
    (opened,) = chair.commit(3.0)
    assert isinstance(opened, e.RoundOpened)
    chair.refusing = True
    chair.deliver_all(3.1, opened)
    chair.refusing = False
    chair.leader.step(3.2)
    (chosen,) = chair.commit(3.2)
    assert isinstance(chosen, e.RoundSet)
    chair.refusing = True
    chair.hold(3.3, A, opened)
    chair.hold(3.3, B, opened)
    chair.refusing = False
    chair.leader.step(3.4)
    assert [type(x) for x in chair.proposed] == [e.RoundCommitted]


def test_an_attempt_that_is_open_when_the_run_ends_is_still_decided() -> None:
    chair = Chair(A, B)
    opened = chair.open(A, B)
    chair.log.add(e.RunEnded("stop"))
    chair.leader.reconcile(1.05)
    chair.choose(opened)
    chair.hold(1.2, A, opened)
    chair.hold(1.2, B, opened)
    (committed,) = chair.commit(1.2)
    assert isinstance(committed, e.RoundCommitted)


def test_the_pinned_state_is_that_of_the_majority_and_others_are_no_holders() -> None:
    chair = Chair(A, B, C)
    opened = chair.open(A, B, C)
    chair.choose(opened)
    for peer in (A, B, C):
        chair.hold(1.2, peer, opened)
    chair.commit(1.2)
    chair.report(1.3, A, C, round=1)
    chair.report(1.3, B, round=1, state_hash=hash_of("another"))
    for peer in (A, B, C):
        chair.ready(1.4, peer, base_round=1)
    (body,) = chair.proposed
    assert isinstance(body, e.RoundOpened)
    assert (body.holders, body.state_hash) == ((A, C), hash_of("state 1"))
    assert [c.member for c in body.contributors] == [A, B, C]


def test_without_a_majority_for_any_state_the_run_pauses() -> None:
    chair = Chair(A, B)
    opened = chair.open(A, B)
    chair.choose(opened)
    chair.hold(1.2, A, opened)
    chair.hold(1.2, B, opened)
    chair.commit(1.2)
    chair.report(1.3, A, round=1)
    chair.report(1.3, B, round=1, state_hash=hash_of("another"))
    chair.ready(1.4, A, base_round=1)
    chair.ready(1.4, B, base_round=1)
    assert {type(x) for x in chair.proposed} == {e.Paused}


def test_members_without_state_have_no_say_about_it() -> None:
    """Bad input: a seed that claims to hold the state, with a hash of its own."""
    chair = Chair(A, B)
    for liar in (C, D):
        chair.log.add(joined(liar, holds_state=False, trains=False))
        chair.links.append(PeerId(liar))
    opened = chair.open(A, B)
    assert opened.holders == (A, B)
    chair.choose(opened)
    chair.hold(1.2, A, opened)
    chair.hold(1.2, B, opened)
    chair.commit(1.2)
    chair.report(1.3, A, B, round=1)
    chair.report(1.3, C, D, round=1, state_hash=hash_of("lie"))
    for peer in (A, B):
        chair.ready(1.4, peer, base_round=1)
    chair.leader.step(3.0)
    (body,) = chair.proposed
    assert isinstance(body, e.RoundOpened)
    assert (body.holders, body.state_hash) == ((A, B), hash_of("state 1"))


def test_outgoing_only_members_own_no_part() -> None:
    chair = Chair(A, B)
    chair.log.add(joined(C, reachable=False))
    chair.links.append(PeerId(C))
    opened = chair.open(A, B, C)
    assert {p.owner for p in opened.parts} | {p.deputy for p in opened.parts} == {A, B}


def test_a_contribution_whose_base_is_too_old_is_dropped() -> None:
    chair = Chair(A, B)
    for number in range(4):
        body = chair.log.open([A])
        chair.log.choose(body)
        chair.log.commit(body, hash_of(f"result {number}"))
    chair.leader.reconcile(1.0)
    chair.report(1.0, A, B, round=4)
    chair.ready(1.0, A, base_round=1)
    chair.ready(1.0, B, base_round=2)
    chair.leader.step(5.0)
    (opened,) = chair.proposed
    assert isinstance(opened, e.RoundOpened)
    assert [c.member for c in opened.contributors] == [B]


def test_what_was_announced_before_a_rewind_is_void() -> None:
    chair = Chair(A, B, policy=RoundPolicy("fp32", "fp32", min_peers=2, chunk_values=CHUNK))
    chair.report(0.5, A, B)
    chair.ready(1.0, A)
    chair.log.add(e.Rewound(1, "test", (TRAIN,), (0,), (hash_of("state 0"),)))
    chair.leader.reconcile(2.0)
    chair.report(2.0, A, B)
    chair.ready(2.0, B)
    chair.leader.step(100.0)
    assert chair.proposed == []
    chair.ready(100.0, A)
    assert len(chair.proposed) == 1


# --- groups --------------------------------------------------------------------------------------


def test_a_group_waits_for_as_many_as_are_expected() -> None:
    chair = Chair(A, B, C, model=False)
    chair.ready(1.0, A, GROUP, expect=2)
    chair.leader.step(10.0)
    assert chair.proposed == []
    chair.ready(11.0, C, GROUP, expect=2)
    (opened,) = chair.commit(11.0)
    assert isinstance(opened, e.RoundOpened)
    assert [c.member for c in opened.contributors] == [A, C]
    assert (opened.holders, opened.state_hash) == ((A, C), ZERO_HASH)


def test_nobody_waits_for_more_members_than_there_are() -> None:
    chair = Chair(A, B, model=False)
    for peer in (A, B):
        chair.ready(1.0, peer, GROUP, expect=1 << 50)
    assert len(chair.proposed) == 1


def test_without_expectation_a_group_waits_for_those_who_have_called_before() -> None:
    chair = Chair(A, B, C, model=False)
    chair.ready(1.0, A, GROUP)
    chair.ready(1.0, B, GROUP)
    chair.leader.step(2.9)
    assert chair.proposed == []  # the first round waits out the grace time
    chair.leader.step(3.0)
    (opened,) = chair.commit(3.0)
    assert isinstance(opened, e.RoundOpened)
    chair.choose(opened)
    chair.hold(3.2, A, opened)
    chair.hold(3.2, B, opened)
    chair.commit(3.2)
    chair.ready(4.0, A, GROUP)
    assert chair.proposed == []
    chair.ready(4.1, B, GROUP)
    assert len(chair.proposed) == 1  # C never called


def test_a_group_of_weights_zero_has_no_mean_and_does_not_open() -> None:
    chair = Chair(A, B, model=False)
    for peer in (A, B):
        chair.ready(1.0, peer, GROUP, expect=2, samples=0.0)
    chair.leader.step(100.0)
    assert chair.proposed == []
