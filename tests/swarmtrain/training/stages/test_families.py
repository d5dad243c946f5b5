"""Families of models: presets, ByteGPT, Decoder, and stand-ins built as Hugging Face decoders are.

The stand-ins take what layers of transformers take (a dense mask, position ids, rotations) and do
nothing causal by themselves, as "eager" attention does not.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from swarmtrain.training.model import ByteGPT, Sizes
from swarmtrain.training.stages.cut import CannotCut
from swarmtrain.training.stages.decoder import Decoder, DecoderSizes
from swarmtrain.training.stages.families import cut_model, cut_preset
from swarmtrain.training.stages.reference import LocalPipeline
from swarmtrain.training.stages.runtime import StageRuntime
from swarmtrain_protocols.errors import ConfigError
from tests.swarmtrain.training.stages.models import byte_gpt, keys, tokens
from tests.swarmtrain.training.stages.test_reference import relative

WIDTH, VOCABULARY, CONTEXT = 8, 40, 24


def attend(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
    scores = q @ k.transpose(1, 2) / WIDTH**0.5 + attention_mask[0]
    return scores.softmax(-1) @ v


class Rotary(nn.Module):
    """Cosines and sines by position, from a buffer that is no parameter."""

    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 100.0 ** -(torch.arange(0, WIDTH, 2) / WIDTH))

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].to(x.dtype) * self.inv_freq.to(x.dtype)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cosine + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sine


class LlamaLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        attention_mask: Tensor,
        position_ids: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
    ) -> Tensor:
        q, k, v = self.qkv(hidden_states).chunk(3, -1)
        q, k = turned(q, *position_embeddings), turned(k, *position_embeddings)
        found: Tensor = hidden_states + self.o_proj(attend(q, k, v, attention_mask))
        return found


class LlamaStandIn(nn.Module):
    """model.embed_tokens, model.layers, model.norm, model.rotary_emb, lm_head, config."""

    scale = 1.0

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            max_position_embeddings=CONTEXT, _attn_implementation="eager", sliding_window=None
        )
        inner = nn.Module()
        inner.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        inner.layers = nn.ModuleList(LlamaLayer() for _ in range(4))
        inner.norm = nn.RMSNorm(WIDTH)
        inner.rotary_emb = Rotary()
        self.model = inner
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = inner.embed_tokens.weight

    def forward(self, input_ids: Tensor) -> Any:
        inner: Any = self.model
        x = inner.embed_tokens(input_ids) * self.scale
        time = x.shape[1]
        mask = torch.zeros(1, 1, time, time, dtype=x.dtype)
        mask[0, 0][~torch.ones(time, time).tril().bool()] = -torch.inf
        ids = torch.arange(time)[None]
        for layer in inner.layers:
            x = layer(
                x,
                attention_mask=mask,
                position_ids=ids,
                position_embeddings=inner.rotary_emb(x, ids),
            )
        return SimpleNamespace(logits=self.lm_head(inner.norm(x)))


class ScaledStandIn(LlamaStandIn):
    """Multiplies its embedding, as some families do: the names do not show it."""

    scale = 3.0


class Gpt2Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, *, attention_mask: Tensor) -> tuple[Tensor, None]:
        q, k, v = self.c_attn(hidden_states).chunk(3, -1)
        return hidden_states + self.c_proj(attend(q, k, v, attention_mask)), None


class Gpt2StandIn(nn.Module):
    """transformer.wte, .wpe, .h, .ln_f, a tied lm_head, config.n_positions; answers a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(n_positions=CONTEXT, _attn_implementation="sdpa")
        inner = nn.Module()
        inner.wte, inner.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        inner.h = nn.ModuleList(Gpt2Layer() for _ in range(4))
        inner.ln_f = nn.LayerNorm(WIDTH)
        self.transformer = inner
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = inner.wte.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        inner: Any = self.transformer
        time = input_ids.shape[1]
        x = inner.wte(input_ids) + inner.wpe(torch.arange(time))
        mask = torch.full((1, 1, time, time), -torch.inf, dtype=x.dtype).triu(1)
        for layer in inner.h:
            x = layer(x, attention_mask=mask)[0]
        found: Tensor = self.lm_head(inner.ln_f(x))
        return found


def seeded(make: Any) -> nn.Module:
    torch.manual_seed(4)
    found: nn.Module = make().double()
    return found


MODELS: dict[str, Any] = {
    "llama": LlamaStandIn,
    "llama, tied": lambda: LlamaStandIn(tied=True),
    "gpt2": Gpt2StandIn,
    "decoder": lambda: Decoder(DecoderSizes(16, 4, 2, 1, CONTEXT, 0, VOCABULARY)),
    "byte gpt": lambda: ByteGPT(Sizes(16, 4, 2, CONTEXT), 1),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_stages_has_the_loss_and_gradient_of_the_whole(name: str) -> None:
    model = seeded(MODELS[name])
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p + 0.1 * torch.randn_like(p)).float().double())
    cut = cut_model(model, 2)
    assert (cut.stages, cut.depth, cut.context) == (2, 4, CONTEXT)
    runtime = StageRuntime(cut, range(3), codec="fp64", batch_max=3, seed=0, dtype="float64")
    ids = tokens(1)
    pipeline = LocalPipeline({s: [runtime] for s in range(3)}, 2)
    found = pipeline.micro_batch(0, ids)
    given = torch.from_numpy(ids.astype(np.int64))
    answer = model(given[:, :-1])
    logits = answer if isinstance(answer, Tensor) else answer.logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), given[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    assert found == pytest.approx(float(loss.detach()), rel=1e-10)
    for stage, module in enumerate(cut.modules):
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
        expected = torch.cat([g.reshape(-1) for g in own]).numpy()
        assert relative(pipeline.gradients(stage), expected) <= 1e-10


def test_models_that_only_look_alike_are_refused() -> None:
    with pytest.raises(CannotCut, match="other logits"):
        cut_model(seeded(ScaledStandIn), 2)
    flash, windowed, contextless = (seeded(LlamaStandIn) for _ in range(3))
    flash.config._attn_implementation = "flash_attention_2"  # type: ignore[union-attr,assignment]
    windowed.config.sliding_window = 4  # type: ignore[union-attr,assignment]
    contextless.config = SimpleNamespace()  # type: ignore[assignment]
    for model, message in (
        (flash, "flash_attention_2"),
        (windowed, "sliding window"),
        (contextless, "max_position_embeddings"),
        (nn.Sequential(nn.Linear(2, 2)), "no known family"),
    ):
        with pytest.raises(CannotCut, match=message):
            cut_model(model, 2)


def test_presets_are_cut_without_values() -> None:
    cut = cut_preset(keys())
    assert (cut.stages, cut.width, cut.vocabulary, cut.context, cut.depth) == (4, 32, 40, 16, 4)
    assert all(cut.drawn(stage) for stage in range(5))
    gpt = cut_preset(byte_gpt(stages=2))
    assert (gpt.stages, gpt.vocabulary, gpt.depth) == (2, 256, 4)
    assert [name for name, _ in gpt.layout(0)] == [
        "embed.tokens.weight",
        "embed.positions.weight",
        "head.norm.gain",
        "head.logits.weight",
    ]
    for bad in (keys(preset="lm-huge"), keys(stages=3), keys(model={"depth": 2}), keys(stages=0)):
        with pytest.raises(ConfigError):
            cut_preset(bad)
