"""A decoder of the Llama kind: RMSNorm, rotary positions, SwiGLU, optional grouped heads.

Positions are rotations of queries and keys inside the blocks (RoFormer, arXiv 2104.09864), so an
activation between two blocks needs nothing beside itself. Grouped query heads: arXiv 2305.13245.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from swarmtrain.training.model import RMSNorm
from swarmtrain_protocols.errors import ConfigError


@dataclass(frozen=True, slots=True)
class DecoderSizes:
    """Sizes of a decoder; every field is a key of the run key ``model``."""

    d_model: int = 96
    layers: int = 4
    heads: int = 4
    kv_heads: int = 0
    """Heads of keys and values; 0: as many as ``heads``."""
    context: int = 64
    d_ff: int = 0
    """Width of the perceptron; 0: 8/3 of ``d_model``, rounded up to a multiple of 8."""
    vocabulary: int = 256
    tied: int = 0
    """1: the head's matrix is the embedding's."""
    rope_theta: int = 10_000

    def __post_init__(self) -> None:
        positive = (self.d_model, self.layers, self.heads, self.context, self.vocabulary)
        if min(*positive, self.rope_theta) < 1 or min(self.kv_heads, self.d_ff) < 0:
            raise ConfigError("run key model", "every size is at least 1")
        if self.d_model % (2 * self.heads):
            raise ConfigError("run key model", "d_model must be a multiple of 2 x heads")
        if self.heads % self.groups:
            raise ConfigError("run key model", "heads must be a multiple of kv_heads")
        if self.tied not in (0, 1):
            raise ConfigError("run key model.tied", "0 or 1")

    @property
    def groups(self) -> int:
        return self.kv_heads or self.heads

    @property
    def inner(self) -> int:
        return self.d_ff or -(-self.d_model // 3) * 8

    @classmethod
    def from_mapping(cls, base: DecoderSizes, changes: Mapping[str, int]) -> DecoderSizes:
        """``base`` with some sizes changed.

        Raises:
            ConfigError: an unknown size, or sizes that do not fit together.
        """
        known = [each.name for each in fields(cls)]
        for name in changes:
            if name not in known:
                raise ConfigError(f"run key model.{name}", "no such size", f"one of {known}")
        return replace(base, **changes)


DECODERS = {
    "decoder-tiny": DecoderSizes(),
    "decoder-small": DecoderSizes(d_model=256, layers=8, heads=8, kv_heads=4, context=256),
}


class Attention(nn.Module):
    """Causal attention with rotated queries and keys."""

    def __init__(self, sizes: DecoderSizes) -> None:
        super().__init__()
        self.heads, self.groups = sizes.heads, sizes.groups
        self.head_width = sizes.d_model // sizes.heads
        self.rope_theta = float(sizes.rope_theta)
        kv_width = self.groups * self.head_width
        self.q = nn.Linear(sizes.d_model, sizes.d_model, bias=False)
        self.k = nn.Linear(sizes.d_model, kv_width, bias=False)
        self.v = nn.Linear(sizes.d_model, kv_width, bias=False)
        self.out = nn.Linear(sizes.d_model, sizes.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, time, width]."""
        batch, time, width = x.shape
        cosine, sine = rotation(time, self.head_width, self.rope_theta, x)
        q = rotated(self._split(self.q(x), self.heads), cosine, sine)
        k = rotated(self._split(self.k(x), self.groups), cosine, sine)
        v = self._split(self.v(x), self.groups)
        if self.groups != self.heads:
            repeat = self.heads // self.groups
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        found: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return found

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:2], heads, self.head_width).transpose(1, 2)


def rotation(time: int, width: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [time, width / 2] on the device and in the type of ``like``."""
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=like.device) / width
    steps = torch.arange(time, dtype=torch.float64, device=like.device)
    angles = torch.outer(steps, theta**-exponents)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate pairs (i, i + width/2) of x [batch, heads, time, width] by their angle."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) (arXiv 2002.05202)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width]."""
        found: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return found


class DecoderBlock(nn.Module):
    """Attention and perceptron, each normalised before and added to what came in."""

    def __init__(self, sizes: DecoderSizes) -> None:
        super().__init__()
        self.norm_attention = RMSNorm(sizes.d_model)
        self.attention = Attention(sizes)
        self.norm_mlp = RMSNorm(sizes.d_model)
        self.mlp = SwiGLU(sizes.d_model, sizes.inner)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, time, width]."""
        x = x + self.attention(self.norm_attention(x))
        found: Tensor = x + self.mlp(self.norm_mlp(x))
        return found


class Decoder(nn.Module):
    """Token ids in, logits over the next token out. Values are set by whoever builds it."""

    def __init__(self, sizes: DecoderSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embed = nn.Embedding(sizes.vocabulary, sizes.d_model)
        self.blocks = nn.ModuleList(DecoderBlock(sizes) for _ in range(sizes.layers))
        self.norm = RMSNorm(sizes.d_model)
        self.head = nn.Linear(sizes.d_model, sizes.vocabulary, bias=False)
        if sizes.tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: int64 [batch, time ≤ context] → logits [batch, time, vocabulary]."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(self.norm(x))
        return found
