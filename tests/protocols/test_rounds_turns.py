"""Slow links take turns: how often, by how much they need."""

from __future__ import annotations

import msgspec

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.rounds.turns import Turns
from tests.protocols.rounds_kit import A, B, C, Log

NBYTES = 80
"""Of 20 values in fp32."""


def opening(phase_s: float = 100.0) -> e.RoundOpened:
    opened = Log(A, B, C).open([A, B, C])
    return msgspec.structs.replace(opened, scatter_codec="fp32", phase_s=phase_s)


def index_of(opened: e.RoundOpened, member: bytes) -> int:
    return [c.member for c in opened.contributors].index(member)


def test_who_can_deliver_in_time_is_waited_for_like_everybody() -> None:
    opened = opening()
    rates = {A: 0.0, B: 1.25 * NBYTES / 9.0, C: 1e9}
    assert Turns().plan(opened, rates, hidden=False) == (False, ())
    assert Turns().plan(opening(0.0), {B: 1e-3}, hidden=False) == (False, ()), "no pace is known"


def test_the_longer_it_takes_the_rarer_is_its_turn() -> None:
    """Windows: a tenth of the phase where trainers wait, three quarters where they do not."""
    opened = opening()
    for seconds, hidden, every in ((15.0, False, 1), (40.0, False, 3), (80.0, True, 1)):
        turns, rates = Turns(), {B: 1.25 * NBYTES / seconds}
        for _ in range(every):
            assert turns.plan(opened, rates, hidden) == (False, (index_of(opened, B),))
            turns.decided(opened, [A, C])
        assert turns.plan(opened, rates, hidden) == (True, ())
        turns.decided(opened, [A, B, C])
        assert turns.left_out == {}


def test_who_is_left_out_and_says_no_rate_is_waited_for_next_time() -> None:
    opened, turns = opening(), Turns()
    assert turns.plan(opened, {}, hidden=True) == (False, ())
    turns.decided(opened, [A, B])
    assert turns.plan(opened, {}, hidden=True) == (True, ())
    turns.keep([A, B])
    assert turns.plan(opened, {}, hidden=True) == (False, ())
