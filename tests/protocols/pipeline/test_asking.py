"""Who is asked again, and when: those that have not answered, every few seconds."""

from __future__ import annotations

from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.messages.pipeline import StepKey, StepPlan
from swarmtrain_protocols.pipeline.asking import ASK_AGAIN_S, Closing, Query
from tests.protocols.rounds_kit import A, B, C

ONE, TWO, THREE = PeerId(A), PeerId(B), PeerId(C)


def query(again_at: float = 5.0) -> Query:
    return Query(1, [], [ONE, TWO, THREE], 30.0, again_at)


def test_those_are_waited_for_that_are_there_and_have_not_answered() -> None:
    asking = query()
    asking.answers[ONE] = {}
    assert asking.waiting([ONE, TWO, THREE]) == [TWO, THREE]
    assert asking.waiting([ONE, THREE]) == [THREE]


def test_they_are_asked_again_now_and_then() -> None:
    asking = query(again_at=5.0)
    asking.answers[ONE] = {}
    assert asking.overdue(4.9, [ONE, TWO]) == []
    assert asking.overdue(5.0, [ONE, TWO]) == [TWO]
    assert asking.overdue(5.0 + ASK_AGAIN_S - 0.1, [ONE, TWO]) == []
    assert asking.overdue(5.0 + ASK_AGAIN_S, [ONE, TWO]) == [TWO]


def test_owners_are_told_the_plan_again_until_all_their_stages_are_ready() -> None:
    plan = StepPlan(StepKey(0, 0, 0), 1, (ONE, TWO), (0,), ())
    due = {(0, ONE): 1, (1, ONE): 1, (1, TWO): 1}
    closing = Closing(query(), plan, b"d" * 32, due, 30.0, 5.0)
    closing.ready[0, ONE] = closing.ready[1, TWO] = b"r" * 32
    assert not closing.complete and closing.overdue(4.0) == []
    assert closing.overdue(5.0) == [ONE]
    closing.ready[1, ONE] = b"r" * 32
    assert closing.complete and closing.overdue(50.0) == []
