"""int8 by blocks: the layout, and what belongs to one block stays in it."""

from __future__ import annotations

import numpy as np
import pytest

from swarmtrain_protocols.codecs.block import Int8


@pytest.mark.parametrize(
    ("n", "nbytes"), [(1, 5), (256, 260), (257, 265), (1 << 18, (1 << 18) + 4096)]
)
def test_length_follows_from_the_count(n: int, nbytes: int) -> None:
    assert Int8().encoded_nbytes(n) == nbytes


def test_scales_come_first_and_codes_after() -> None:
    x = np.zeros(258, np.float32)
    x[3], x[256], x[257] = -127.0, 254.0, 1.0
    out = bytearray(Int8().encoded_nbytes(258))
    Int8().encode(x, out)
    assert np.frombuffer(out, "<f4", 2).tolist() == [1.0, 2.0]
    codes = np.frombuffer(out, np.int8, offset=8)
    assert codes[3] == -127
    assert codes[256:].tolist() == [127, 0]  # 0.5 rounds to even
    assert np.count_nonzero(codes) == 2


def test_an_outlier_costs_its_own_block_only() -> None:
    rng = np.random.default_rng(8)
    x = rng.standard_normal(1024).astype(np.float32)
    x[5] = 1e6
    out, decoded = bytearray(Int8().encoded_nbytes(1024)), np.zeros(1024, np.float32)
    Int8().encode(x, out)
    Int8().decode(out, decoded)
    assert np.abs(decoded[256:] - x[256:]).max() <= np.abs(x[256:]).max() / 254 * 1.0001
    assert np.abs(decoded[:256] - x[:256]).max() <= 1e6 / 254 * 1.0001


def test_encoding_is_idempotent() -> None:
    """Decoded values encode to the same codes, so a relayed mean loses nothing more."""
    x = np.random.default_rng(9).standard_normal(5000).astype(np.float32)
    first, second = bytearray(Int8().encoded_nbytes(5000)), bytearray(Int8().encoded_nbytes(5000))
    decoded = np.zeros(5000, np.float32)
    Int8().encode(x, first)
    Int8().decode(first, decoded)
    Int8().encode(decoded, second)
    assert first[80:] == second[80:]
    scales = np.frombuffer(first, "<f4", 20), np.frombuffer(second, "<f4", 20)
    np.testing.assert_allclose(*scales, rtol=2e-7)
