"""Cutting: what falls into equal stages, and what is refused with its name."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from swarmtrain.training.stages.cut import (
    CannotCut,
    Ends,
    Stage,
    cut_parts,
    cut_sequential,
    layout_of,
)
from swarmtrain.training.stages.reference import LocalPipeline, reference_step
from swarmtrain.training.stages.runtime import StageRuntime
from swarmtrain_protocols.errors import ConfigError
from tests.swarmtrain.training.stages.models import tokens
from tests.swarmtrain.training.stages.test_reference import relative

WIDTH, VOCABULARY = 8, 12


class Residual(nn.Module):
    """x + out(tanh(up(x)))."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.out = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = x + self.out(self.up(x).tanh())
        return found


def sequential(blocks: int = 4, **more: nn.Module) -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential()
    model.add_module("tok", nn.Embedding(VOCABULARY, WIDTH))
    for index in range(blocks):
        model.add_module(f"layer{index}", more.get(f"layer{index}", Residual()))
    model.add_module("lm", nn.Linear(WIDTH, VOCABULARY))
    return model


class Nested(nn.Module):
    """Has its blocks in a list."""

    def __init__(self) -> None:
        super().__init__()
        parts = list(sequential().children())
        self.tok, self.blocks, self.lm = parts[0], nn.ModuleList(parts[1:-1]), parts[-1]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tok(tokens)
        for block in self.blocks:
            x = block(x)
        found: torch.Tensor = self.lm(x)
        return found


def cut(model: nn.Module, stages: int = 2, **changes: Any) -> Any:
    return cut_sequential(
        model, stages, **{"context": 16, "embedding": "tok", "head": "lm", **changes}
    )


def test_a_sequential_model_falls_into_ends_and_equal_stages() -> None:
    model = sequential()
    found = cut(model)
    assert (found.stages, found.depth, found.width, found.vocabulary, found.context) == (
        2,
        4,
        WIDTH,
        VOCABULARY,
        16,
    )
    assert found.layout(0) == [
        ("embed.weight", (12, 8)),
        ("head.weight", (12, 8)),
        ("head.bias", (12,)),
    ]
    assert found.layout(1) == found.layout(2)
    assert found.layout(1)[:2] == [("blocks.0.up.weight", (16, 8)), ("blocks.0.up.bias", (16,))]
    assert found.layout(1)[4][0] == "blocks.1.up.weight"
    assert sum(found.values(s) for s in range(3)) == sum(p.numel() for p in model.parameters())
    assert not found.drawn(1)
    assert found.ends is found.modules[0]
    x = torch.zeros((1, 3), dtype=torch.int64)
    y = found.ends.embed(x)
    for stage in found.modules[1:]:
        y = stage(y)
    torch.testing.assert_close(found.ends.head(y), model(x))
    torch.testing.assert_close(found.ends(x), found.ends.head(found.ends.embed(x)))


@pytest.mark.parametrize("make", [sequential, Nested])
def test_a_model_in_stages_has_its_own_gradient(make: Any) -> None:
    model = make().double()
    runtime = StageRuntime(
        cut(model), [0, 1, 2], codec="fp64", batch_max=3, seed=0, dtype="float64"
    )
    theta = {s: runtime.theta0(s).astype("f8") for s in range(3)}
    for stage, values in theta.items():
        runtime.load(stage, values)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.float().double())  # θ⁰ is f32
    ids = tokens(0, vocabulary=VOCABULARY)
    pipeline = LocalPipeline({s: [runtime] for s in range(3)}, 2)
    pipeline.micro_batch(0, ids)
    given = torch.from_numpy(ids.astype("i8"))
    logits = model(given[:, :-1])
    nn.functional.cross_entropy(logits.flatten(0, 1), given[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
    for stage, module in enumerate(runtime.cut.modules):
        own = torch.cat([p.grad.reshape(-1) for p in module.parameters() if p.grad is not None])
        assert relative(pipeline.gradients(stage), own.numpy()) <= 1e-10
    expected = reference_step(runtime.cut, theta, [ids], torch.float64)
    assert relative(pipeline.gradients(1), expected.gradients[1]) <= 1e-10


def test_blocks_may_answer_tuples_and_take_shared_arguments() -> None:
    class Tuple(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, None]:
            return x * self.weight + bias, None

    class Shared(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {"bias": torch.full_like(x, 2.0)}

    stage = Stage([Tuple(), Tuple()], Shared())
    assert stage(torch.ones(1, 1, WIDTH)).tolist() == [[[5.0] * WIDTH]]
    found = cut_parts(
        nn.Embedding(VOCABULARY, WIDTH),
        [Tuple() for _ in range(4)],
        nn.Linear(WIDTH, VOCABULARY),
        2,
        context=4,
        shared=Shared(),
    )
    assert [name for name, _ in found.layout(2)] == ["blocks.0.weight", "blocks.1.weight"]


def test_tied_ends_are_one_parameter() -> None:
    embed, head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
    head.weight = embed.weight
    assert layout_of(Ends(embed, head)) == [("embed.weight", (VOCABULARY, WIDTH))]


def tied_blocks() -> nn.Module:
    model = sequential()
    model.layer3.up = model.layer0.up  # type: ignore[union-attr]
    return model


def frozen() -> nn.Module:
    model = sequential()
    model.layer1.up.bias.requires_grad_(False)  # type: ignore[union-attr,operator]
    return model


class Noisy(Residual):
    """With dropout between the two matrices."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(probability)


class Jittered(Residual):
    """Draws from torch's generator without a module that says so."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.dropout(x, 0.2))


class Counting(Residual):
    """Remembers how often it ran."""

    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return super().forward(x)


class Scaled(nn.Sequential):
    """Does more than call its children."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = 2 * super().forward(tokens)
        return found


class Labelled(Nested):
    """Wants more than tokens."""

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(tokens) + labels


def scaled() -> nn.Module:
    return Scaled(OrderedDict(sequential().named_children()))


class Normed(Residual):
    """With running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)


class Shapeless(nn.Module):
    """Answers another width."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.up(x)
        return found


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no such child": (sequential, {"embedding": "emb"}, "no child 'emb' at its start"),
    "head in the middle": (sequential, {"head": "layer1"}, "no child 'layer1' at its end"),
    "no blocks": (lambda: sequential(0), {}, "cannot be cut|stages"),
    "unequal groups": (lambda: sequential(3), {}, "stages"),
    "unequal stages": (
        lambda: sequential(layer2=Residual(), layer3=nn.Linear(WIDTH, WIDTH)),
        {},
        "stage 2 differs",
    ),
    "shared between stages": (tied_blocks, {}, "stage 1 has it as well"),
    "frozen": (frozen, {}, r"blocks\.1\.up\.bias of stage 1 is frozen"),
    "dropout": (lambda: sequential(layer2=Noisy(0.1)), {}, r"blocks\.0\.drop of stage 2"),
    "batch norm": (lambda: sequential(layer0=Normed()), {}, "running statistics"),
    "functional dropout": (
        lambda: sequential(layer3=Jittered()),
        {},
        "stage 2 of the model answers the same input differently",
    ),
    "counter": (
        lambda: sequential(layer1=Counting()),
        {},
        r"buffer blocks\.1\.count of stage 1 changes",
    ),
    "more than its children": (scaled, {}, "Scaled in pieces answers other logits"),
    "more than tokens": (Labelled, {}, "the whole model takes no tokens"),
    "another width": (
        lambda: sequential(layer0=Shapeless(), layer1=Shapeless()),
        {"stages": 1},
        "stage|pass",
    ),
    "no parameters": (
        lambda: sequential(2, layer0=nn.Identity(), layer1=nn.Identity()),
        {},
        "nothing to train",
    ),
    "not a decoder": (
        lambda: nn.Sequential(*sequential().children()),
        {"embedding": "0", "head": "4"},
        "no child '4' at its end",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_says_why(name: str) -> None:
    make, changes, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message) as caught:
        cut(make(), **{"stages": 2, **changes})
    assert isinstance(caught.value, CannotCut) or "equal stages" in str(caught.value)
    assert caught.value.exit_code == 3


def test_dropout_of_zero_is_no_dropout() -> None:
    blocks = {f"layer{i}": Noisy(0.0) for i in range(4)}
    assert cut(sequential(4, **blocks)).stages == 2


def test_trying_a_model_out_draws_nothing_from_the_callers_generator() -> None:
    model = sequential(layer0=Jittered())
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with pytest.raises(CannotCut):
        cut(model)
    assert torch.equal(torch.rand(3), expected)
