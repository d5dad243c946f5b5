"""The models of the specifications: the search itself, small configurations, guards taken away."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from swarmtrain_protocols.testing.model.__main__ import check, line
from swarmtrain_protocols.testing.model.configs import LARGE, MEDIUM, MUTANTS, SMALL
from swarmtrain_protocols.testing.model.consensus import GUARDS as LOG_GUARDS
from swarmtrain_protocols.testing.model.decision import GUARDS as ROUND_GUARDS
from swarmtrain_protocols.testing.model.explore import Model, Step, explore
from swarmtrain_protocols.testing.model.once import GUARDS as ONCE_GUARDS
from swarmtrain_protocols.testing.model.table import need

QUICK = (
    *("log: majority", "log: newest", "round: holders", "round: durable", "round: certified"),
    *("round: chosen", "round: deputy", "once: seen", "once: any", "once: taken out"),
    "once: undecided",
)
"""Guards whose absence shows within a second; all of them: the command."""


class Walk:
    """A walk on a line from 0 to 9 that a fault may throw into a hole, state 20."""

    def __init__(self, *, ladder: bool = True, bad: int = 99) -> None:
        self.ladder = ladder
        self.bad = bad

    def begin(self) -> bytes:
        return b"\0"

    def steps(self, state: bytes) -> Iterator[Step]:
        at = state[0]
        if at < 9:
            yield "right", False, bytes([at + 1])
        if at == 4:
            yield "fall", True, bytes([20])
        if at == 20 and self.ladder:
            yield "climb", False, bytes([0])
        if at == 5:
            yield "jump ahead", False, bytes([8])

    def broken(self, state: bytes) -> str:
        return "somebody is there" if state[0] == self.bad else ""

    def settled(self, state: bytes) -> bool:
        return state[0] == 9

    def show(self, state: bytes) -> str:
        return str(state[0])


def test_the_search_sees_every_state_once() -> None:
    found = explore(Walk())
    assert (found.states, found.transitions, found.depth) == (11, 12, 7)
    assert (found.violation, found.settled, found.complete) == ("", 1, True)
    assert found.happened == {"right": 9, "fall": 1, "climb": 1, "jump": 1}


def test_a_violation_comes_with_the_shortest_way_to_it() -> None:
    found = explore(Walk(bad=8))
    assert found.violation == "somebody is there"
    assert found.trace[0] == "begin: 0" and found.trace[-1] == "jump ahead: 8"
    assert len(found.trace) == 1 + 6


def test_a_state_without_a_way_out_is_found_and_faults_are_no_way_out() -> None:
    found = explore(Walk(ladder=False))
    assert found.violation == "stuck" and found.trace[-2] == "fall: 20"
    assert explore(Walk(ladder=False), liveness=False).violation == ""


def test_a_search_that_was_cut_off_says_so() -> None:
    found = explore(Walk(), 3)
    assert not found.complete and "NOT COMPLETE" in line("walk", found)
    assert not check([("walk", Walk())], 3)


def test_need_is_all_of_two_and_more_than_half_of_three() -> None:
    assert [need(mask) for mask in (1, 0b11, 0b111, 0b1111, 0b11111)] == [1, 2, 2, 3, 3]


@pytest.mark.parametrize(("name", "model"), SMALL, ids=[name for name, _ in SMALL])
def test_small_configurations_are_right_in_every_state(name: str, model: Model) -> None:
    found = explore(model)
    assert found.violation == "", "\n".join(found.trace)
    assert found.complete and found.settled


@pytest.mark.parametrize(
    ("name", "model"),
    [item for item in MUTANTS if item[0] in QUICK],
    ids=[name for name, _ in MUTANTS if name in QUICK],
)
def test_a_guard_that_is_taken_away_is_missed(name: str, model: Model) -> None:
    found = explore(model)
    assert found.violation and len(found.trace) > 1


def test_every_guard_is_among_those_that_are_taken_away() -> None:
    """But for those that others back up, and ``current``, which needs four terms (Raft, figure 8):
    more states than the command visits."""
    taken = [name for name, _ in MUTANTS]
    wanted = [f"log: {name}" for name in LOG_GUARDS] + [f"round: {name}" for name in ROUND_GUARDS]
    wanted += [f"once: {name}" for name in ONCE_GUARDS]
    second = ["log: current", "round: early", "once: newest", "once: age"]
    assert sorted(taken) == sorted(name for name in wanted if name not in second)
    names = [name for name, _ in (*SMALL, *MEDIUM, *LARGE)]
    assert len(set(names)) == len(names) and set(QUICK) < set(taken)
