"""A tiny model and loop for tests: pure functions of (site, step)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from swarmtrain.training.swarm import Swarm
from tests.swarmtrain.training.fake_peer import FakeRun


def make_model(seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    for p in model.parameters():
        nn.init.normal_(p, generator=generator)
    return model


def batch(site: int, step: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * site + step)
    return (torch.randn(size, 3, generator=generator), torch.randn(size, 2, generator=generator))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> float:
    x, y = data
    loss = (model(x) - y).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def vector(model: nn.Module) -> np.ndarray:
    return np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])


class Trainer:
    """A model that trains with SGD at one fake site, on the thread that makes it."""

    def __init__(self, run: FakeRun, site: int, lr: float = 0.05, **arguments: Any) -> None:
        self.run, self.site = run, site
        self.model = make_model(seed=site)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        self.events: list[dict[str, Any]] = []
        arguments.setdefault("wait_s_max", 20.0)
        self.swarm = Swarm(
            self.model,
            self.optimizer,
            connect=run.sites[f"site{site}"].connect,
            fragments=run.keys.fragments,
            on_event=self.events.append,
            **arguments,
        )
        self.steps = 0

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            train_step(self.model, self.optimizer, batch(self.site, self.steps))
            self.steps += 1

    def names(self) -> list[str]:
        return [event["event"] for event in self.events]
