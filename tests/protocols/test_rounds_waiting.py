"""Whom the leader of rounds waits for, and what it does without those who are frozen."""

from __future__ import annotations

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import PeerId
from tests.protocols.leader_kit import Chair, held
from tests.protocols.rounds_kit import A, B, C, D


def test_between_attempts_those_who_are_not_ready_once_half_are() -> None:
    chair = Chair(A, B, C, D)
    chair.report(1.0, A, B, C, D)
    assert not chair.leader.waits and chair.leader.waited(1.0) == []
    chair.ready(2.0, A)
    assert chair.leader.waited(2.0) == []
    chair.ready(2.1, B)
    assert chair.leader.waits and chair.leader.waited(2.1) == [C, D]
    chair.ready(2.2, C)
    assert chair.leader.waited(2.2) == [D]
    chair.links.remove(PeerId(D))  # it is suspected, or gone
    chair.leader.step(2.3)
    (opened,) = chair.commit(2.3)
    assert isinstance(opened, e.RoundOpened)
    assert [c.member for c in opened.contributors] == [A, B, C]


def test_before_the_set_computers_and_those_who_have_not_delivered() -> None:
    chair = Chair(A, B, C, D)
    opened = chair.open(A, B, C, D)
    owners = {part.owner for part in opened.parts}
    assert set(chair.leader.waited(1.1)) == {B, C, D}
    d = [c.member for c in opened.contributors].index(D)
    rest = tuple(i for i in range(4) if i != d)
    for index, part in enumerate(opened.parts):
        chair.say(1.2, part.owner, held(opened.key, index, rest))
    assert set(chair.leader.waited(1.3)) == (owners | {D}) - {A}
    chair.links.remove(PeerId(D))
    chair.leader.step(1.4)
    if D in owners:  # somebody else computes its part, and nobody needs what only it has
        for index, part in enumerate(opened.parts):
            if part.owner == D:
                chair.say(1.5, part.deputy, held(opened.key, index, rest))
    (chosen,) = chair.commit(1.6)
    assert isinstance(chosen, e.RoundSet) and len(chosen.coefficients) == 3


def test_after_the_set_holders_and_computers_until_the_outcome_is_proposed() -> None:
    chair = Chair(A, B, C, D)
    opened = chair.open(A, B, C, D)
    chair.choose(opened)
    assert set(chair.leader.waited(1.2)) == {B, C, D}
    chair.hold(1.3, A, opened)
    chair.hold(1.3, B, opened)
    chair.hold(1.3, C, opened)
    assert chair.leader.waited(1.4) == []  # enough hold it: a commit is proposed


def test_a_suspect_that_answers_is_linked_again_with_all_it_has_said() -> None:
    chair = Chair(A, B, C, D)
    opened = chair.open(A, B, C, D)
    chair.deliver_all(1.1, opened)
    chair.proposed.clear()
    chair.links.remove(PeerId(D))
    chair.leader.step(1.2)
    chair.links.append(PeerId(D))
    chair.leader.step(1.3)
    assert not any(isinstance(body, e.RoundAborted) for body in chair.proposed)
    assert D in chair.leader.here()
