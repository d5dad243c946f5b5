"""Which parts of a model are its embedding, its blocks and its head, family by family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from swarmtrain.training.model import ByteGPT, Sizes
from swarmtrain.training.presets import PRESETS
from swarmtrain.training.stages.cut import CannotCut, Cut, check_equal, cut_parts
from swarmtrain.training.stages.decoder import DECODERS, Decoder, DecoderSizes
from swarmtrain_protocols.errors import ConfigError


class Embedding(nn.Module):
    """Token embedding, plus one of positions if the model has it."""

    def __init__(self, tokens: nn.Module, positions: nn.Module | None = None) -> None:
        super().__init__()
        self.tokens = tokens
        self.positions = positions

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: int64 [batch, time] → [batch, time, width]."""
        x: Tensor = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return x


class Head(nn.Module):
    """The last normalisation and the matrix of logits."""

    def __init__(self, norm: nn.Module, logits: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.logits = logits

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, time, width] → [batch, time, vocabulary]."""
        found: Tensor = self.logits(self.norm(x))
        return found


class HuggingFaceExtras(nn.Module):
    """What decoder layers of Hugging Face models take beside x: mask, positions, rotations."""

    def __init__(self, rotary: nn.Module | None, *, positions: bool) -> None:
        super().__init__()
        self.rotary = rotary
        self.positions = positions

    def forward(self, x: Tensor) -> dict[str, Any]:
        """x: [batch, time, width] → keyword arguments of a layer."""
        time = x.shape[1]
        # An explicit mask: without one, "eager" attention would look at what comes later.
        least = torch.finfo(x.dtype).min
        mask = torch.full((time, time), least, dtype=x.dtype, device=x.device).triu(1)
        extra: dict[str, Any] = {"attention_mask": mask[None, None]}
        if self.positions:
            ids = torch.arange(time, device=x.device)[None]
            extra["position_ids"] = ids
            if self.rotary is not None:
                extra["position_embeddings"] = self.rotary(x, ids)
        return extra


def cut_byte_gpt(model: ByteGPT, stages: int) -> Cut:
    """Cut a ``ByteGPT``; learned positions belong to the embedding."""
    embed = Embedding(model.embed, model.positions)
    head = Head(model.norm, model.head)
    return cut_parts(embed, list(model.blocks), head, stages, context=model.sizes.context)


def cut_decoder(model: Decoder, stages: int) -> Cut:
    """Cut a ``Decoder``, tied or not."""
    head = Head(model.norm, model.head)
    blocks = list(model.blocks)
    return cut_parts(Embedding(model.embed), blocks, head, stages, context=model.sizes.context)


def cut_hugging_face(model: nn.Module, stages: int) -> Cut:
    """Cut a decoder of Hugging Face transformers, known by the names of its parts.

    Llama style: ``model.embed_tokens``, ``model.layers``, ``model.norm``, ``lm_head``; GPT-2 style:
    ``transformer.wte``, ``.wpe``, ``.h``, ``.ln_f``, ``lm_head``.

    Raises:
        CannotCut: other names, attention that takes no dense mask, pieces that answer other logits
            than the model, or as ``cut_parts``.
    """
    config = getattr(model, "config", None)
    attention = getattr(config, "_attn_implementation", "eager")
    if attention not in ("eager", "sdpa"):
        raise CannotCut(
            f"attention {attention!r}", "its layers take no dense causal mask", "use sdpa or eager"
        )
    logits = getattr(model, "lm_head", None)
    inner, gpt2 = getattr(model, "model", None), getattr(model, "transformer", None)
    if _has(inner, "embed_tokens", "layers", "norm") and logits is not None:
        embed = Embedding(inner.embed_tokens)  # type: ignore[union-attr]
        blocks, norm = inner.layers, inner.norm  # type: ignore[union-attr]
        rotary = getattr(inner, "rotary_emb", None)
        shared = HuggingFaceExtras(rotary, positions=True)
    elif _has(gpt2, "wte", "wpe", "h", "ln_f") and logits is not None:
        embed = Embedding(gpt2.wte, gpt2.wpe)  # type: ignore[union-attr]
        blocks, norm = gpt2.h, gpt2.ln_f  # type: ignore[union-attr]
        shared = HuggingFaceExtras(None, positions=False)
    else:
        raise CannotCut(
            f"{type(model).__name__} is of no known family",
            "neither model.embed_tokens/layers/norm nor transformer.wte/wpe/h/ln_f with lm_head",
            "cut it yourself with swarmtrain.training.stages.cut.cut_parts",
        )
    context = getattr(config, "max_position_embeddings", None) or getattr(
        config, "n_positions", None
    )
    if not isinstance(context, int):
        raise CannotCut("the model's config", "no max_position_embeddings or n_positions")
    if getattr(config, "sliding_window", None):
        raise CannotCut("attention within a sliding window", "its layers need another mask")
    assert isinstance(norm, nn.Module) and isinstance(blocks, nn.ModuleList)
    head = Head(norm, logits)
    found = cut_parts(embed, list(blocks), head, stages, context=context, shared=shared)
    check_equal(model, found)
    return found


def _has(part: object, *names: str) -> bool:
    return part is not None and all(hasattr(part, name) for name in names)


def cut_model(model: nn.Module, stages: int) -> Cut:
    """Cut a model of a family that is known by its type or the names of its parts.

    Raises:
        CannotCut, ConfigError: as the function of its family.
    """
    if isinstance(model, ByteGPT):
        return cut_byte_gpt(model, stages)
    if isinstance(model, Decoder):
        return cut_decoder(model, stages)
    return cut_hugging_face(model, stages)


OWN_PRESET = "own"
"""Run key ``preset`` of runs whose model is in a script: a bare ``swarmtrain join`` is refused."""


def cut_preset(keys: Mapping[str, Any]) -> Cut:
    """The preset that the run keys name, cut into ``stages``, without values (meta device).

    Raises:
        ConfigError: unknown preset, sizes that do not fit, or no equal stages.
    """
    name, sizes = keys["preset"], dict(keys.get("model") or {})
    if name == OWN_PRESET:
        raise ConfigError(
            "this run trains a model of its members' own",
            "its code is not part of swarmtrain, and code never travels",
            "get the script and run `swarmtrain join TICKET -- python SCRIPT`",
        )
    with torch.device("meta"):
        if name in DECODERS:
            return cut_decoder(
                Decoder(DecoderSizes.from_mapping(DECODERS[name], sizes)), keys["stages"]
            )
        if name in PRESETS:
            chosen = Sizes.from_mapping(PRESETS[name], sizes)
            return cut_byte_gpt(ByteGPT(chosen, keys["seed"]), keys["stages"])
    known = [*PRESETS, *DECODERS]
    raise ConfigError(f"run key preset = {name}", "no such preset", f"one of {known}")
