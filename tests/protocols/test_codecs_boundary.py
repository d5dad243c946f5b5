"""Vectors, hostile bytes and accuracy of the codecs between stages."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest

from swarmtrain_protocols.codecs.boundary import (
    BOUNDARY_CODEC_NAMES,
    E4M3,
    HEADER,
    Bounds,
    check_values,
    decode_tokens,
    encode_e4m3,
    encode_tokens,
    get_boundary_codec,
    pack_header,
    parse_header,
)
from swarmtrain_protocols.errors import ConfigError, LocalProtocolError, PeerFault
from swarmtrain_protocols.manifest import BOUNDARY_CODECS
from tests.protocols import reference_boundary as reference
from tests.protocols.reference_numbers import VECTORS

DATA = json.loads((VECTORS / "boundary.json").read_text())
NAMES = [name for name in BOUNDARY_CODEC_NAMES if name != "subspace"]
WIDE = Bounds(8, 64, 8)


def sample(shape: tuple[int, ...] = (2, 3, 8), seed: int = 1) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def code_of(bad: Any) -> str:
    with pytest.raises(PeerFault) as caught:
        bad()
    return caught.value.code


def test_the_vector_file_is_what_the_reference_computes() -> None:
    assert reference.build() == DATA


@pytest.mark.parametrize("case", DATA["cases"], ids=lambda c: f"{c['codec']}: {c['case']}")
def test_vectors(case: dict[str, Any]) -> None:
    codec, shape = get_boundary_codec(case["codec"]), tuple(case["shape"])
    dtype = np.float64 if case["codec"] == "fp64" else np.float32
    values = np.frombuffer(bytes.fromhex(case["values"]), dtype).reshape(shape)
    encoded = bytes.fromhex(case["encoded"])
    assert codec.encode(values) == encoded
    decoded = codec.decode(encoded, Bounds(shape[0], shape[1], shape[2]))
    assert decoded.shape == shape and decoded.dtype == dtype
    assert decoded.tobytes().hex() == case["decoded"]
    rows = shape[0] * shape[1]
    assert len(encoded) == HEADER.size + codec.payload_nbytes(rows, shape[2])


def test_the_vector_of_token_ids() -> None:
    case = DATA["tokens"]
    ids = np.array(case["ids"], np.int32).reshape(case["shape"])
    encoded = bytes.fromhex(case["encoded"])
    assert encode_tokens(ids) == encoded
    np.testing.assert_array_equal(decode_tokens(encoded, 2, 3, 256), ids)


def test_all_codes_of_e4m3_are_read_and_written() -> None:
    codes = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8)
    assert E4M3[codes].tolist() == [reference.e4m3_value(int(c)) for c in codes]
    np.testing.assert_array_equal(encode_e4m3(E4M3[codes]), codes)
    assert np.isnan(E4M3[[0x7F, 0xFF]]).all()


def test_e4m3_rounds_as_a_search_through_all_codes_does() -> None:
    rng = np.random.default_rng(3)
    x = (rng.standard_normal(4000) * 2.0 ** rng.integers(-12, 7, 4000)).astype(np.float32)
    x = x[np.abs(x) < 448]
    assert encode_e4m3(x).tolist() == [reference.e4m3_code(float(v)) for v in x]


@pytest.mark.parametrize(("name", "bound"), [("bf16", 2.0**-8), ("int8", 0.004), ("fp8", 0.0625)])
def test_errors_stay_within_half_a_step(name: str, bound: float) -> None:
    x = sample((4, 16, 96))
    x[1, 3] *= 1e-5
    found = get_boundary_codec(name).decode(get_boundary_codec(name).encode(x), Bounds(4, 16, 96))
    error, absmax = np.abs(found - x), np.abs(x).max(-1, keepdims=True)
    scale = absmax if name == "int8" else np.maximum(np.abs(x), absmax * 2.0**-14)
    assert (error <= bound * scale).all()
    assert error.any()


@pytest.mark.parametrize("name", ["fp32", "fp64"])
def test_raw_codecs_lose_nothing(name: str) -> None:
    x = sample().astype(np.float64 if name == "fp64" else np.float32)
    codec = get_boundary_codec(name)
    np.testing.assert_array_equal(codec.decode(codec.encode(x), WIDE), x)


@pytest.mark.parametrize("name", NAMES)
def test_hostile_bytes_are_refused_by_name(name: str) -> None:
    codec, data = get_boundary_codec(name), get_boundary_codec(name).encode(sample())
    fields = HEADER.unpack_from(data)

    def with_field(index: int, value: int) -> bytes:
        changed = [value if i == index else field for i, field in enumerate(fields)]
        return HEADER.pack(*changed) + data[HEADER.size :]

    assert code_of(lambda: codec.decode(data[:-1], WIDE)) == "malformed"
    assert code_of(lambda: codec.decode(data + b"\0", WIDE)) == "malformed"
    assert code_of(lambda: codec.decode(data[:15], WIDE)) == "malformed"
    assert code_of(lambda: codec.decode(b"", WIDE)) == "malformed"
    for index, value in ((0, 2), (1, 99), (2, 1), (3, 0), (4, 0), (5, 7)):
        assert code_of(lambda i=index, v=value: codec.decode(with_field(i, v), WIDE)) == "malformed"
    for index in (3, 4):
        huge = with_field(index, 2**32 - 1)
        assert code_of(lambda h=huge: codec.decode(h, WIDE)) == "oversize"
    assert codec.decode(bytearray(data), WIDE).shape == (2, 3, 8)
    assert codec.decode(memoryview(data), Bounds(2, 3, 8)).shape == (2, 3, 8)


@pytest.mark.parametrize(
    ("name", "kind", "bad"),
    [
        ("fp32", "<f", float("nan")),
        ("fp32", "<f", 2.0**101),
        ("fp64", "<d", float("inf")),
        ("bf16", "<H", 0x7F80),
        ("bf16", "<H", 0xFFC0),
        ("int8", "<f", float("nan")),
        ("int8", "<f", 2.0**94),
        ("fp8", "<f", float("inf")),
    ],
)
def test_what_is_not_finite_is_refused(name: str, kind: str, bad: float) -> None:
    data = bytearray(get_boundary_codec(name).encode(sample()))
    struct.pack_into(kind, data, HEADER.size, bad)
    assert code_of(lambda: get_boundary_codec(name).check(data, WIDE)) == "non_finite"


@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize("scale", [-1.0, -0.0])
def test_a_negative_scale_is_malformed(name: str, scale: float) -> None:
    data = bytearray(get_boundary_codec(name).encode(sample()))
    struct.pack_into("<f", data, HEADER.size, scale)
    assert code_of(lambda: get_boundary_codec(name).check(data, WIDE)) == "malformed"


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_code_that_is_no_number_is_refused(code: int) -> None:
    data = bytearray(get_boundary_codec("fp8").encode(sample()))
    data[-1] = code
    assert code_of(lambda: get_boundary_codec("fp8").check(data, WIDE)) == "non_finite"


@pytest.mark.parametrize(
    "x",
    [
        np.full((1, 1, 2), np.nan, np.float32),
        np.full((1, 1, 2), 2.0**100, np.float32),
        np.zeros((1, 2), np.float32),
        np.zeros((1, 0, 2), np.float32),
        np.zeros((1, 1, 2), np.float16),
    ],
)
def test_local_values_that_must_not_be_sent_are_refused(x: np.ndarray[Any, Any]) -> None:
    with pytest.raises(LocalProtocolError):
        check_values(x)
    with pytest.raises(LocalProtocolError):
        get_boundary_codec("int8").encode(x)


@pytest.mark.parametrize(
    ("ids", "code"), [([[0, -1]], "malformed"), ([[0, 10]], "malformed"), ([[0] * 5], "oversize")]
)
def test_token_ids_are_bounded(ids: list[list[int]], code: str) -> None:
    data = encode_tokens(np.array(ids, np.int32))
    assert code_of(lambda: decode_tokens(data, 1, 4, 10)) == code


def test_token_ids_of_another_length_or_type_are_refused() -> None:
    data = encode_tokens(np.zeros((1, 2), np.int32))
    assert code_of(lambda: decode_tokens(data[:-1], 1, 4, 10)) == "malformed"
    assert code_of(lambda: parse_header(data, Bounds(1, 4, 1), 4)) == "malformed"
    with pytest.raises(LocalProtocolError):
        encode_tokens(np.zeros((1, 2), np.int64))  # type: ignore[arg-type]


def test_a_payload_that_would_not_fit_is_refused_by_its_header_alone() -> None:
    """Nothing is allocated by what a header promises: the bytes are not there."""
    data = pack_header(4, (8, 64, 8))
    assert code_of(lambda: get_boundary_codec("int8").decode(data, WIDE)) == "malformed"


def test_names() -> None:
    assert set(BOUNDARY_CODECS) == set(BOUNDARY_CODEC_NAMES) - {"fp64"}
    with pytest.raises(ConfigError, match="int3"):
        get_boundary_codec("int3")
    assert [get_boundary_codec(name).name for name in NAMES] == NAMES
