"""The decoder against arithmetic written out in NumPy: rotations, grouped heads, SwiGLU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from swarmtrain.training.stages.decoder import Decoder, DecoderSizes, rotated, rotation
from swarmtrain_protocols.errors import ConfigError

SIZES = DecoderSizes(d_model=16, layers=2, heads=4, kv_heads=2, context=8, vocabulary=11)
Array = np.ndarray[Any, Any]


def drawn(sizes: DecoderSizes, seed: int = 1) -> Decoder:
    generator = torch.Generator().manual_seed(seed)
    model = Decoder(sizes).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def norm(x: Array, gain: Array) -> Array:
    found: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * gain
    return found


def turned(x: Array, theta: float) -> Array:
    """Rotary positions as complex numbers: pair (i, i + n/2) times exp(i · step · theta^-2i/n)."""
    time, width = x.shape
    pairs = x[:, : width // 2] + 1j * x[:, width // 2 :]
    speeds = theta ** (-np.arange(0, width, 2) / width)
    pairs = pairs * np.exp(1j * np.arange(time)[:, None] * speeds)
    return np.concatenate([pairs.real, pairs.imag], axis=1)


def by_hand(model: Decoder, ids: list[int]) -> Array:
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    sizes = model.sizes
    if sizes.tied:
        weights["head.weight"] = weights["embed.weight"]
    width = sizes.d_model // sizes.heads
    x = weights["embed.weight"][ids]
    for layer in range(sizes.layers):
        w = {n.removeprefix(f"blocks.{layer}."): v for n, v in weights.items()}
        h = norm(x, w["norm_attention.gain"])
        heads = []
        for head in range(sizes.heads):
            group = head // (sizes.heads // sizes.groups)
            q = turned(h @ w["attention.q.weight"].T[:, head * width :][:, :width], 10_000)
            k = turned(h @ w["attention.k.weight"].T[:, group * width :][:, :width], 10_000)
            v = h @ w["attention.v.weight"].T[:, group * width :][:, :width]
            scores = q @ k.T / np.sqrt(width)
            scores[np.triu_indices(len(ids), 1)] = -np.inf
            p = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(p / p.sum(-1, keepdims=True) @ v)
        x = x + np.concatenate(heads, axis=1) @ w["attention.out.weight"].T
        h = norm(x, w["norm_mlp.gain"])
        gate = h @ w["mlp.gate.weight"].T
        inner = gate / (1 + np.exp(-gate)) * (h @ w["mlp.up.weight"].T)
        x = x + inner @ w["mlp.down.weight"].T
    found: Array = norm(x, weights["norm.gain"]) @ weights["head.weight"].T
    return found


@pytest.mark.parametrize("tied", [0, 1])
@pytest.mark.parametrize("kv_heads", [0, 1, 2])
def test_logits_are_those_written_out(kv_heads: int, tied: int) -> None:
    sizes = DecoderSizes(16, 2, 4, kv_heads, 8, 24, 11, tied)
    model, ids = drawn(sizes), [3, 1, 4, 1, 5, 9, 2, 6]
    with torch.no_grad():
        found = model(torch.tensor([ids]))[0].numpy()
    np.testing.assert_allclose(found, by_hand(model, ids), atol=1e-10)


def test_what_comes_later_does_not_matter() -> None:
    model = drawn(SIZES)
    with torch.no_grad():
        long, short = model(torch.tensor([[1, 2, 3, 4, 5]])), model(torch.tensor([[1, 2, 3]]))
    torch.testing.assert_close(long[:, :3], short)


def test_rotations_keep_lengths_and_depend_on_distance() -> None:
    cosine, sine = rotation(6, 8, 100.0, torch.zeros(1, dtype=torch.float64))
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 1, 6, 8)
    a, b = rotated(q, cosine, sine), rotated(k, cosine, sine)
    torch.testing.assert_close(a.norm(dim=-1), q.norm(dim=-1))
    products = (a[0, 0] @ b[0, 0].T).numpy()
    for distance in range(-5, 6):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-12)


def test_sizes() -> None:
    assert (SIZES.groups, SIZES.inner) == (2, 48)
    assert DecoderSizes(d_model=96).inner == 256 and DecoderSizes(d_model=32, d_ff=7).inner == 7
    assert DecoderSizes(kv_heads=0, heads=4).groups == 4
    changed = DecoderSizes.from_mapping(SIZES, {"layers": 3, "tied": 1})
    assert (changed.layers, changed.tied, changed.d_model) == (3, 1, 16)
    tied, free = Decoder(changed), Decoder(SIZES)
    assert tied.head.weight is tied.embed.weight
    assert free.head.weight is not free.embed.weight


@pytest.mark.parametrize(
    "changes",
    [
        {"d_model": 18},
        {"kv_heads": 3},
        {"layers": 0},
        {"tied": 2},
        {"depth": 3},
        {"d_ff": -1},
        {"vocabulary": 0},
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="run key model"):
        DecoderSizes.from_mapping(SIZES, changes)
