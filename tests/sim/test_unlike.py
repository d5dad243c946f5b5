"""Four members of which one computes five times slower and one has a tenth of the uplink.

Bit for bit right under trouble, and cheap for the others in calm weather; the checkers are those
of all rounds and UL1, UL2 of ``unlike_swarm``.
"""

from __future__ import annotations

import functools
from collections import Counter

import pytest

from swarmtrain_protocols.testing.nightly import explain
from swarmtrain_protocols.testing.unlike_swarm import (
    ALIKE,
    UNLIKE,
    UnlikePart,
    rounds_in,
    run_unlike,
)

SECONDS = 100.0


@functools.cache
def among_like_members(overlap: str) -> tuple[int, dict[str, float]]:
    return rounds_in(1, overlap, SECONDS, ALIKE)


@pytest.mark.parametrize(("overlap", "bar", "share"), [("eager", 0.85, 0.95), ("off", 0.75, 0.8)])
def test_slow_members_do_not_set_the_pace_and_their_samples_count(
    overlap: str, bar: float, share: float
) -> None:
    """``share``: of its samples among like members that count of who has a tenth of the uplink.

    In mode off that exchange would stand still for 40 % of a phase: its link takes turns, and
    what it did meanwhile counts when its turn has come.
    """
    alike, before = among_like_members(overlap)
    unlike, gained = rounds_in(1, overlap, SECONDS, UNLIKE)
    assert unlike >= bar * alike
    slower = unlike / alike
    for name, least in (("a", 0.9), ("b", 0.9), ("c", 0.12), ("d", share)):
        assert gained[name] >= least * slower * before[name], (name, gained, before)


STUBBORN = (("eager", 0.85), ("off", 0.8))


@pytest.mark.parametrize(("overlap", "bar"), STUBBORN)
def test_a_member_that_does_not_adapt_is_not_waited_for(overlap: str, bar: float) -> None:
    """It does twenty steps in five phases, however fast the others are."""
    stubborn = (*ALIKE[:3], UnlikePart("d", slowness=5.0, adapts=False))
    alike, _ = among_like_members(overlap)
    rounds, _ = rounds_in(1, overlap, SECONDS, stubborn)
    assert rounds >= bar * alike


def test_a_link_that_would_take_two_phases_does_not_hold_the_others_up() -> None:
    alike, _ = among_like_members("eager")
    rounds, _ = rounds_in(1, "eager", SECONDS, (*ALIKE[:3], UnlikePart("d", up_share=0.02)))
    assert rounds >= 0.85 * alike


def test_trouble_changes_nothing_of_that() -> None:
    seen: Counter[str] = Counter()
    for seed in range(4):
        outcome = run_unlike(seed)
        assert outcome.violation == "", explain(outcome)
        seen += outcome.seen
    assert seen["late:1"] > 0 and seen["round:partial"] > 0 and seen["fault:crash"] > 0
    assert seen["returned"] > 0
