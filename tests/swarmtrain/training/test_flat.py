"""Parameter order, fragments, and copies both ways."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from blake3 import blake3
from torch import nn

from swarmtrain.training.flat import Flat, assign_fragments, schema_hash
from swarmtrain_protocols.errors import ConfigError


class Tied(nn.Module):
    """An embedding that is also the head, a frozen parameter, a buffer and two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.frozen = nn.Parameter(torch.ones(7), requires_grad=False)
        self.register_buffer("running", torch.zeros(4))
        self.blocks = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(2))
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def test_order_is_the_models_and_tied_parameters_count_once():
    flat = Flat(Tied())
    assert flat.schema == (
        ("embed.weight", (5, 3), "float32"),
        ("blocks.0.weight", (3, 3), "float32"),
        ("blocks.1.weight", (3, 3), "float32"),
    )
    assert flat.layout == [("train/0/0", 33)]
    by_hand = b"\x91\x93\xa1w\x92\x02\x03\xa7float32"  # MessagePack of [["w", [2, 3], "float32"]]
    assert schema_hash((("w", (2, 3), "float32"),)) == blake3(by_hand).digest()
    assert flat.schema_hash != Flat(nn.Linear(3, 3)).schema_hash


def test_read_and_write_are_inverse():
    model = Tied()
    flat = Flat(model)
    out = np.empty(33, np.float32)
    flat.read("train/0/0", out)
    weights = (model.embed.weight, *(block.weight for block in model.blocks))
    expected = np.concatenate([w.detach().numpy().ravel() for w in weights])
    assert np.array_equal(out, expected)
    fresh = np.arange(33, dtype=np.float32)
    flat.write("train/0/0", fresh)
    assert model.head.weight[1].tolist() == [3.0, 4.0, 5.0]
    assert model.blocks[1].weight[2].tolist() == [30.0, 31.0, 32.0]
    assert model.frozen.tolist() == [1.0] * 7
    state = flat.state_dict({"train/0/0": fresh})
    assert list(state) == ["embed.weight", "blocks.0.weight", "blocks.1.weight"]
    assert torch.equal(state["blocks.1.weight"], model.blocks[1].weight)


def test_non_contiguous_and_half_parameters():
    model = nn.Linear(3, 2, bias=False)
    model.weight = nn.Parameter(torch.arange(6.0).view(3, 2).t().to(torch.bfloat16))
    flat = Flat(model)
    assert not flat.exact("train/0/0") and flat.schema[0][2] == "bfloat16"
    out = np.empty(6, np.float32)
    flat.read("train/0/0", out)
    assert out.tolist() == [0, 2, 4, 1, 3, 5]
    flat.write("train/0/0", np.full(6, 1.001, np.float32))
    assert model.weight.float().unique().tolist() == [1.0]


def test_fragments_are_strided_over_layers():
    names = ["embed.w", "h.0.a", "h.0.b", "h.1.a", "h.2.a", "h.3.a", "norm.g", "head.w"]
    sizes = [100, 10, 10, 20, 20, 20, 1, 50]
    found = assign_fragments(list(zip(names, sizes, strict=True)), 2)
    # Layers 0 and 2 to fragment 0, 1 and 3 to 1; embed to the first of the two that are equally
    # full, norm and head to the emptier one.
    assert found == [0, 0, 0, 1, 0, 1, 1, 1]
    assert assign_fragments(list(zip(names, sizes, strict=True)), 1) == [0] * 8


def test_channels_of_fragments_cover_the_model_in_order():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    flat = Flat(model, 2)
    assert flat.layout == [("train/0/0", 16), ("train/0/1", 10)]
    assert [p.name for p in flat.places("train/0/1")] == ["2.weight", "2.bias"]
    vectors = {name: np.empty(n, np.float32) for name, n in flat.layout}
    for name, out in vectors.items():
        flat.read(name, out)
    assert all(
        torch.equal(tensor, dict(model.named_parameters())[name])
        for name, tensor in flat.state_dict(vectors).items()
    )


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ConfigError, match="no trainable"):
        Flat(nn.Tanh())
    with pytest.raises(ConfigError, match="fills only 2"):
        Flat(nn.Linear(2, 2), 5)
    with pytest.raises(ConfigError, match="fragments"):
        Flat(nn.Linear(2, 2), 0)
    empty = nn.Linear(2, 2)
    empty.extra = nn.Parameter(torch.empty(0))
    with pytest.raises(ConfigError, match="extra"):
        Flat(empty)
