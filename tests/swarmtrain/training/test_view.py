"""θ and figures as the trainer's side sees them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from swarmtrain.training.flat import Flat
from swarmtrain.training.view import SwarmState, read_theta, samples_in
from tests.swarmtrain.training.loops import make_model, vector


def test_before_anything_is_known() -> None:
    state = SwarmState()
    assert (state.round, state.members, state.syncing) == (0, 1, False) and math.isnan(state.loss)


def test_samples_are_the_first_dimension_of_the_first_tensor() -> None:
    assert samples_in(("x", torch.zeros(5, 2), torch.zeros(7)), {}) == 5.0
    assert samples_in((), {"ids": torch.zeros(3)}) == 3.0
    assert samples_in((torch.tensor(1.0),), {}) == 1.0 and samples_in((2,), {"y": None}) == 0.0


def test_without_a_session_it_is_the_models_own_parameters() -> None:
    model = make_model()
    round_, vectors = read_theta(Flat(model, 1), None)
    assert round_ == 0 and np.array_equal(vectors["train/0/0"], vector(model))


def test_the_round_is_the_lowest_of_the_channels() -> None:
    shown = {"train/0/0": 7, "train/0/1": 6}

    def theta(name: str, out: np.ndarray) -> int:
        out[:] = shown[name]
        return shown[name]

    session: Any = SimpleNamespace(side=SimpleNamespace(theta=theta))
    round_, vectors = read_theta(Flat(make_model(), 2), session)
    assert round_ == 6 and {int(v[0]) for v in vectors.values()} == {6, 7}
