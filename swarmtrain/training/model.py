"""A small byte-level GPT: pre-norm with RMSNorm, GELU, causal attention, learned positions.

The default sizes give 0.14 million parameters, small enough to train on one CPU thread and large
enough that every optimizer of the project can be told from every other (``lm-tiny``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from swarmtrain_protocols.errors import ConfigError

BYTES = 256


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a model; every field is a key of the run key ``model``."""

    d_model: int = 64
    layers: int = 2
    heads: int = 4
    context: int = 64
    vocabulary: int = BYTES

    def __post_init__(self) -> None:
        if min(self.d_model, self.layers, self.heads, self.context, self.vocabulary) < 1:
            raise ConfigError("run key model", "every size is at least 1")
        if self.d_model % self.heads:
            raise ConfigError("run key model", "d_model must be a multiple of heads")

    @classmethod
    def from_mapping(cls, base: Sizes, changes: Mapping[str, int]) -> Sizes:
        """``base`` with some sizes changed.

        Raises:
            ConfigError: an unknown size, or sizes that do not fit together.
        """
        known = asdict(base)
        for name in changes:
            if name not in known:
                raise ConfigError(f"run key model.{name}", "no such size", f"one of {list(known)}")
        return cls(**{**known, **changes})


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + ε) · g (arXiv 1910.07467)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width]."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.gain


class Block(nn.Module):
    """Attention and a four times wider perceptron, each added to what came in."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.d_model
        self.heads = sizes.heads
        self.norm_attention = RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm_mlp = RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, time, width]."""
        batch, time, width = x.shape
        split = self.qkv(self.norm_attention(x)).view(batch, time, 3, self.heads, -1)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        found: Tensor = x + self.down(functional.gelu(self.up(self.norm_mlp(x))))
        return found


class ByteGPT(nn.Module):
    """Bytes in, logits over the next byte out. ``seed`` fixes θ⁰ on every machine."""

    def __init__(self, sizes: Sizes, seed: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.embed = nn.Embedding(sizes.vocabulary, sizes.d_model)
        self.positions = nn.Embedding(sizes.context, sizes.d_model)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = RMSNorm(sizes.d_model)
        self.head = nn.Linear(sizes.d_model, sizes.vocabulary, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                # Residual outputs start smaller, so that depth does not change the scale (GPT-2).
                deep = name.endswith(("out.weight", "down.weight"))
                std = 0.02 / (2 * sizes.layers) ** 0.5 if deep else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: int64 [batch, time ≤ context] → logits f32 [batch, time, vocabulary]."""
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embed(tokens) + self.positions(steps)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean nats per byte of ``targets`` (int64 [batch, time])."""
    logits = model(tokens)
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
