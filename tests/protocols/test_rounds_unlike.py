"""Unlike members: the pace, the grace times, the discount, and shares of parts by rates."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain_protocols.rounds import unlike
from tests.protocols.rounds_kit import A, B, C, D


@pytest.mark.parametrize(
    ("round_number", "base", "hidden", "late"),
    [(7, 7, False, 0), (7, 6, False, 1), (7, 6, True, 0), (7, 5, True, 1), (7, 7, True, 0)],
)
def test_lateness_is_relative_to_what_the_mode_makes_the_rule(
    round_number: int, base: int, hidden: bool, late: int
) -> None:
    assert unlike.lateness(round_number, base, hidden) == late


def test_the_discount_is_the_inverse_root_of_the_rounds() -> None:
    found = [unlike.discount_of(late) for late in range(4)]
    assert found == pytest.approx([1.0, 2**-0.5, 3**-0.5, 0.5], rel=1e-15)
    assert (found[0], found[3]) == (1.0, 0.5)


def test_the_displacement_of_several_phases_has_the_weight_of_one() -> None:
    """Of what each of them had, if its samples are those of all of them."""
    for phases in (1, 2, 5):
        assert 80.0 * phases * unlike.discount_of(0, phases - 1) == pytest.approx(80.0, rel=1e-15)
    assert unlike.discount_of(3, 1) == 0.25


def test_the_faster_half_sets_the_pace_and_one_hiccup_does_not() -> None:
    paces = unlike.Paces()
    assert paces.pace_s() == 0.0
    for member, phase_s in ((A, 10.0), (B, 11.0), (C, 50.0), (D, 12.0)):
        paces.said(member, phase_s)
    assert paces.pace_s() == 11.0
    paces.said(B, 10.5)
    paces.said(B, 500.0)
    assert paces.pace_s() == 11.0
    paces.keep([A, C])
    assert paces.pace_s() == 10.0
    paces.keep([C])
    assert paces.pace_s() == 50.0


@pytest.mark.parametrize("absurd", [0.0, -1.0, math.nan, math.inf, 1e7, 1e300])
def test_absurd_phases_are_not_counted(absurd: float) -> None:
    paces = unlike.Paces()
    paces.said(A, absurd)
    assert paces.pace_s() == 0.0


def test_grace_times_are_shares_of_a_phase() -> None:
    assert unlike.opening_grace_s(40.0, hidden=True) == 10.0
    assert unlike.opening_grace_s(40.0, hidden=False) == 4.0
    assert unlike.opening_grace_s(1.0, hidden=True) == 2.0
    assert unlike.opening_grace_s(1e6, hidden=True) == 60.0
    assert (unlike.patience_s(1.0), unlike.patience_s(1000.0)) == (5.0, 1000.0)
    assert unlike.closing_grace_s(40.0, 5.0, hidden=True) == 22.5
    assert unlike.closing_grace_s(40.0, 5.0, hidden=False) == 4.0
    assert unlike.closing_grace_s(40.0, 39.0, hidden=True) == 2.0, "nothing of the phase is left"


@given(st.lists(st.floats(0.01, 4.0), min_size=2, max_size=40), st.integers(0, 80))
def test_shares_are_done_at_the_same_time(rates: list[float], more: int) -> None:
    """Sum 1; every owner with a share is done at T, every other one has more than T to send."""
    receivers = len(rates) + more
    shares = unlike.shares_of(rates, receivers)
    assert math.isclose(sum(shares), 1.0, rel_tol=1e-9)
    each = max(1, receivers - 2)
    times = [(1 + each * q) / r for q, r in zip(shares, rates, strict=True)]
    busy = [t for t, q in zip(times, shares, strict=True) if q > 0]
    assert math.isclose(min(busy), max(busy), rel_tol=1e-6)
    assert all(t >= max(busy) * (1 - 1e-6) for t in times)


def test_a_link_that_is_ten_times_slower_owns_nothing_among_four() -> None:
    shares = unlike.shares_of([1.0, 1.0, 0.1, 1.0], 4)
    assert shares[2] == 0.0
    assert shares[0] == pytest.approx(1 / 3)
    # 3 (T - 1) + (0.7 T - 1) = 2 for T = 6 / 3.7
    slower = unlike.shares_of([1.0, 1.0, 0.7, 1.0], 4)[2]
    assert slower == pytest.approx((0.7 * 6 / 3.7 - 1) / 2)


def test_noise_and_claims_do_not_move_the_plan() -> None:
    people = [A, B, C, D]
    assert unlike.usable_rates(people, {}) == {}
    assert unlike.usable_rates(people, {A: 1e6, B: 1.3e6, C: 0.8e6}) == {}, "all alike"
    assert unlike.usable_rates(people, {A: 1e9, B: 1e12, C: 0.2e9}) == {}, "all of them are fast"
    found = unlike.usable_rates(people, {A: 1e6, B: 1e6, C: 1e5, D: math.inf})
    assert found == {A: 1.0, B: 1.0, C: 0.1, D: 4.0}, "a claim is worth four times the median"
    assert unlike.usable_rates(people, {A: 1e6, B: 1e5, C: 1e6})[D] == 1.0, "not known: the median"


@given(st.integers(0, 5000), st.lists(st.floats(0.0, 1.0), min_size=1, max_size=50))
def test_chunks_are_dealt_whole(total: int, weights: list[float]) -> None:
    if not sum(weights) > 0:
        return
    shares = [w / sum(weights) for w in weights]
    counts = unlike.apportion(total, shares)
    assert sum(counts) == total
    assert all(abs(n - q * total) < 1 for n, q in zip(counts, shares, strict=True))
