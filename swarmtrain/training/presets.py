"""Presets: everything a bare ``swarmtrain join TICKET`` needs to train, from the run keys alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from swarmtrain.training.model import ByteGPT, Sizes, loss_of
from swarmtrain_protocols.changes import InnerStep
from swarmtrain_protocols.errors import ConfigError
from swarmtrain_protocols.stageopt import lr_factor

PRESETS = {
    "lm-tiny": Sizes(),
    "lm-small": Sizes(d_model=192, layers=4, heads=6, context=128),
    "lm-base": Sizes(d_model=384, layers=6, heads=6, context=256),
}


@dataclass(slots=True)
class Preset:
    """A model on its device, its inner optimizer and the inner schedule."""

    model: ByteGPT
    optimizer: torch.optim.Optimizer
    lr: float
    warmup: int
    total: int
    clip: float

    @property
    def context(self) -> int:
        return self.model.sizes.context

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean nats per byte of a batch, int64 [batch, context] each."""
        return loss_of(self.model, tokens, targets)

    def follow(self, inner: InnerStep) -> None:
        """Train from here on as the run wants it."""
        self.lr, self.clip = inner.inner_lr, inner.inner_clip
        self.warmup, self.total = inner.inner_warmup_steps, inner.total_steps
        for group in self.optimizer.param_groups[:-1]:  # the last one's does not decay
            group["weight_decay"] = inner.inner_weight_decay

    def set_lr(self, own_step: int, run_step: int) -> None:
        """Learning rate of the next step: warm-up by own steps, decay by the run's."""
        rate = self.lr * lr_factor(own_step, run_step, self.warmup, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate


def build(keys: Mapping[str, Any], device: torch.device) -> Preset:
    """Build the preset that the run keys name.

    Raises:
        ConfigError: unknown preset or sizes that do not fit together.
    """
    name = keys["preset"]
    if name not in PRESETS:
        raise ConfigError(f"run key preset = {name}", "no such preset", f"one of {list(PRESETS)}")
    sizes = Sizes.from_mapping(PRESETS[name], keys.get("model") or {})
    model = ByteGPT(sizes, keys["seed"]).to(device)
    optimizer: torch.optim.Optimizer
    lr, decay = keys["inner_lr"], keys["inner_weight_decay"]
    if keys["inner_optimizer"] == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    else:
        groups: list[dict[str, Any]] = [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": decay},
            {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99))
    return Preset(
        model, optimizer, lr, keys["inner_warmup_steps"], keys["total_steps"], keys["inner_clip"]
    )


def evaluate(model: nn.Module, tokens: torch.Tensor, targets: torch.Tensor) -> float:
    """Nats per byte over windows of shape [windows, context], in pieces of 32 windows."""
    total, count = 0.0, 0
    with torch.no_grad():
        for first in range(0, len(tokens), 32):
            logits = model(tokens[first : first + 32])
            losses = nn.functional.cross_entropy(
                logits.flatten(0, 1), targets[first : first + 32].flatten(), reduction="sum"
            )
            total += float(losses)
            count += targets[first : first + 32].numel()
    return total / count
