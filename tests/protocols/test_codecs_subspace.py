"""The fixed subspace: an orthonormal basis from the seed, exact boundaries, exact constraint."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from swarmtrain_protocols.codecs.boundary import HEADER, Bounds
from swarmtrain_protocols.codecs.subspace import (
    Subspace,
    basis,
    fixed_embedding,
    project,
)
from swarmtrain_protocols.errors import ConfigError, LocalProtocolError, PeerFault

WIDTH, RANK, VOCABULARY = 48, 6, 20
BOUNDS = Bounds(2, 5, WIDTH)


@pytest.fixture(scope="module")
def subspace() -> Subspace:
    return Subspace(11, WIDTH, RANK, VOCABULARY)


def inside(space: Subspace, seed: int = 4) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Activations of a constrained model, f32 [2, 5, width], and their tokens."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCABULARY, (2, 5), dtype=np.int32)
    c = rng.standard_normal((2, 5, RANK)).astype(np.float32)
    return (c @ space.basis.T + space.embedding[ids]).astype(np.float32), ids


def test_the_basis_is_orthonormal_and_the_same_everywhere() -> None:
    u = basis(11, 96, 12)
    np.testing.assert_allclose(u.T.astype(np.float64) @ u, np.eye(12), atol=2e-7)
    assert blake3(u.tobytes()).hexdigest()[:16] == "6dfe1dfc403d47cd"
    assert blake3(fixed_embedding(11, 20, 96).tobytes()).hexdigest()[:16] == "172148a39e26ef94"
    assert np.abs(basis(12, 96, 12) - u).max() > 0.1
    assert fixed_embedding(11, 4000, 96).std() == pytest.approx(0.02, rel=0.01)
    full = basis(1, 8, 8).astype(np.float64)
    np.testing.assert_allclose(full @ full.T, np.eye(8), atol=1e-6)


@pytest.mark.parametrize("rank", [0, 97])
def test_a_rank_that_does_not_fit_is_refused(rank: int) -> None:
    with pytest.raises(ConfigError, match="boundary rank"):
        basis(1, 96, rank)


def test_activations_of_a_constrained_model_arrive(subspace: Subspace) -> None:
    x, ids = inside(subspace)
    data = subspace.encode_activation(x, ids)
    assert len(data) == HEADER.size + 10 * 4 + 10 * RANK * 4
    found, found_ids = subspace.decode_activation(data, BOUNDS)
    np.testing.assert_array_equal(found_ids, ids)
    assert np.linalg.norm(found - x) <= 1e-6 * np.linalg.norm(x)
    outside = x + np.float32(0.1)
    lost, _ = subspace.decode_activation(subspace.encode_activation(outside, ids), BOUNDS)
    assert np.linalg.norm(lost - outside) > 0.01 * np.linalg.norm(outside)


def test_gradients_keep_their_part_in_the_subspace(subspace: Subspace) -> None:
    g = np.random.default_rng(5).standard_normal((2, 5, WIDTH)).astype(np.float32)
    found = subspace.decode_gradient(subspace.encode_gradient(g), BOUNDS)
    u = subspace.basis.astype(np.float64)
    np.testing.assert_allclose(found, g @ u @ u.T, atol=1e-6)


def test_projecting_is_what_matrices_say_and_stays() -> None:
    u = basis(3, WIDTH, RANK)
    w = np.random.default_rng(6).standard_normal((WIDTH, 17)).astype(np.float32)
    expected = u.astype(np.float64) @ (u.T.astype(np.float64) @ w)
    project(u, w)
    np.testing.assert_allclose(w, expected, atol=2e-6)
    again = w.copy()
    project(u, again)
    np.testing.assert_allclose(again, w, atol=2e-6)


def test_only_what_writes_to_the_stream_is_constrained(subspace: Subspace) -> None:
    layout = [
        ("embed.tokens.weight", (VOCABULARY, WIDTH)),
        ("blocks.0.attention.q.weight", (WIDTH, WIDTH)),
        ("blocks.0.attention.out.weight", (WIDTH, WIDTH)),
        ("blocks.0.mlp.down.weight", (WIDTH, 3 * WIDTH)),
        ("head.norm.gain", (WIDTH,)),
        ("head.logits.weight", (VOCABULARY, WIDTH)),
    ]
    sizes = [int(np.prod(shape)) for _, shape in layout]
    before = np.random.default_rng(7).standard_normal(sum(sizes)).astype(np.float32)
    after = before.copy()
    subspace.constrain(after, layout)
    u, start = subspace.basis.astype(np.float64), 0
    outside = np.eye(WIDTH) - u @ u.T
    for (name, shape), size in zip(layout, sizes, strict=True):
        part = after[start : start + size].reshape(shape)
        if subspace.kind(name, shape) == "rows":
            assert np.abs(outside @ part).max() < 1e-5
        elif subspace.kind(name, shape) == "columns":
            assert np.abs(part @ outside).max() < 1e-5
        else:
            np.testing.assert_array_equal(part.reshape(-1), before[start : start + size])
        start += size
    kinds = [subspace.kind(*each) for each in layout]
    assert kinds == ["columns", None, "rows", "rows", None, None]


def test_a_tensor_of_another_width_is_refused(subspace: Subspace) -> None:
    with pytest.raises(ConfigError, match=r"out\.weight"):
        subspace.constrain(np.zeros(6, np.float32), [("blocks.0.out.weight", (2, 3))])


def test_hostile_bytes(subspace: Subspace) -> None:
    x, ids = inside(subspace)
    data = subspace.encode_activation(x, ids)
    bad_id = bytearray(data)
    bad_id[HEADER.size] = VOCABULARY
    bad_value = bytearray(data)
    bad_value[-4:] = np.array([np.nan], "<f4").tobytes()
    for bytes_, bounds, code in (
        (data[:-1], BOUNDS, "malformed"),
        (subspace.encode_gradient(x), BOUNDS, "malformed"),
        (bytes(bad_id), BOUNDS, "malformed"),
        (bytes(bad_value), BOUNDS, "non_finite"),
        (data, Bounds(1, 5, WIDTH), "oversize"),
    ):
        with pytest.raises(PeerFault) as caught:
            subspace.decode_activation(bytes_, bounds)
        assert caught.value.code == code
    with pytest.raises(PeerFault):
        subspace.decode_gradient(data, BOUNDS)


def test_local_shapes_are_checked(subspace: Subspace) -> None:
    x, ids = inside(subspace)
    with pytest.raises(LocalProtocolError):
        subspace.encode_activation(x, ids[:1])
    with pytest.raises(LocalProtocolError):
        subspace.encode_activation(x[:, :, :4], ids)
