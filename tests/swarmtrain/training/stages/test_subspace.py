"""A constrained model in stages: exact boundaries, gradients of the constrained model, training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from swarmtrain.training.stages.reference import LocalPipeline, reference_step
from swarmtrain.training.stages.runtime import StageRuntime, subspace_of
from swarmtrain_protocols.codecs.boundary import Bounds, encode_tokens
from swarmtrain_protocols.errors import ConfigError
from swarmtrain_protocols.pipeline.candidates import average, near_identity
from tests.swarmtrain.training.stages.models import (
    DECODER,
    away_from_start,
    byte_gpt,
    keys,
    tokens,
    whole,
)

RANK = 4
GIVEN = keys(boundary_codec="subspace", model={**DECODER, "boundary_rank": RANK})
BYTES = byte_gpt(boundary_codec="subspace")


def constrained(given: dict[str, Any]) -> tuple[StageRuntime, dict[int, np.ndarray[Any, Any]]]:
    runtime = whole(given)
    space = runtime.subspace
    assert space is not None
    theta = {s: away_from_start(runtime.theta0(s), s) for s in runtime.served}
    for stage, values in theta.items():
        space.constrain(values, runtime.layout(stage))
        runtime.load(stage, values)
    return runtime, theta


def reconstruction_errors(runtime: StageRuntime, codec: Any) -> list[float]:
    """Relative error that each boundary of a forward pass would add."""
    ids = torch.from_numpy(tokens(0)[:, :-1].astype(np.int64))
    found = []
    with torch.no_grad():
        x = runtime.module(0).embed(ids) + codec.fixed(ids)  # type: ignore[operator]
        for stage in range(1, runtime.cut.stages + 1):
            decoded, _ = codec.decode_activation(codec.encode_activation(x, ids))
            found.append(float((decoded - x).norm() / x.norm()))
            x = runtime.module(stage)(x)
    return found


@pytest.mark.parametrize("given", [GIVEN, BYTES], ids=["decoder", "byte gpt"])
def test_boundaries_lose_nothing_after_any_step(given: dict[str, Any]) -> None:
    runtime, theta = constrained(given)
    pipeline = LocalPipeline({s: [runtime] for s in runtime.served}, 4)
    space = runtime.subspace
    assert space is not None
    for step in range(3):
        errors = reconstruction_errors(runtime, runtime.boundary)
        assert len(errors) == 4 and max(errors) <= 1e-5
        pipeline.micro_batch(0, tokens(step))
        for stage, values in theta.items():
            values -= np.float32(0.1) * runtime.accumulator(stage)
            unconstrained = values.copy()
            space.constrain(values, runtime.layout(stage))
            assert np.abs(values - unconstrained).max() > 0, "the step stayed inside by itself"
            runtime.load(stage, values)
        runtime.clear(runtime.served)
    runtime.load(2, away_from_start(theta[2], 2))  # not constrained: the test can fail
    assert max(reconstruction_errors(runtime, runtime.boundary)) > 1e-3


def test_boundaries_lose_nothing_after_a_recovery() -> None:
    runtime, theta = constrained(GIVEN)
    for candidate in (
        average(theta[1], theta[3], 0.25),
        near_identity(theta[1], runtime.layout(2), 0.1),
        runtime.theta0(2),
    ):
        runtime.load(2, candidate)
        assert max(reconstruction_errors(runtime, runtime.boundary)) <= 1e-5


def test_gradients_are_those_of_the_constrained_model_without_compression() -> None:
    """The weights that may move inside the subspace get the gradient of one process, projected."""
    runtime, theta = constrained(GIVEN)
    pipeline = LocalPipeline({s: [runtime] for s in runtime.served}, 4)
    loss = pipeline.micro_batch(0, tokens(0))
    space = runtime.subspace
    assert space is not None
    expected = reference_step(runtime.cut, theta, [tokens(0)], fixed=runtime.boundary.fixed)
    assert loss == pytest.approx(expected.losses[0], rel=1e-5)
    for stage, whole_gradient in expected.gradients.items():
        found, wanted = runtime.accumulator(stage), whole_gradient.astype(np.float32)
        space.constrain(found, runtime.layout(stage))
        space.constrain(wanted, runtime.layout(stage))
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_bytes_per_token() -> None:
    runtime, _ = constrained(GIVEN)
    data = runtime.forward(0, b"", encode_tokens(tokens(0))).output
    assert len(data) == 16 + 48 * (4 + 4 * RANK)
    gradient = runtime.boundary.encode_gradient(torch.ones(3, 16, 32))
    assert len(gradient) == 16 + 48 * 4 * RANK
    assert runtime.boundary.decode_activation(data)[0].shape == (3, 16, 32)
    assert Bounds(3, 16, 32).width == runtime.cut.width


def test_the_rank_is_an_eighth_unless_given_and_every_site_has_the_same_basis() -> None:
    runtime, other = (StageRuntime.build(keys(boundary_codec="subspace"), []) for _ in range(2))
    assert runtime.subspace is not None and other.subspace is not None
    assert runtime.subspace.rank == 32 // 8
    np.testing.assert_array_equal(runtime.subspace.basis, other.subspace.basis)
    assert StageRuntime.build(keys(), []).subspace is None


def test_a_tied_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="subspace"):
        StageRuntime.build(keys(boundary_codec="subspace", model={**DECODER, "tied": 1}), [])
    tied = StageRuntime.build(keys(model={**DECODER, "tied": 1}), [])
    assert subspace_of(tied.cut, 1, 0, "int8") is None
