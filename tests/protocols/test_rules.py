"""Which arithmetic and which slots a channel has."""

from __future__ import annotations

import numpy as np
import pytest

from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.rounds.effects import ApplyResult
from swarmtrain_protocols.rules import Rules, outer_rule
from tests.protocols import reference_numbers as reference

STAGE = "train/1/0"


@pytest.mark.parametrize(
    ("keys", "slots"),
    [
        (None, ("momentum",)),
        (RunKeys(), ("momentum",)),
        (RunKeys(stages=2), ("m", "v")),
        (RunKeys(stages=2, inner_optimizer="sgd"), ()),
        (RunKeys(stages=2, pipeline_mode="diloco"), ("momentum",)),
    ],
)
def test_slots_follow_from_the_keys(keys: RunKeys | None, slots: tuple[str, ...]) -> None:
    rules = Rules(keys)
    assert rules.slots(STAGE) == rules.slots("train/0/0") == slots
    assert rules.stepwise(STAGE) == (slots != ("momentum",))
    assert not rules.stepwise("group/x")


def test_a_mean_pseudo_gradient_takes_the_outer_step() -> None:
    theta, momentum = np.array([1.0, -2.0], "f4"), np.array([0.5, 0.25], "f4")
    mean = np.array([0.1, 0.3], "f4")
    lr, beta = reference.f32(0.7), reference.f32(0.9)
    expected = reference.outer_step(theta.tolist(), momentum.tolist(), mean.tolist(), lr, beta)
    again = theta.copy(), momentum.copy()
    applied = ApplyResult(STAGE, 4, bytes(32), lr=0.7, momentum=0.9)
    Rules().step(applied)(theta, [momentum], mean, 0)
    assert (theta.tolist(), momentum.tolist()) == expected
    outer_rule(0.7, 0.9)(again[0], [again[1]], mean, 0)
    assert again[0].tolist() == expected[0]


def test_a_mean_gradient_takes_the_optimizer_of_the_run() -> None:
    keys = RunKeys(stages=2, inner_optimizer="sgd", inner_lr=0.5, inner_warmup_steps=10)
    theta, gradient = np.array([1.0, -2.0, 3.0], "f4"), np.array([0.1, 0.3, 0.7], "f4")
    applied = ApplyResult(STAGE, 4, bytes(32), scale=0.25)
    expected = reference.sgd_step(theta.tolist(), gradient.tolist(), 0.25, 0.25)
    Rules(keys).step(applied)(theta, [], gradient, 0)
    assert theta.tolist() == expected
