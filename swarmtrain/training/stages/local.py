"""Mode ``diloco``: the weights that one stage trains by itself, and their optimizer (spec 11 §2.8).

Each local step is one of the inner optimizer's, as a trainer of a whole model would take it; what
they change together is the pseudo-gradient that the stage contributes to its round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swarmtrain.training.stages.cut import StageLayout
from swarmtrain_protocols.stageopt import BETA1, BETA2, EPS, lr_factor


@dataclass(frozen=True, slots=True)
class LocalRules:
    """The run keys ``inner_*`` and ``total_steps``."""

    optimizer: str
    lr: float
    weight_decay: float
    clip: float
    warmup: int
    total: int

    @classmethod
    def of(cls, keys: Mapping[str, Any]) -> LocalRules | None:
        """None: the stages of this run step together."""
        if keys.get("pipeline_mode") != "diloco":
            return None
        return cls(
            keys["inner_optimizer"],
            keys["inner_lr"],
            keys["inner_weight_decay"],
            keys["inner_clip"],
            keys["inner_warmup_steps"],
            keys["total_steps"],
        )


class LocalStage:
    """θ of one stage since it took up a state. Tensors [n] in the order of ``layout``."""

    def __init__(
        self, layout: StageLayout, rules: LocalRules, device: torch.device, dtype: torch.dtype
    ) -> None:
        values = sum(math.prod(shape) for _, shape in layout)
        self.theta = torch.zeros(values, device=device, dtype=dtype)
        self.anchor = torch.zeros(values, device=device, dtype=dtype)
        self.moved = False
        """θ differs from the state that was taken up."""
        self._steps = 0
        self._rules = rules
        self._parameters: list[nn.Parameter] = []
        self._places: list[tuple[slice, tuple[int, ...]]] = []
        start = 0
        for _, shape in layout:
            place = slice(start, start + math.prod(shape))
            self._places.append((place, shape))
            self._parameters.append(nn.Parameter(self.theta[place].view(shape)))
            start = place.stop
        self._optimizer = make_optimizer(self._parameters, rules)

    def start(self, theta: Tensor) -> None:
        """Take up a state; the optimizer's moments stay, as in DiLoCo (arXiv 2311.08105)."""
        with torch.no_grad():
            self.theta.copy_(theta)
            self.anchor.copy_(theta)
        self.moved = False

    def step(self, gradient: Tensor, run_step: int) -> None:
        """One step with the mean gradient [n]. ``run_step``: local steps of the run before it."""
        rules = self._rules
        for p, (place, shape) in zip(self._parameters, self._places, strict=True):
            p.grad = gradient[place].view(shape)
        if rules.clip:
            nn.utils.clip_grad_norm_(self._parameters, rules.clip)
        rate = rules.lr * lr_factor(self._steps, run_step, rules.warmup, rules.total)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        for p in self._parameters:
            p.grad = None
        self._steps += 1
        self.moved = True

    def delta(self) -> Tensor:
        """θ of the state that was taken up, minus θ now."""
        return self.anchor - self.theta


def make_optimizer(parameters: Sequence[nn.Parameter], rules: LocalRules) -> torch.optim.Optimizer:
    """The inner optimizer of a run; parameters of one dimension do not decay."""
    if rules.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rules.lr)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": rules.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=rules.lr, betas=(BETA1, BETA2), eps=EPS)
