"""Vectors, checks on hostile bytes and the accuracy of every codec, with both kinds of kernels."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from swarmtrain_protocols import limits
from swarmtrain_protocols.codecs import CODEC_NAMES, check_finite, get_codec, use_numba
from swarmtrain_protocols.codecs.base import check_ieee_arithmetic
from swarmtrain_protocols.errors import ConfigError, LocalProtocolError, PeerFault
from tests.protocols import reference_numbers as reference

VECTORS = json.loads((reference.VECTORS / "codecs.json").read_text())
CASES = VECTORS["cases"]


@pytest.fixture(params=[False, True], ids=["numpy", "numba"], autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    use_numba(request.param)
    yield
    use_numba(False)


def f32(hexed: str) -> np.ndarray[Any, Any]:
    return np.frombuffer(bytes.fromhex(hexed), "<f4").copy()


def test_the_vector_file_is_what_the_reference_computes() -> None:
    assert reference.build_codecs() == VECTORS


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['codec']}: {c['case']}")
def test_vectors(case: dict[str, Any]) -> None:
    codec, n = get_codec(case["codec"]), case["n"]
    encoded = bytes.fromhex(case["encoded"])
    out = bytearray(codec.encoded_nbytes(n))
    codec.encode(f32(case["values"]), out)
    assert bytes(out) == encoded
    decoded = np.full(n, np.nan, np.float32)
    codec.check(encoded, n)
    codec.decode(encoded, decoded)
    assert decoded.tobytes().hex() == case["decoded"]
    acc = f32(case["acc_before"])
    codec.decode_accumulate(encoded, f32(case["weight"])[0], acc)
    assert acc.tobytes().hex() == case["acc_after"]


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_unaligned_and_read_only_buffers_give_the_same_bytes(name: str) -> None:
    codec, n = get_codec(name), 600
    x = np.random.default_rng(1).standard_normal(n).astype(np.float32)
    nbytes = codec.encoded_nbytes(n)
    aligned = bytearray(nbytes)
    codec.encode(x, aligned)
    shifted = bytearray(nbytes + 1)
    codec.encode(x, memoryview(shifted)[1:])
    assert shifted[1:] == aligned
    expected, got = np.zeros(n, np.float32), np.zeros(n, np.float32)
    codec.decode(bytes(aligned), expected)
    for data in (memoryview(bytes(shifted))[1:], np.frombuffer(bytes(shifted), np.uint8)[1:]):
        codec.check(data, n)
        got[:] = 0
        codec.decode(data, got)
        assert got.tobytes() == expected.tobytes()
        got[:] = 0
        codec.decode_accumulate(data, np.float32(1), got)
        assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("name", "error_max"), [("fp32", 0.0), ("bf16", 0.002), ("int8", 0.011)])
def test_relative_error_on_gaussian_data(name: str, error_max: float) -> None:
    codec = get_codec(name)
    x = np.random.default_rng(5).standard_normal(200_000).astype(np.float32)
    out, decoded = bytearray(codec.encoded_nbytes(x.size)), np.zeros_like(x)
    codec.encode(x, out)
    codec.decode(out, decoded)
    error = np.linalg.norm((x - decoded).astype(float)) / np.linalg.norm(x.astype(float))
    assert error <= error_max
    if name == "int8":
        assert error == pytest.approx(0.0070, abs=0.0003)  # measured with other implementations


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("n", [1, 255, 256, 257, 1000])
def test_wrong_length_is_malformed(name: str, n: int) -> None:
    codec = get_codec(name)
    good = bytes(codec.encoded_nbytes(n))
    codec.check(good, n)
    for bad in (good[:-1], good + b"\0", b""):
        with pytest.raises(PeerFault) as caught:
            codec.check(bad, n)
        assert caught.value.code == "malformed"


BAD_VALUES = [float("nan"), float("inf"), float("-inf"), 2.0**101, -(2.0**101)]


@pytest.mark.parametrize("bad", BAD_VALUES)
@pytest.mark.parametrize("place", [0, 299])
def test_non_finite_values_are_refused(bad: float, place: int) -> None:
    values = [0.5] * 300
    values[place] = bad
    for name in ("fp32", "bf16"):
        data = reference.encode(name, values)
        with pytest.raises(PeerFault) as caught:
            get_codec(name).check(data, 300)
        assert caught.value.code == "non_finite"
    with pytest.raises(LocalProtocolError):
        check_finite(np.array(values, np.float32))


@pytest.mark.parametrize(
    ("scale", "code"),
    [
        (float("nan"), "non_finite"),
        (float("inf"), "non_finite"),
        (2.0**94, "non_finite"),
        (-1.0, "malformed"),
        (-0.0, "malformed"),
        (float("-inf"), "non_finite"),
    ],
)
@pytest.mark.parametrize("block", [0, 1])
def test_bad_scales_are_refused(scale: float, code: str, block: int) -> None:
    data = bytearray(get_codec("int8").encoded_nbytes(300))
    struct.pack_into("<f", data, 4 * block, scale)
    with pytest.raises(PeerFault) as caught:
        get_codec("int8").check(data, 300)
    assert caught.value.code == code


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_everything_that_may_be_sent_is_accepted_by_check(name: str) -> None:
    codec = get_codec(name)
    largest = np.full(300, limits.VALUE_MAGNITUDE_MAX / 2, np.float32)
    check_finite(largest)
    out = bytearray(codec.encoded_nbytes(300))
    codec.encode(largest, out)
    codec.check(out, 300)
    with pytest.raises(LocalProtocolError):
        check_finite(np.nextafter(largest, np.float32(np.inf)))
    big = np.full(300, 2.0**110, np.float32)
    codec.encode(big, out)
    codec.check(out, 300, limits.RESULT_MAGNITUDE_MAX)
    with pytest.raises(PeerFault):
        codec.check(out, 300)


def test_unknown_codec_lists_those_that_exist() -> None:
    with pytest.raises(ConfigError) as caught:
        get_codec("int9")
    assert "fp32, bf16, int8" in caught.value.todo


def test_denormals_work_in_this_thread() -> None:
    check_ieee_arithmetic()
    assert np.float32(2.0**-126) * np.float32(0.5) == np.float32(2.0**-127) != 0
