"""Codecs on the device against the NumPy oracle: equal bytes, equal values."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from swarmtrain.training.stages.boundary import device_codec
from swarmtrain_protocols.codecs.boundary import Bounds, get_boundary_codec
from swarmtrain_protocols.codecs.subspace import Subspace
from swarmtrain_protocols.errors import ConfigError, PeerFault
from tests.protocols.reference_numbers import VECTORS

CASES = json.loads((VECTORS / "boundary.json").read_text())["cases"]
CPU = torch.device("cpu")
BOUNDS = Bounds(4, 16, 96)


def codec(name: str, bounds: Bounds = BOUNDS, dtype: torch.dtype = torch.float32) -> Any:
    return device_codec(name, bounds, CPU, dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['codec']}: {c['case']}")
def test_vectors(case: dict[str, Any]) -> None:
    double = case["codec"] == "fp64"
    shape, dtype = tuple(case["shape"]), torch.float64 if double else torch.float32
    values = np.frombuffer(bytes.fromhex(case["values"]), np.float64 if double else np.float32)
    found = codec(case["codec"], Bounds(*shape), dtype)
    encoded = bytes.fromhex(case["encoded"])
    x = torch.from_numpy(values.copy()).view(shape)
    assert found.encode_gradient(x) == encoded
    assert found.encode_activation(x, None) == encoded
    decoded, tokens = found.decode_activation(encoded)
    assert tokens is None and decoded.dtype == dtype and tuple(decoded.shape) == shape
    assert decoded.numpy().tobytes().hex() == case["decoded"]
    assert torch.equal(found.decode_gradient(bytearray(encoded)), decoded)


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("scale", [1.0, 1e-7, 1e12])
def test_random_tensors_have_the_oracles_bytes(name: str, scale: float) -> None:
    rng = np.random.default_rng(5)
    x = (rng.standard_normal((4, 16, 96)) * scale).astype(np.float32)
    x[0, 0, :] = 0
    x[1, :, 7] *= 1000
    oracle = get_boundary_codec(name)
    data = codec(name).encode_gradient(torch.from_numpy(x))
    assert data == oracle.encode(x)
    np.testing.assert_array_equal(codec(name).decode_gradient(data), oracle.decode(data, BOUNDS))
    turned = torch.from_numpy(np.ascontiguousarray(x.transpose(1, 0, 2))).transpose(0, 1)
    assert not turned.is_contiguous() and codec(name).encode_gradient(turned) == data


def test_every_byte_of_a_foreign_encoder_is_read_alike() -> None:
    for name, codes in (("int8", range(256)), ("fp8", [c for c in range(256) if c & 127 != 127])):
        oracle = get_boundary_codec(name)
        bounds = Bounds(1, 1, len(codes))
        data = oracle.encode(np.ones((1, 1, len(codes)), np.float32))[: 16 + 4] + bytes(codes)
        np.testing.assert_array_equal(
            codec(name, bounds).decode_gradient(data), oracle.decode(data, bounds)
        )


def test_hostile_bytes_do_not_reach_the_device() -> None:
    data = codec("int8").encode_gradient(torch.ones(1, 2, 96))
    for bad in (data[:-1], b"", bytes(16)):
        with pytest.raises(PeerFault):
            codec("int8").decode_gradient(bad)
    with pytest.raises(PeerFault):
        codec("fp8").decode_activation(data)


def test_a_double_runtime_takes_every_codec() -> None:
    x = torch.randn(2, 3, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for name, bound in (("fp64", 0.0), ("fp32", 1e-7), ("bf16", 4e-3), ("int8", 4e-3)):
        found = codec(name, dtype=torch.float64)
        decoded = found.decode_gradient(found.encode_gradient(x))
        assert decoded.dtype == torch.float64
        error = (decoded - x).abs().max() / x.abs().max()
        assert error <= bound and (name == "fp64") == (error == 0)


def test_the_subspace_agrees_with_its_oracle() -> None:
    space = Subspace(3, 96, 12, 50)
    found = device_codec("subspace", BOUNDS, CPU, torch.float32, space)
    rng = np.random.default_rng(2)
    ids = rng.integers(0, 50, (4, 16), dtype=np.int32)
    inside = rng.standard_normal((4, 16, 12)).astype(np.float32) @ space.basis.T
    x = (inside + space.embedding[ids]).astype(np.float32)
    tokens = torch.from_numpy(ids.astype(np.int64))
    data = found.encode_activation(torch.from_numpy(x), tokens)
    decoded, got = found.decode_activation(data)
    assert got is not None and torch.equal(got, tokens)
    by_oracle, _ = space.decode_activation(data, BOUNDS)
    np.testing.assert_allclose(decoded, by_oracle, atol=1e-6)
    assert np.linalg.norm(decoded.numpy() - x) <= 1e-6 * np.linalg.norm(x)
    gradient = found.encode_gradient(torch.from_numpy(x))
    np.testing.assert_allclose(
        found.decode_gradient(gradient), space.decode_gradient(gradient, BOUNDS), atol=1e-6
    )
    np.testing.assert_array_equal(found.fixed(tokens), space.embedding[ids])
    assert codec("int8").fixed(tokens) is None


def test_unknown_codecs() -> None:
    with pytest.raises(ConfigError):
        codec("int3")
    with pytest.raises(ConfigError, match="basis"):
        codec("subspace")
