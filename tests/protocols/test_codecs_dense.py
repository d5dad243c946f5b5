"""fp32 and bf16: bytes per value, and bf16 against PyTorch's rounding rule by hand."""

from __future__ import annotations

import numpy as np

from swarmtrain_protocols.codecs.dense import Bf16, Fp32


def test_lengths() -> None:
    assert (Fp32().encoded_nbytes(7), Bf16().encoded_nbytes(7)) == (28, 14)


def test_fp32_is_lossless_down_to_the_sign_of_zero() -> None:
    x = np.array([-0.0, 2.0**-149, 1.1, -3e29], np.float32)
    out, back = bytearray(16), np.ones(4, np.float32)
    Fp32().encode(x, out)
    assert bytes(out) == x.tobytes()
    Fp32().decode(out, back)
    assert back.tobytes() == x.tobytes()


def test_bf16_rounds_to_nearest_even() -> None:
    x = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-23, 255.5, -1.0], np.float32)
    out, back = bytearray(10), np.zeros(5, np.float32)
    Bf16().encode(x, out)
    Bf16().decode(out, back)
    assert back.tolist() == [1.0, 1 + 2.0**-6, 1 + 2.0**-7, 256.0, -1.0]
