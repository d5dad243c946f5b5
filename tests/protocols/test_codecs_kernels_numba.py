"""Compiled kernels give the bits of the NumPy ones, on any finite fp32 input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from swarmtrain_protocols.codecs import kernels, kernels_numpy, use_numba

Array = np.ndarray[Any, Any]
# Any bit pattern with an exponent below 2**120, so that no sum of a few of them overflows.
patterns = st.integers(0, (1 << 32) - 1).filter(lambda bits: (bits >> 23) & 0xFF < 127 + 120)
bits = hnp.arrays(np.uint32, st.integers(1, 700), elements=patterns, fill=patterns)
weights = st.floats(-2.0, 2.0, width=32)


@pytest.fixture(scope="module")
def numba() -> kernels.Kernels:
    use_numba(True)
    compiled = kernels.active()
    use_numba(False)
    return compiled


def assert_same(left: Array, right: Array) -> None:
    assert left.tobytes() == right.tobytes()


def int8_round_trip(k: Any, x: Array, weight: np.float32, acc: Array) -> tuple[Array, ...]:
    scales = np.full(-(-x.size // 256), np.nan, np.float32)
    codes = np.full(x.size, 77, np.int8)
    k.encode_int8(x, scales, codes)
    decoded = np.full(x.size, np.nan, np.float32)
    k.decode_int8(scales, codes, decoded)
    summed = acc.copy()
    k.accumulate_int8(scales, codes, weight, summed)
    return scales, codes, decoded, summed


def bf16_round_trip(k: Any, x: Array, weight: np.float32, acc: Array) -> tuple[Array, ...]:
    codes = np.full(x.size, 77, np.uint16)
    k.encode_bf16(x, codes)
    decoded = np.full(x.size, np.nan, np.float32)
    k.decode_bf16(codes, decoded)
    summed, plain = acc.copy(), acc.copy()
    k.accumulate_bf16(codes, weight, summed)
    k.accumulate_fp32(x, weight, plain)
    return codes, decoded, summed, plain


def outer(k: Any, x: Array, weight: np.float32, acc: Array) -> tuple[Array, ...]:
    theta, momentum = acc.copy(), x.copy()
    for _ in range(2):
        k.outer_step(theta, momentum, x, weight, np.float32(0.9))
    return theta, momentum


@settings(max_examples=120)
@given(pattern=bits, weight=weights, seed=st.integers(0, 9))
def test_bit_for_bit(numba: kernels.Kernels, pattern: Array, weight: float, seed: int) -> None:
    x = pattern.view(np.float32)
    acc = np.random.default_rng(seed).standard_normal(x.size).astype(np.float32)
    assert numba.absmax_bits(x.view(np.int32)) == kernels_numpy.absmax_bits(x.view(np.int32))
    for trip in (int8_round_trip, bf16_round_trip, outer):
        expected = trip(kernels_numpy, x, np.float32(weight), acc)
        for left, right in zip(trip(numba, x, np.float32(weight), acc), expected, strict=True):
            assert_same(left, right)


def test_large_vectors_take_the_vectorised_paths(numba: kernels.Kernels) -> None:
    rng = np.random.default_rng(3)
    scaled = rng.standard_normal(100_003) * np.exp(rng.standard_normal(100_003) * 4)
    raw = rng.integers(0, 1 << 32, 100_003, np.uint32)
    patterns = np.where((raw >> 23) & 0xFF < 127 + 120, raw, raw & 0x80FFFFFF).view(np.float32)
    denormal = (raw & np.uint32(0x807FFFFF)).view(np.float32)
    acc = rng.standard_normal(100_003).astype(np.float32)
    for x in (scaled.astype(np.float32), patterns, denormal):
        for trip in (int8_round_trip, bf16_round_trip, outer):
            expected = trip(kernels_numpy, x, np.float32(0.3), acc)
            for left, right in zip(trip(numba, x, np.float32(0.3), acc), expected, strict=True):
                assert_same(left, right)


def test_a_fused_multiply_add_would_be_noticed(numba: kernels.Kernels) -> None:
    """Inputs on which one rounding instead of two gives another result."""
    x = np.full(64, 1 + 2.0**-12, np.float32)
    acc = np.full(64, -1.0, np.float32)
    fused = np.float32(float(x[0]) * float(x[0]) - 1.0)
    rounded = np.float32(x[0] * x[0]) - np.float32(1.0)
    assert fused != rounded
    for k in (numba, kernels_numpy):
        summed = acc.copy()
        k.accumulate_fp32(x, x[0], summed)  # type: ignore[attr-defined]
        assert (summed == rounded).all()
