"""Wall clocks that are off by hours, or lie."""

from __future__ import annotations

import random

import pytest

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.wallclock import OFF_S_MIN, WallClock

WALL_S = 1.7e9
HOUR_S = 3600.0


def peer(number: int) -> PeerId:
    return PeerId(number.to_bytes(32, "big"))


def clock_among(own_off_s: float, *others_off_s: float) -> WallClock:
    clock = WallClock(100.0, WALL_S + own_off_s)
    for number, off_s in enumerate(others_off_s):
        clock.told(100.0, peer(number), WALL_S + off_s)
    return clock


@pytest.mark.parametrize("own", [-5 * HOUR_S, 3 * HOUR_S, 400 * 24 * HOUR_S])
def test_a_clock_that_is_off_goes_by_those_of_the_others(own: float) -> None:
    clock = clock_among(own, 0.0, 0.4, -1.0)
    assert abs(clock.wall_s(160.0) - (WALL_S + 60.0)) <= 1.0
    assert abs(clock.off_s + own) <= 1.0


def test_it_is_the_median_that_counts_however_it_is_found() -> None:
    rng = random.Random(5)
    for _ in range(500):
        own, *others = (
            rng.choice((0.0, 1.0, 29.0, 31.0, HOUR_S)) * rng.choice((1, -1)) + rng.random()
            for _ in range(rng.randrange(1, 9))
        )
        differences = sorted([0.0, *(other - own for other in others)])
        middle = differences[(len(differences) - 1) // 2], differences[len(differences) // 2]
        wanted = min(middle, key=abs)
        if abs(wanted) < OFF_S_MIN:
            wanted = 0.0
        assert clock_among(own, *others).off_s == pytest.approx(wanted, abs=1e-6)


def test_small_differences_are_left_alone() -> None:
    assert clock_among(0.0, OFF_S_MIN - 1, OFF_S_MIN - 1).off_s == 0.0
    assert clock_among(0.0, OFF_S_MIN + 1, OFF_S_MIN + 1).off_s == OFF_S_MIN + 1


def test_one_peer_alone_and_any_minority_move_nothing() -> None:
    assert clock_among(0.0, 5 * HOUR_S).off_s == 0.0
    rng = random.Random(1)
    for _ in range(200):
        honest = [rng.uniform(-2.0, 2.0) for _ in range(rng.randint(1, 8))]
        liars = [rng.uniform(-1e9, 1e9) for _ in range(rng.randint(0, len(honest)))]
        others = honest + liars
        rng.shuffle(others)
        assert abs(clock_among(0.0, *others).off_s) < OFF_S_MIN, (honest, liars)


def test_who_leaves_or_says_nothing_does_not_count() -> None:
    clock = clock_among(0.0, HOUR_S, HOUR_S)
    assert clock.off_s == HOUR_S
    clock.forget(peer(0))
    assert clock.off_s == 0.0
    clock.told(100.0, peer(0), WALL_S + HOUR_S)
    clock.told(100.0, peer(1), 0)
    assert clock.off_s == 0.0
    for number in range(2 * limits.MEMBERS_MAX):
        clock.told(100.0, peer(number), WALL_S)
    assert len(clock._theirs) == limits.MEMBERS_MAX


def test_a_clock_that_is_set_and_a_machine_that_slept() -> None:
    clock = clock_among(0.0, 0.0, 0.0)
    clock.anchored(200.0, WALL_S + 100.0 + 7 * HOUR_S)
    assert clock.off_s == -7 * HOUR_S and clock.wall_s(200.0) == WALL_S + 100.0
    clock.anchored(200.0, WALL_S + 100.0)
    clock.slept(HOUR_S)
    assert clock.off_s == 0.0
    assert clock.wall_s(201.0) == WALL_S + 101.0 + HOUR_S
