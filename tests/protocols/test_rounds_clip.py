"""Clip factors against vectors, and against a reference in exact fractions."""

from __future__ import annotations

import json
import math
import statistics
import struct
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from swarmtrain_protocols import limits
from swarmtrain_protocols.rounds.clip import (
    clipped_coefficients,
    factor_of,
    keep,
    norm_of,
    references,
)
from swarmtrain_protocols.rounds.plan import coefficients_of

VECTORS = Path(__file__).parents[2] / "protocols" / "vectors" / "clip.json"


def _kept(vector: dict[str, Any], name: str) -> dict[int, list[float]]:
    return {int(age): list(map(float.fromhex, found)) for age, found in vector[name].items()}


def test_vectors() -> None:
    vectors = json.loads(VECTORS.read_text(encoding="utf-8"))["vectors"]
    assert len(vectors) >= 5
    for vector in vectors:
        squares = [[float.fromhex(s) for s in parts] for parts in vector["squares"]]
        late, kept = vector["late"], _kept(vector, "kept")
        norms = [norm_of(parts) for parts in squares]
        assert [n.hex() for n in norms] == vector["norms"], vector["what"]
        measure = references(late, norms, kept)
        assert [m.hex() for m in measure] == vector["references"], vector["what"]
        factors = [factor_of(n, m) for n, m in zip(norms, measure, strict=True)]
        assert [f.hex() for f in factors] == vector["factors"], vector["what"]
        values = clipped_coefficients(vector["weights"], factors)
        assert [struct.pack("<f", v).hex() for v in values] == vector["coefficients"]
        clipped = [f * n if f else 0.0 for f, n in zip(factors, norms, strict=True)]
        after = keep(kept, late, clipped)
        assert {age: list(found) for age, found in after.items()} == _kept(vector, "kept_after")


def test_without_anybody_loud_the_coefficients_are_those_of_the_samples() -> None:
    weights = [4.0, 1.0, 7.0]
    assert clipped_coefficients(weights, [1.0] * 3) == coefficients_of(weights)


@pytest.mark.parametrize("seed", range(20))
def test_against_fractions(seed: int) -> None:
    """No rounding but the last: NumPy's exact conversion of a fraction near to the result."""
    rng = Random(seed)
    count = rng.randrange(1, 9)
    norms = [rng.choice([1.0, 2.0, 0.5, 64.0, 1e6]) * rng.random() for _ in range(count)]
    late = [rng.randrange(3) for _ in range(count)]
    kept = {age: [rng.random() for _ in range(rng.randrange(4))] for age in range(3)}
    weights = [rng.choice([0.5, 1.0, 3.0]) for _ in range(count)]
    for index, found in enumerate(references(late, norms, kept)):
        same = sorted([n for n, a in zip(norms, late, strict=True) if a == late[index]]
                      + kept[late[index]])  # fmt: skip
        every = sorted([*norms, *(n for values in kept.values() for n in values)])
        pool = same if len(same) > 1 else every
        assert found == pool[(len(pool) - 1) // 2]
        factor = factor_of(norms[index], found)
        exact = min(
            Fraction(1),
            Fraction(limits.CLIP_NORM_FACTOR) * Fraction(found) / Fraction(norms[index]),
        )
        assert abs(Fraction(factor) - exact) <= exact * Fraction(1, 1 << 51)
    factors = [factor_of(n, m) for n, m in zip(norms, references(late, norms, kept), strict=True)]
    for value, f, w in zip(clipped_coefficients(weights, factors), factors, weights, strict=True):
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
    measure = references([0] * 16, norms, {})
    factors = [factor_of(n, m) for n, m in zip(norms, measure, strict=True)]
    assert factors[:12] == [1.0] * 12 and max(factors[12:]) < 0.1

    def along(values: list[float]) -> float:
        return float(np.array(values) @ given @ truth)

    assert along(coefficients_of([1.0] * 16)) < 0
    agreement = float(np.linalg.norm(truth)) / measure[0]
    turned = agreement <= limits.CLIP_NORM_FACTOR / 3
    assert (along(clipped_coefficients([1.0] * 16, factors)) <= 0) == turned
    assert turned == (noise == 2.0)


def test_sums_that_nobody_can_honestly_report_count_for_nothing() -> None:
    for bad in (-1.0, math.nan, math.inf):
        assert norm_of([1.0, bad]) == math.inf
    assert factor_of(math.inf, 1.0) == factor_of(math.inf, 0.0) == 0.0
    assert references([0, 0, 0], [math.inf, 2.0, 0.0], {}) == [2.0] * 3
    assert clipped_coefficients([1.0, 1.0], [0.0, 1.0]) == [0.0, 0.5]


def test_what_is_kept_is_bounded_and_grows_by_a_factor_at_most() -> None:
    kept: dict[int, tuple[float, ...]] = {0: (1.0,) * limits.CLIP_NORMS_KEPT}
    for _ in range(limits.CLIP_NORMS_KEPT // 2):
        norms = [1e9]
        (measure,) = references([0], norms, kept)
        assert measure == 1.0, "one loud member does not raise the measure"
        kept = keep(kept, [0], [factor_of(1e9, measure) * 1e9])
        assert len(kept[0]) == limits.CLIP_NORMS_KEPT
    assert max(kept[0]) <= limits.CLIP_NORM_FACTOR * 1.0000001
    assert statistics.median_low(kept[0]) == 1.0
