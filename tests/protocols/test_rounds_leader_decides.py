"""The leader of rounds, driven by hand: whom to sum, what to decide, whom to name."""

from __future__ import annotations

import math

import numpy as np
import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.messages import rounds as m
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.loss import DATA_LOSS_S
from tests.protocols.leader_kit import POLICY, TIMEOUT_S, Chair, held
from tests.protocols.rounds_kit import (
    GROUP,
    IDS,
    TRAIN,
    A,
    B,
    C,
    D,
    events,
    faults,
    hash_of,
    ignored,
    joined,
    sent,
)

# --- the set -------------------------------------------------------------------------------------


def test_the_set_is_who_delivered_to_all_owners_with_fp32_shares() -> None:
    chair = Chair(A, B, C)
    chair.report(1.0, A, B, C)
    for peer, samples in ((A, 1.0), (B, 2.0), (C, 5.0)):
        chair.ready(1.0, peer, samples=samples)
    (opened,) = chair.commit(1.0)
    assert isinstance(opened, e.RoundOpened)
    owners = [p.owner for p in opened.parts]
    chair.say(2.0, owners[0], held(opened.key, 0, (0, 1, 2)))
    chair.say(2.0, owners[1], held(opened.key, 1, (0, 2)))
    chair.say(2.0, owners[2], held(opened.key, 2, (0, 1, 2)))
    assert chair.proposed == []  # B is still expected
    chair.leader.step(1.0 + TIMEOUT_S)
    (chosen,) = chair.commit(1.0 + TIMEOUT_S)
    assert isinstance(chosen, e.RoundSet)
    expected = [(0, float(np.float32(1 / 6))), (2, float(np.float32(5 / 6)))]
    assert [(c.index, c.value) for c in chosen.coefficients] == expected


def test_a_contributor_that_is_gone_or_refused_is_not_waited_for() -> None:
    chair = Chair(A, B, C, D)
    opened = chair.open(A, B, C, D)
    lost = [c.member for c in opened.contributors].index(D)
    bad = [c.member for c in opened.contributors].index(C)
    rest = tuple(i for i in range(4) if i not in (lost, bad))
    chair.gone(1.5, D)
    for index, part in enumerate(opened.parts):
        owner = part.owner if part.owner != D else part.deputy
        chair.say(1.6, owner, held(opened.key, index, rest, (bad,)))
    (chosen,) = chair.proposed
    assert isinstance(chosen, e.RoundSet)
    assert tuple(c.index for c in chosen.coefficients) == rest


def test_a_contributor_that_lost_its_bytes_says_so() -> None:
    chair = Chair(A, B, C)
    opened = chair.open(A, B, C)
    for index, part in enumerate(opened.parts):
        chair.say(1.2, part.owner, held(opened.key, index, (0, 1)))
    assert chair.proposed == []
    chair.say(1.3, C, m.Withdraw(0, TRAIN, opened.contributors[2].root))
    (chosen,) = chair.proposed
    assert isinstance(chosen, e.RoundSet)
    assert [c.index for c in chosen.coefficients] == [0, 1]


def test_an_attempt_whose_contributors_have_all_lost_their_bytes_is_aborted_at_once() -> None:
    """All were killed right after it was opened, and are back: nobody waits for its deadline."""
    chair = Chair(A, B)
    opened = chair.open(A, B)
    for index, part in enumerate(opened.parts):
        chair.say(1.2, part.owner, held(opened.key, index, ()))
    for item in opened.contributors:
        assert chair.proposed == []
        chair.say(1.3, item.member, m.Withdraw(0, TRAIN, item.root))
    (aborted,) = chair.commit(1.3)
    assert isinstance(aborted, e.RoundAborted)
    assert aborted.reason == "contributions did not arrive"


def test_an_attempt_to_which_nobody_delivers_is_aborted_in_time() -> None:
    chair = Chair(A, B)
    chair.open(A, B)
    assert chair.leader.deadline() == 1.0 + TIMEOUT_S
    chair.leader.step(1.0 + TIMEOUT_S)
    (aborted,) = chair.commit(1.0 + TIMEOUT_S)
    assert isinstance(aborted, e.RoundAborted)
    assert aborted.reason == "contributions did not arrive"


# --- deputies ------------------------------------------------------------------------------------


def test_a_lost_owner_is_replaced_by_its_deputy_and_all_are_told() -> None:
    chair = Chair(A, B, C)
    opened = chair.open(A, B, C)
    (index,) = [i for i, p in enumerate(opened.parts) if p.owner == C]
    chair.take()
    chair.gone(1.5, C)
    effects = chair.take()
    deputy = opened.parts[index].deputy
    told = sent(effects, m.TakeOver)
    assert [to for to, _ in told] == [A, B, C]
    assert {(x.part, x.deputy) for _, x in told} == {(index, deputy)}
    assert [x.fields["what"] for x in events(effects, fx.Notice)] == ["deputy"]
    chair.leader.step(1.6)
    assert sent(chair.take(), m.TakeOver) == []  # once
    # What the lost owner has said does not count any more, what its deputy says does.
    rest = tuple(i for i, c in enumerate(opened.contributors) if c.member != C)
    chair.say(1.7, C, held(opened.key, index, (0, 1, 2)))
    for number, part in enumerate(opened.parts):
        computes = part.owner if number != index else deputy
        chair.say(1.8, computes, held(opened.key, number, rest))
    (chosen,) = chair.proposed
    assert isinstance(chosen, e.RoundSet)


def test_who_has_a_new_link_is_told_again_who_took_over() -> None:
    chair = Chair(A, B, C)
    opened = chair.open(A, B, C)
    (index,) = [i for i, p in enumerate(opened.parts) if p.owner == C]
    chair.gone(1.5, C)
    chair.take()
    deputy = opened.parts[index].deputy
    chair.leader.connected(PeerId(B))
    told = [(to, x.part, x.deputy) for to, x in sent(chair.take(), m.TakeOver)]
    assert told == [(B, index, deputy)]
    chair.leader.connected(PeerId(IDS[6]))
    assert sent(chair.take(), m.TakeOver) == []  # it is not in the round


def test_who_lacks_a_result_is_told_again_who_took_over() -> None:
    chair = Chair(A, B, C)
    opened = chair.open(A, B, C)
    index, *_ = (i for i, p in enumerate(opened.parts) if p.owner == C)
    chair.gone(1.5, C)
    chair.take()
    for missing, told in ((), []), ((index,), [(B, index, opened.parts[index].deputy)]):
        chair.say(2.0, B, m.Complaint(opened.key, missing))
        assert [(to, x.part, x.deputy) for to, x in sent(chair.take(), m.TakeOver)] == told


def test_an_owner_lost_while_the_set_is_being_logged_is_replaced_at_once_after_it() -> None:
    chair = Chair(A, B, C)
    opened = chair.open(A, B, C)
    chair.deliver_all(1.1, opened)
    chair.take()
    chair.gone(1.2, C)
    assert sent(chair.take(), m.TakeOver) == []  # the set is on its way
    chair.commit(1.3)
    assert sent(chair.take(), m.TakeOver) != []


def test_a_part_that_nobody_can_compute_ends_the_attempt() -> None:
    chair = Chair(A, B)
    chair.log.add(joined(A, reachable=False))
    opened = chair.open(A, B)
    assert {p.owner for p in opened.parts} == {B}
    chair.gone(1.5, B)
    (aborted,) = chair.proposed
    assert isinstance(aborted, e.RoundAborted) and aborted.reason == "owner lost, no deputy"


def test_a_new_leader_takes_an_open_attempt_on() -> None:
    chair = Chair(A, B, C)
    opened = chair.open(A, B, C)
    chair.leader.activate(2.0, False)
    chair.deliver_all(2.1, opened)
    assert chair.proposed == [] and chair.leader.deadline() == math.inf
    chair.leader.activate(3.0, True)
    chair.deliver_all(3.1, opened)
    (chosen,) = chair.commit(3.1)
    assert isinstance(chosen, e.RoundSet)
    for peer in (A, B):
        chair.hold(3.2, peer, opened)
    assert [type(x) for x in chair.proposed] == [e.RoundCommitted]


# --- the decision --------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "need"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3)])
def test_a_majority_of_the_holders_commits_all_of_them_if_two_or_fewer(
    count: int, need: int
) -> None:
    people = IDS[:count]
    chair = Chair(*people)
    opened = chair.open(*people)
    chair.choose(opened)
    for done, peer in enumerate(people, 1):
        assert chair.proposed == []
        chair.hold(1.2, peer, opened)
        if done == need:
            break
    (committed,) = chair.commit(1.2)
    assert committed == e.RoundCommitted(opened.key, hash_of("result"), tuple(people[:need]))


def test_with_fewer_than_three_holders_the_result_has_to_be_on_disk() -> None:
    chair = Chair(A, B)
    opened = chair.open(A, B)
    chair.choose(opened)
    chair.hold(1.2, A, opened)
    chair.say(1.2, B, m.Holding(opened.key, hash_of("result"), False))
    (aborted,) = chair.proposed
    assert isinstance(aborted, e.RoundAborted) and aborted.reason == "a result is not on disk"


def test_groups_have_no_disk_rule() -> None:
    chair = Chair(A, B, model=False)
    for peer in (A, B):
        chair.ready(1.0, peer, GROUP, expect=2)
    (opened,) = chair.commit(1.0)
    assert isinstance(opened, e.RoundOpened)
    chair.choose(opened)
    for peer in (A, B):
        chair.say(1.2, peer, m.Holding(opened.key, hash_of("result"), False))
    assert [type(x) for x in chair.proposed] == [e.RoundCommitted]


def test_one_liar_is_outvoted_and_named() -> None:
    """Bad input: a holder that reports another root must not end every attempt."""
    chair = Chair(A, B, C)
    opened = chair.open(A, B, C)
    chair.choose(opened)
    chair.take()
    chair.hold(1.2, B, opened, "lie")
    chair.hold(1.3, A, opened)
    assert chair.proposed == []
    chair.hold(1.4, C, opened)
    (committed,) = chair.commit(1.5)
    assert committed == e.RoundCommitted(opened.key, hash_of("result"), (A, C))
    assert faults(chair.take()) == [("wrong_result", B)]


def test_results_that_can_reach_no_majority_end_the_attempt_at_once() -> None:
    chair = Chair(A, B, C)
    opened = chair.open(A, B, C)
    chair.choose(opened)
    for peer, root in ((A, "one"), (B, "two"), (C, "three")):
        assert chair.proposed == []
        chair.hold(1.2, peer, opened, root)
    (aborted,) = chair.proposed
    assert isinstance(aborted, e.RoundAborted) and aborted.reason == "results differ"


def test_too_few_holders_left_end_the_attempt_after_a_moment() -> None:
    chair = Chair(A, B, C)
    opened = chair.open(A, B, C)
    chair.choose(opened)
    chair.hold(1.2, A, opened)
    chair.gone(2.0, B)
    chair.gone(2.1, C)
    assert chair.proposed == []
    assert chair.leader.deadline() == 2.1 + POLICY.lost_grace_s
    chair.leader.step(2.1 + POLICY.lost_grace_s)
    (aborted,) = chair.proposed
    assert isinstance(aborted, e.RoundAborted) and aborted.reason == "too many holders lost"


def test_an_owner_that_dies_with_the_only_copy_of_its_contribution_ends_the_attempt_soon() -> None:
    """Its deputy can never sum the part: that is known long before the deadline."""
    for holder in (None, B, C):
        chair = Chair(A, B, C)
        opened = chair.open(A, B, C)
        chair.choose(opened)
        part = next(i for i, p in enumerate(opened.parts) if p.owner == C)
        if holder is not None:
            chair.hold(1.5, holder, opened)  # B: the result is out already, others get it there
        chair.gone(2.0, C)
        deputy = chair.leader._phases[TRAIN].deputies[part]
        chair.say(2.1, deputy, held(opened.key, part, (0, 1)))
        chair.leader.step(2.1 + POLICY.lost_grace_s - 0.01)
        assert chair.proposed == []
        chair.leader.step(2.1 + POLICY.lost_grace_s)
        reasons = [body.reason for body in chair.proposed]  # type: ignore[attr-defined]
        assert reasons == ([] if holder == B else ["a chosen contribution is lost"])


def test_a_holder_that_is_back_in_time_saves_the_attempt() -> None:
    chair = Chair(A, B, C)
    opened = chair.open(A, B, C)
    chair.choose(opened)
    chair.hold(1.2, A, opened)
    for peer in (B, C):
        chair.gone(2.0, peer)
    chair.links.append(PeerId(B))
    chair.leader.step(2.5)
    chair.leader.step(4.0)
    assert chair.proposed == []
    chair.hold(4.1, B, opened)
    assert [type(x) for x in chair.proposed] == [e.RoundCommitted]


def test_a_holder_that_is_leaving_still_counts_until_it_is_gone() -> None:
    chair = Chair(A, B)
    opened = chair.open(A, B)
    chair.leader.leaving(PeerId(B))
    chair.choose(opened)
    chair.leader.step(4.0)
    assert chair.proposed == []
    for peer in (A, B):
        chair.hold(4.1, peer, opened)
    assert [type(x) for x in chair.proposed] == [e.RoundCommitted]


def test_silence_ends_the_attempt_at_its_deadline() -> None:
    chair = Chair(A, B)
    opened = chair.open(A, B)
    chair.choose(opened)
    assert chair.leader.deadline() == 1.1 + TIMEOUT_S
    chair.leader.step(1.1 + TIMEOUT_S)
    (aborted,) = chair.proposed
    assert isinstance(aborted, e.RoundAborted)
    assert aborted.reason == "holders did not report in time"
    assert opened.key == aborted.key


def test_lost_data_is_rewound_in_the_open() -> None:
    chair = Chair(A, B)
    opened = chair.open(A, B)
    chair.choose(opened)
    for peer in (A, B):
        chair.hold(1.2, peer, opened)
    chair.commit(1.2)
    chair.report(2.0, A, B, ready=False)  # both came back without the round
    assert chair.leader.deadline() <= 2.0 + DATA_LOSS_S
    chair.leader.step(2.0 + DATA_LOSS_S)
    (rewound,) = chair.proposed
    assert isinstance(rewound, e.Rewound) and rewound.rounds == (0,)


# --- bad input -----------------------------------------------------------------------------------


def test_messages_of_other_attempts_change_nothing() -> None:
    """Replayed, stale, of the future: whatever names another attempt is not of this one."""
    chair = Chair(A, B)
    opened = chair.open(A, B)
    k = opened.key
    for wrong in (
        type(k)(1, TRAIN, 0, 0),
        type(k)(0, TRAIN, 1, 0),
        type(k)(0, TRAIN, 0, 1),
        type(k)(0, "train/5/5", 0, 0),
    ):
        for peer in (A, B):
            for part in range(len(opened.parts)):
                chair.say(1.2, peer, held(wrong, part, (0, 1)))
            chair.say(1.2, peer, m.Holding(wrong, hash_of("result"), True))
    assert chair.proposed == []


def test_only_owners_say_who_has_delivered() -> None:
    """Bad input: claims about parts that the sender does not own, or that do not exist."""
    chair = Chair(A, B, C)
    chair.log.add(joined(D, trains=False))
    opened = chair.open(A, B, C)
    chair.take()
    for stranger in (D, IDS[6]):
        chair.say(1.2, stranger, held(opened.key, 0, (0, 1, 2), (0, 1, 2)))
        told = chair.take()
        assert (ignored(told), faults(told)) == ([("not_an_owner", stranger)], [])
    chair.say(1.2, A, held(opened.key, 99, (0,)))
    assert faults(chair.take()) == [("bad_part", A)]
    assert chair.proposed == []
    phase = chair.leader._phases[TRAIN]
    assert phase.held == {} and phase.refused == {}


def test_a_deputy_of_a_former_leader_is_not_accused_and_is_heard_when_it_is_this_ones() -> None:
    """A takeover is not in the log: a new leader knows of none, and whoever obeyed is honest."""
    chair = Chair(A, B, C)
    opened = chair.open(A, B, C)
    chair.leader.activate(1.3, False)
    chair.leader.activate(1.4, True)
    chair.take()
    part = next(i for i, p in enumerate(opened.parts) if C not in (p.owner, p.deputy))
    chair.say(1.5, C, held(opened.key, part, (0, 1, 2)))
    told = chair.take()
    assert (ignored(told), faults(told)) == ([("not_an_owner", C)], [])
    phase = chair.leader._phases[TRAIN]
    assert phase.held == {}
    phase.deputies[part] = C
    chair.say(1.6, C, held(opened.key, part, (0, 1, 2)))
    assert phase.held == {part: {C: (0, 1, 2)}}
    assert ignored(chair.take()) == []


def test_absurd_indices_are_neither_kept_nor_counted() -> None:
    chair = Chair(A, B)
    opened = chair.open(A, B)
    owner = opened.parts[0].owner
    for base in range(100):
        many = tuple(range(10**6 * base + 2, 10**6 * base + 1000))
        chair.say(1.2, owner, held(opened.key, 0, many, many))
    assert chair.leader._phases[TRAIN].refused == {}
    chair.deliver_all(1.3, opened)
    (chosen,) = chair.proposed
    assert isinstance(chosen, e.RoundSet)
    assert [c.index for c in chosen.coefficients] == [0, 1]


def test_holding_from_somebody_who_is_no_holder_does_not_count() -> None:
    chair = Chair(A, B, C)
    chair.log.add(joined(D, holds_state=False, trains=False))
    chair.links.append(PeerId(D))
    opened = chair.open(A, B, C)
    chair.choose(opened)
    chair.hold(1.2, D, opened, "lie")
    chair.hold(1.2, IDS[6], opened, "lie")
    chair.hold(1.2, A, opened)
    assert chair.proposed == []
    chair.hold(1.2, B, opened)
    assert [type(x) for x in chair.proposed] == [e.RoundCommitted]
