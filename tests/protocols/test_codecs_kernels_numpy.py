"""NumPy kernels against plain Python: any finite fp32 input, block and slice borders."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmtrain_protocols.codecs import get_codec, kernels_numpy
from tests.protocols import reference_numbers as reference

finite = st.floats(
    min_value=-(2.0**120), max_value=2.0**120, width=32, allow_subnormal=True, allow_nan=False
)
special = st.sampled_from(
    [0.0, -0.0, 2.0**-149, -(2.0**-149), 2.0**-126, 2.0**-100, 2.0**120, -1.0, 63.5, 0.5]
)
vectors = st.lists(finite | special, min_size=1, max_size=20)


@settings(max_examples=150)
@given(values=vectors, weight=finite.filter(lambda v: abs(v) < 4), repeat=st.integers(1, 30))
def test_codecs_equal_plain_python_bit_for_bit(
    values: list[float], weight: float, repeat: int
) -> None:
    values = values * repeat  # up to 600: short blocks, full blocks, both
    n = len(values)
    x = np.array(values, np.float32)
    acc = [reference.f32(v / 3) for v in values]
    for name in ("fp32", "bf16", "int8"):
        codec = get_codec(name)
        expected = reference.encode(name, values)
        out = bytearray(codec.encoded_nbytes(n))
        codec.encode(x, out)
        assert bytes(out) == expected
        decoded = reference.decode(name, expected, n)
        got = np.zeros(n, np.float32)
        codec.decode(expected, got)
        assert got.tobytes() == reference.pack(decoded)
        got = np.array(acc, np.float32)
        codec.decode_accumulate(expected, np.float32(weight), got)
        assert got.tobytes() == reference.pack(reference.accumulate(acc, weight, decoded))


def test_slices_do_not_show() -> None:
    n = 2 * kernels_numpy.SLICE + 300
    x = np.random.default_rng(2).standard_normal(n).astype(np.float32)
    codec = get_codec("int8")
    whole, pieces = bytearray(codec.encoded_nbytes(n)), []
    codec.encode(x, whole)
    for start in range(0, n, 256):
        piece = bytearray(codec.encoded_nbytes(min(256, n - start)))
        codec.encode(x[start : start + 256], piece)
        pieces.append(piece)
    assert bytes(whole) == b"".join(p[:4] for p in pieces) + b"".join(p[4:] for p in pieces)
    assert kernels_numpy.absmax_bits(x.view(np.int32)) == int(np.abs(x).max().view(np.int32))
    assert kernels_numpy.absmax_bits(np.zeros(0, np.int32)) == 0
