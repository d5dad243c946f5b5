"""The run on the trainer's side: its figures, and θ as the peer process shows it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from swarmtrain.training.flat import Flat
from swarmtrain.training.port import Session

F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SwarmState:
    """What is known here and now. ``members`` is 1 offline; ``loss`` is the mean of the phase."""

    round: int = 0
    step: int = 0
    members: int = 1
    loss: float = math.nan
    syncing: bool = False
    state_hash: str = ""


def samples_in(args: Iterable[Any], kwargs: Mapping[str, Any]) -> float:
    """The first dimension of the first tensor that goes into a model; 0 if there is none."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return float(value.shape[0]) if value.dim() else 1.0
    return 0.0


def read_theta(flat: Flat, session: Session | None) -> tuple[int, dict[str, F32]]:
    """Lowest round, and vectors f32[n] by channel: θ, or without a session the parameters."""
    vectors = {name: np.empty(n, np.float32) for name, n in flat.layout}
    rounds = [0]
    if session is None:
        for name, out in vectors.items():
            flat.read(name, out)
    else:
        found = [session.side.theta(name, out) for name, out in vectors.items()]
        rounds = [round_ for round_ in found if round_ is not None]
    return min(rounds), vectors
