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


def built(given: dict[str, Any]) -> tuple[StageRuntime, dict[int, np.ndarray[Any, Any]]]:
    """A runtime with weights that nobody has constrained, and those weights."""
    runtime = whole(given)
    theta = {s: away_from_start(runtime.theta0(s), s) for s in runtime.served}
    for stage, values in theta.items():
        runtime.load(stage, values)
    return runtime, theta


def projected(runtime: StageRuntime, theta: Any) -> dict[int, np.ndarray[Any, Any]]:
    """What the oracle makes of the weights."""
    found = {s: values.copy() for s, values in theta.items()}
    for stage, values in found.items():
        assert runtime.subspace is not None
        runtime.subspace.constrain(values, runtime.layout(stage))
    return found


def reconstruction_errors(runtime: StageRuntime) -> list[float]:
    """Relative error that each boundary of a forward pass would add."""
    codec: Any = runtime.boundary
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
    runtime, theta = built(given)
    pipeline = LocalPipeline({s: [runtime] for s in runtime.served}, 4)
    losses = []
    for _ in range(4):
        errors = reconstruction_errors(runtime)
        assert len(errors) == 4 and max(errors) <= 1e-5
        losses.append(pipeline.micro_batch(0, tokens(0)))
        for stage, values in theta.items():
            values -= np.float32(0.2) * np.sign(runtime.accumulator(stage)) / 100
            runtime.load(stage, values)
        runtime.clear(runtime.served)
    assert losses[-1] < losses[0] - 0.05
    with torch.no_grad():  # weights that nobody projects: the test can fail
        for p in runtime.module(2).parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    assert max(reconstruction_errors(runtime)) > 1e-3


def test_boundaries_lose_nothing_after_a_recovery() -> None:
    runtime, theta = built(GIVEN)
    for candidate in (
        average(theta[1], theta[3], 0.25),
        near_identity(theta[1], runtime.layout(2), 0.1),
        runtime.theta0(2),
    ):
        runtime.load(2, candidate)
        assert max(reconstruction_errors(runtime)) <= 1e-5


def test_a_stage_computes_with_the_oracles_projection() -> None:
    runtime, theta = built(GIVEN)
    for stage, expected in projected(runtime, theta).items():
        found = runtime.theta(stage)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert np.abs(found - theta[stage]).max() > 0.01
        runtime.load(stage, found)
        np.testing.assert_allclose(runtime.theta(stage), found, atol=1e-6)


def test_gradients_are_those_of_the_constrained_model_without_compression() -> None:
    """One process with projected weights and whole activations; its gradient, projected."""
    runtime, theta = built(GIVEN)
    pipeline = LocalPipeline({s: [runtime] for s in runtime.served}, 4)
    loss = pipeline.micro_batch(0, tokens(0))
    weights = projected(runtime, theta)
    expected = reference_step(runtime.cut, weights, [tokens(0)], fixed=runtime.boundary.fixed)
    assert loss == pytest.approx(expected.losses[0], rel=1e-5)
    wanted = projected(runtime, {s: g.astype(np.float32) for s, g in expected.gradients.items()})
    for stage, gradient in wanted.items():
        found = runtime.accumulator(stage)
        assert np.abs(found - gradient).max() <= 1e-5 * np.abs(gradient).max()
    pipeline.micro_batch(0, tokens(0), sign=-1)
    assert not any(runtime.accumulator(stage).any() for stage in runtime.served)


def test_bytes_per_token() -> None:
    runtime, _ = built(GIVEN)
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
