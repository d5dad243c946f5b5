"""Pipelines equal one process: sums of gradients, losses, replicas, tied ends, other paths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from swarmtrain.training.model import ByteGPT, Sizes, loss_of
from swarmtrain.training.stages.reference import LocalPipeline, Whole, reference_step
from swarmtrain.training.stages.runtime import StageRuntime
from swarmtrain_protocols.codecs.boundary import encode_tokens
from swarmtrain_protocols.pipeline.hops import skipped_path, swapped_path
from swarmtrain_protocols.pipeline.sampling import Sampling
from tests.swarmtrain.training.stages.models import (
    BYTE_GPT,
    DECODER,
    away_from_start,
    byte_gpt,
    keys,
    tokens,
    whole,
)

MICRO_BATCHES = 5
MODELS = {
    "decoder": keys(),
    "tied decoder": keys(model={**DECODER, "tied": 1}),
    "one stage of two blocks": keys(stages=2),
    "byte gpt": byte_gpt(),
}


def relative(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Largest difference over the largest magnitude."""
    assert expected.any(), "nothing to compare with"
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def pipelines(given: dict[str, Any], dtype: str, copies: int = 1) -> LocalPipeline:
    """``copies`` replicas of every stage, each a runtime of its own with that stage only."""
    stages = range(given["stages"] + 1)
    replicas = {
        s: [StageRuntime.build(given, [s], dtype=dtype) for _ in range(copies)] for s in stages
    }
    for stage, runtimes in replicas.items():
        for runtime in runtimes:
            runtime.load(stage, away_from_start(runtime.theta0(stage), stage))
    return LocalPipeline(replicas, given["stages"])


def expected_of(given: dict[str, Any], dtype: str, **extra: Any) -> Any:
    runtime = whole(given)
    theta = {s: away_from_start(runtime.theta0(s), s) for s in runtime.served}
    batches = [tokens(k) for k in range(MICRO_BATCHES)]
    return reference_step(runtime.cut, theta, batches, getattr(torch, dtype), **extra)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("dtype", "codec", "bound"), [("float32", "fp32", 1e-5), ("float64", "fp64", 1e-10)]
)
def test_stages_equal_one_process(name: str, dtype: str, codec: str, bound: float) -> None:
    given = {**MODELS[name], "boundary_codec": codec}
    pipeline = pipelines(given, dtype)
    losses = [pipeline.micro_batch(k, tokens(k)) for k in range(MICRO_BATCHES)]
    expected = expected_of(given, dtype)
    for stage, gradient in expected.gradients.items():
        assert relative(pipeline.gradients(stage), gradient) <= bound, stage
    np.testing.assert_allclose(losses, expected.losses, rtol=bound)


def test_the_reference_is_the_gradient_of_the_uncut_model() -> None:
    """Independent of everything that cuts: ``ByteGPT`` as the ordinary trainer uses it."""
    model = ByteGPT(Sizes.from_mapping(Sizes(), BYTE_GPT), 3).double()
    runtime = whole(byte_gpt(boundary_codec="fp64"), "float64")
    theta = {s: away_from_start(runtime.theta0(s), s) for s in runtime.served}
    ends = [model.embed.weight, model.positions.weight, model.norm.gain, model.head.weight]
    parts = [ends, *[list(block.parameters()) for block in model.blocks]]
    for stage, found in enumerate(parts):
        start = 0
        for p in found:
            values = torch.from_numpy(theta[stage][start : start + p.numel()])
            p.data.copy_(values.view(p.shape))
            start += p.numel()
        assert start == theta[stage].size
    for k in range(MICRO_BATCHES):
        ids = torch.from_numpy(tokens(k).astype(np.int64))
        loss_of(model, ids[:, :-1], ids[:, 1:]).backward()
    found = reference_step(
        runtime.cut, theta, [tokens(k) for k in range(MICRO_BATCHES)], torch.float64
    )
    for stage, group in enumerate(parts):
        by_hand = torch.cat([p.grad.reshape(-1) for p in group if p.grad is not None]).numpy()
        assert relative(found.gradients[stage], by_hand) <= 1e-12


@pytest.mark.parametrize(
    ("dtype", "codec", "bound"), [("float32", "fp32", 1e-5), ("float64", "fp64", 1e-10)]
)
def test_two_replicas_that_share_the_micro_batches_sum_to_the_same(
    dtype: str, codec: str, bound: float
) -> None:
    given = keys(boundary_codec=codec)
    pipeline = pipelines(given, dtype, copies=2)
    for k in range(MICRO_BATCHES):
        pipeline.micro_batch(k, tokens(k))
    expected = expected_of(given, dtype)
    for stage, gradient in expected.gradients.items():
        halves = [r.gradient_sum(stage) for r in pipeline.replicas[stage]]
        assert all(relative(half, gradient) > 0.01 for half in halves), "one did everything"
        assert relative(pipeline.gradients(stage), gradient) <= bound


@pytest.mark.parametrize("path", [swapped_path(4), skipped_path((0, 1, 2, 3, 4, 5), 2)])
def test_other_paths_equal_one_process_on_that_path(path: tuple[int, ...]) -> None:
    given = keys(boundary_codec="fp64")
    pipeline = pipelines(given, "float64")
    for k in range(MICRO_BATCHES):
        pipeline.micro_batch(k, tokens(k), path)
    expected = expected_of(given, "float64", path=path)
    plain = expected_of(given, "float64")
    for stage in (hop for hop in path if 1 <= hop <= 4):
        assert relative(pipeline.gradients(stage), expected.gradients[stage]) <= 1e-10
        assert relative(plain.gradients[stage], expected.gradients[stage]) > 1e-3


def test_a_micro_batch_undone_and_done_elsewhere_counts_once() -> None:
    given = keys(boundary_codec="fp64")
    pipeline = pipelines(given, "float64", copies=2)
    for k in range(MICRO_BATCHES):
        pipeline.micro_batch(k, tokens(k))
    pipeline.micro_batch(1, tokens(0))  # a second claim of micro-batch 0, at the other replica
    doubled = pipeline.gradients(2)
    pipeline.micro_batch(1, tokens(0), sign=-1)
    expected = expected_of(given, "float64")
    assert relative(doubled, expected.gradients[2]) > 0.01
    for stage, gradient in expected.gradients.items():
        assert relative(pipeline.gradients(stage), gradient) <= 1e-10


def test_evaluation_is_the_loss_of_one_process_and_adds_nothing() -> None:
    pipeline = pipelines(keys(), "float32")
    expected = expected_of(keys(), "float32")
    losses = [pipeline.evaluate(tokens(k)) for k in range(MICRO_BATCHES)]
    np.testing.assert_allclose(losses, expected.losses, rtol=1e-6)
    assert not any(pipeline.gradients(stage).any() for stage in range(5))


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(1.0, seed=3), Sampling(0.7, top_k=8, top_p=0.9, seed=4)]
)
def test_generation_says_what_one_process_says(sampling: Sampling) -> None:
    """Longer than the context, so that the window moves."""
    given = keys()
    pipeline, prompt = pipelines(given, "float32"), [3, 1, 4, 1, 5]
    cut = pipeline.replicas[0][0].cut
    theta = {s: pipeline.replicas[s][0].theta(s) for s in range(5)}
    found = pipeline.generate(prompt, 24, sampling)
    assert found == Whole(cut, theta).generate(prompt, 24, sampling)
    assert len(found) == 24 and len(set(found)) > 2
    assert not any(pipeline.gradients(stage).any() for stage in range(5))


def test_bytes_of_a_run_are_what_the_codec_says() -> None:
    sent = {}
    for codec in ("fp32", "int8"):
        pipeline = pipelines(keys(boundary_codec=codec), "float32")
        pipeline.micro_batch(0, tokens(0))
        sent[codec] = pipeline.sent_nbytes
    rows, width, crossings = 3 * 16, 32, 10  # five boundaries, both ways
    assert sent["fp32"] == crossings * (16 + rows * 4 * width)
    assert sent["int8"] == crossings * (16 + rows * (4 + width))
    assert len(encode_tokens(tokens(0))) == 16 + 3 * 17 * 4
