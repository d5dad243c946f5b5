"""Clip factors against vectors, and against a reference in exact fractions."""

from __future__ import annotations

import json
import struct
from fractions import Fraction
from pathlib import Path
from random import Random

import numpy as np
import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.rounds.clip import (
    clipped,
    coefficients,
    coefficients_of,
    factor_of,
    keep,
    kept_after,
    legal_norms,
    legal_squares,
    norm_of,
    reference_of,
)

VECTORS = Path(__file__).parents[2] / "protocols" / "vectors" / "clip.json"


def _floats(texts: list[str]) -> list[float]:
    return list(map(float.fromhex, texts))


def test_vectors() -> None:
    vectors = json.loads(VECTORS.read_text(encoding="utf-8"))["vectors"]
    assert len(vectors) >= 6
    for vector in vectors:
        norms = [norm_of(_floats(parts)) for parts in vector["squares"]]
        assert [n.hex() for n in norms] == vector["norms"], vector["what"]
        discounts, kept = _floats(vector["discounts"]), _floats(vector["kept"])
        lengths = [n * d for n, d in zip(norms, discounts, strict=True)]
        reference = reference_of(lengths, kept)
        assert reference.hex() == vector["reference"], vector["what"]
        factors = [factor_of(length, reference) for length in lengths]
        assert [f.hex() for f in factors] == vector["factors"], vector["what"]
        values = coefficients_of(vector["weights"], factors)
        assert [struct.pack("<f", v).hex() for v in values] == vector["coefficients"]
        after = keep(kept, [f * n for f, n in zip(factors, lengths, strict=True)])
        assert [n.hex() for n in after] == vector["kept_after"]


def test_without_anybody_loud_the_coefficients_are_those_of_the_samples_bit_for_bit() -> None:
    rng = Random(1)
    for _ in range(200):
        weights = [rng.choice([0.5, 1.0, 3.0, 1e9]) * rng.random() for _ in range(5)]
        assert coefficients_of(weights, [1.0] * 5) == coefficients_of(weights)
        total = sum(map(Fraction, weights))
        for value, weight in zip(coefficients_of(weights), weights, strict=True):
            near = np.float32(float(Fraction(weight) / total))
            assert abs(np.float32(value) - near) <= np.spacing(near)


@pytest.mark.parametrize("seed", range(20))
def test_against_fractions(seed: int) -> None:
    """No rounding but the last: NumPy's exact conversion of a fraction near to the result."""
    rng = Random(seed)
    count = rng.randrange(1, 9)
    lengths = [rng.choice([1.0, 2.0, 0.5, 64.0, 1e6]) * rng.random() for _ in range(count)]
    kept = [rng.random() for _ in range(rng.randrange(9))]
    weights = [rng.choice([0.5, 1.0, 3.0]) for _ in range(count)]
    reference = reference_of(lengths, kept)
    usual = sorted(kept)[len(kept) // 2] if kept else 0.0
    own = sorted(lengths)[len(lengths) // 2] if count >= 3 else max(lengths)
    assert reference == (usual if count < 3 and kept else max(own, usual))
    factors = [factor_of(length, reference) for length in lengths]
    for factor, length in zip(factors, lengths, strict=True):
        bound = Fraction(limits.CLIP_NORM_FACTOR) * Fraction(reference)
        exact = min(Fraction(1), bound / Fraction(length))
        assert abs(Fraction(factor) - exact) <= exact * Fraction(1, 1 << 51)
    for value, f, w in zip(coefficients_of(weights, factors), factors, weights, strict=True):
        exact_c = Fraction(f) * Fraction(w) / sum(map(Fraction, weights))
        assert abs(Fraction(value) - exact_c) <= abs(exact_c) * Fraction(1, 1 << 23) + Fraction(
            1, 10**44
        )


@pytest.mark.parametrize("noise", [0.3, 0.6, 0.9, 2.0])
def test_a_loud_quarter_turns_the_sum_only_if_the_honest_hardly_agree(noise: float) -> None:
    """-100 times the honest mean, by four of sixteen; the bound is the one of the specification."""
    rng = np.random.default_rng(5)
    signal = rng.standard_normal(4096)
    honest = signal + noise * rng.standard_normal((12, 4096))
    truth = honest.mean(axis=0)
    given = np.vstack([honest, np.tile(-100.0 * truth, (4, 1))])
    norms = [norm_of([float((row**2).sum())]) for row in given]
    reference = reference_of(norms, [])
    factors = [factor_of(n, reference) for n in norms]
    assert factors[:12] == [1.0] * 12 and max(factors[12:]) < 0.1

    def along(values: list[float]) -> float:
        return float(np.array(values) @ given @ truth)

    assert along(coefficients_of([1.0] * 16)) < 0
    agreement = float(np.linalg.norm(truth)) / reference
    turned = agreement <= limits.CLIP_NORM_FACTOR / 3
    assert (along(coefficients_of([1.0] * 16, factors)) <= 0) == turned
    assert turned == (noise == 2.0)


def test_half_of_the_members_may_do_an_eighth_and_the_others_count_in_full() -> None:
    for lengths in ([8.0, 1.0], [8.0, 7.0, 1.0, 1.0], [8.0, 8.0, 9.0, 1.0, 1.0]):
        reference = reference_of(lengths, [])
        assert [factor_of(length, reference) for length in lengths] == [1.0] * len(lengths)


def test_a_warm_up_of_three_is_not_clipped_whatever_was_before() -> None:
    assert reference_of([10.0, 11.0, 12.0], [1.0] * 8) == 11.0


def test_of_two_the_loud_one_is_measured_by_what_was_before() -> None:
    assert reference_of([1.0, 1000.0], [1.0, 1.1]) == 1.1
    assert reference_of([1.0, 1000.0], []) == 1000.0, "nobody can say who is loud"


def test_sums_that_nobody_can_honestly_report_are_no_report() -> None:
    assert legal_squares([0.0, 3.0], 2)
    for bad in (-1.0, float("nan"), float("inf")):
        assert not legal_squares([1.0, bad], 2)
    assert not legal_squares([1.0], 2) and not legal_squares([1.0, 1.0], 1)
    assert reference_of([0.0, 0.0], []) == 0.0 and factor_of(7.0, 0.0) == 1.0


def test_what_is_kept_is_bounded_and_one_alone_grows_slowly() -> None:
    kept = keep((), [1.0, 1.0, 1.0])
    for _ in range(limits.CLIP_ROUNDS_KEPT - 1):
        kept = keep(kept, [1.0])
    growth = []
    for _ in range(16):
        reference = reference_of([1e9], kept)
        growth.append(reference)
        kept = keep(kept, [factor_of(1e9, reference) * 1e9])
        assert len(kept) == limits.CLIP_ROUNDS_KEPT
    doublings = 16 / (limits.CLIP_ROUNDS_KEPT / 2)
    assert growth[:4] == [1.0] * 4 and growth[-1] <= limits.CLIP_NORM_FACTOR**doublings
    assert keep(kept, []) == keep(kept, [0.0]) == kept


# -- entries --------------------------------------------------------------------------------------

KEY = RoundKey(0, "train/0/0", 3, 0)
PEOPLE = tuple(bytes([number]) * 32 for number in range(4))


def _opened(*discounts: float) -> e.RoundOpened:
    contributors = tuple(
        e.Contributor(member, bytes(32), 4.0, 3, (), discount)
        for member, discount in zip(PEOPLE, discounts, strict=False)
    )
    parts = (e.Part(0, 1, PEOPLE[0], PEOPLE[1]),)
    return e.RoundOpened(KEY, contributors, parts, PEOPLE, 40, "fp32", "fp32", bytes(32))


def test_a_set_says_who_is_clipped_and_the_log_keeps_what_was_counted() -> None:
    opened = _opened(1.0, 1.0, 1.0, 0.25)
    norms = (1.0, 10.0, 1.0, 5.0)
    values = coefficients(opened, [0, 1, 2, 3], norms, ())
    weights = [4.0, 4.0, 4.0, 1.0]
    # lengths 1, 10, 1, 1.25: the upper median is 1.25, and 10 counts as 2.5
    assert [c.value for c in values] == coefficients_of(weights, [1.0, 0.25, 1.0, 1.0])
    chosen = e.RoundSet(KEY, values, norms)
    (loud,) = clipped(opened, chosen, ())
    assert (loud.member, loud.length, loud.reference, loud.factor) == (PEOPLE[1], 10.0, 1.25, 0.25)
    assert kept_after(opened, chosen, (3.0,)) == (3.0, 1.25)
    assert clipped(opened, chosen, (8.0,)) == []


def test_where_nobody_measures_nobody_is_clipped() -> None:
    opened = _opened(1.0, 1.0)
    chosen = e.RoundSet(KEY, coefficients(opened, [0, 1], (), (1.0,)))
    assert clipped(opened, chosen, (1.0,)) == [] and kept_after(opened, chosen, (1.0,)) == (1.0,)
    assert [c.value for c in chosen.coefficients] == [0.5, 0.5]


def test_norms_that_do_not_fit_a_set_make_it_none() -> None:
    both = (e.Coefficient(0, 0.5), e.Coefficient(1, 0.5))
    assert legal_norms(e.RoundSet(KEY, both)) and legal_norms(e.RoundSet(KEY, both, (1.0, 0.0)))
    for bad in ((1.0,), (1.0, -1.0), (1.0, float("nan")), (1.0, float("inf")), (1.0,) * 3):
        assert not legal_norms(e.RoundSet(KEY, both, bad))
