"""Part tables cover every chunk once, evenly; coefficients are fp32 shares of the samples."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain_protocols import limits
from swarmtrain_protocols.entries import Part
from swarmtrain_protocols.rounds.clip import coefficients_of
from swarmtrain_protocols.rounds.plan import plan_parts
from tests.protocols.rounds_kit import A, B, C, D


def key_of(number: int) -> bytes:
    return number.to_bytes(32, "big")


@given(
    values=st.integers(1, 1 << 36),
    owners=st.integers(1, 400),
    round_number=st.integers(0, 1000),
    leads=st.integers(0, 500),
)
def test_every_chunk_has_one_owner(values: int, owners: int, round_number: int, leads: int) -> None:
    people = [key_of(number) for number in range(owners)]
    parts = plan_parts(values, people, key_of(leads), round_number)
    chunks = -(-values // limits.CHUNK_VALUES)
    place = 0
    for part in parts:
        assert part.first == place and 0 < part.count <= limits.CHUNKS_PER_FETCH_MAX
        place += part.count
    assert place == chunks
    assert len(parts) <= limits.PARTS_MAX
    assert {p.owner for p in parts} | {p.deputy for p in parts} <= set(people)
    assert all(p.owner != p.deputy for p in parts) or owners == 1
    counts = [p.count for p in parts]
    assert max(counts) - min(counts) <= 1
    load = Counter(p.owner for p in parts)
    if chunks <= limits.PARTS_MAX or len(parts) < limits.PARTS_MAX - owners:
        assert max(load.values()) - min(load.values()) <= (1 if len(parts) == chunks else 0)


def test_the_longest_vector_can_be_planned_for_any_number_of_owners() -> None:
    """It used to end the leader: a member could announce such a vector in a group call."""
    for owners in (1, 3, 7, 200, 300, 1000):
        people = [key_of(number) for number in range(owners)]
        parts = plan_parts(limits.VALUES_PER_CHANNEL_MAX, people, people[0], 5)
        assert len(parts) <= limits.PARTS_MAX
        assert sum(p.count for p in parts) == limits.VALUES_PER_CHANNEL_MAX // limits.CHUNK_VALUES


def test_a_single_chunk_goes_to_the_leader_if_it_may_own() -> None:
    for round_number in range(3):
        assert plan_parts(8, [A, B, C], B, round_number, 8) == (Part(0, 1, B, A),)
    assert plan_parts(8, [A, C], B, 0, 8) == (Part(0, 1, A, C),)


def test_owners_take_turns() -> None:
    firsts = [plan_parts(24, [A, B, C], A, number, 8)[0].owner for number in range(4)]
    assert firsts == [A, B, C, A]


def test_a_lone_owner_is_its_own_deputy() -> None:
    assert plan_parts(20, [D], A, 3, 8) == (Part(0, 3, D, D),)


def test_nonsense_is_an_assertion() -> None:
    with pytest.raises(AssertionError):
        plan_parts(0, [A], A, 0)
    with pytest.raises(AssertionError):
        plan_parts(8, [], A, 0)
    with pytest.raises(AssertionError):
        coefficients_of([0.0, 0.0])


@given(st.lists(st.floats(0, limits.SAMPLES_MAX), min_size=1, max_size=50))
def test_coefficients_are_shares(samples: list[float]) -> None:
    """AR4: not negative, finite, at most one, and they sum to one but for fp32 rounding."""
    if not sum(samples) > 0:
        return
    found = coefficients_of(samples)
    shares = np.array(samples, np.float64) / np.sum(samples, dtype=np.float64)
    expected = shares.astype(np.float32)
    assert np.all(np.abs(np.array(found) - expected) <= 2 * np.spacing(expected))
    assert all(float(np.float32(c)) == c and 0 <= c <= 1 for c in found)
    assert abs(float(np.sum(np.array(found, np.float64))) - 1.0) < 1e-5


def test_absurd_but_legal_weights_do_not_overflow() -> None:
    found = coefficients_of([limits.SAMPLES_MAX] * limits.MEMBERS_MAX)
    assert {float(c) for c in found} == {1 / limits.MEMBERS_MAX}


@given(
    values=st.integers(1, 1 << 34),
    rates=st.lists(st.floats(0, 1e12), min_size=1, max_size=60),
    round_number=st.integers(0, 1000),
    leads=st.integers(0, 60),
)
def test_unlike_rates_still_cover_every_chunk_once(
    values: int, rates: list[float], round_number: int, leads: int
) -> None:
    people = [key_of(number) for number in range(len(rates))]
    known = dict(zip(people, rates, strict=True))
    parts = plan_parts(values, people, key_of(leads), round_number, rates=known, receivers=70)
    place = 0
    for part in parts:
        assert part.first == place and 0 < part.count <= limits.CHUNKS_PER_FETCH_MAX
        place += part.count
    assert place == -(-values // limits.CHUNK_VALUES)
    assert len(parts) <= limits.PARTS_MAX
    assert all(p.owner != p.deputy for p in parts) or len(people) == 1


def test_a_slow_link_owns_less_and_is_nobodys_first_deputy() -> None:
    rates = {A: 5e6, B: 5e6, C: 5e5, D: 5e6}
    parts = plan_parts(8 * 30, [A, B, C, D], A, 1, 8, rates, 4)
    assert [(p.owner, p.count, p.deputy) for p in parts] == [(B, 10, D), (D, 10, A), (A, 10, B)]
    assert plan_parts(8, [A, B, C, D], C, 0, 8, rates, 4)[0].owner == A, "C leads, and is slow"
    alike = plan_parts(8 * 30, [A, B, C, D], A, 1, 8, dict.fromkeys(rates, 5e6), 4)
    assert alike == plan_parts(8 * 30, [A, B, C, D], A, 1, 8)
