"""The deterministic stage optimizer against PyTorch's optimizers in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from swarmtrain.training.model import ByteGPT, Sizes
from swarmtrain.training.stages.cut import layout_of, plain_ranges
from swarmtrain_protocols.channels import are_ranges
from swarmtrain_protocols.codecs import use_numba
from swarmtrain_protocols.stageopt import StageOptimizer, StepTerms, square_norm

STEPS = 120
SIZES = ((8, 40), (40,), (3, 5), (7,))


def gradients(seed):
    """Noise around a drift, as in training; by parameter, fp32 values."""
    rng = np.random.default_rng(seed)
    for _ in range(STEPS):
        yield [(rng.standard_normal(size) * 0.1 + 0.02).astype(np.float32) for size in SIZES]


def narrow_ranges():
    """Where parameters of one dimension lie in the flat vector."""
    ranges, start = [], 0
    for size in SIZES:
        stop = start + int(np.prod(size))
        if len(size) == 1:
            ranges.append((start, stop))
        start = stop
    return tuple(ranges)


def flat(arrays):
    return np.concatenate([np.asarray(array, np.float32).reshape(-1) for array in arrays])


@pytest.fixture(params=[False, True], ids=["numpy", "numba"])
def _kernels(request):
    use_numba(request.param)
    yield
    use_numba(False)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_run_of_steps_equals_pytorch_in_fp64(name, clip):
    rule = StageOptimizer(name, lr=0.01, weight_decay=0.1, warmup=10, total=100)
    first = next(gradients(1))
    parameters = [torch.nn.Parameter(torch.from_numpy(a.astype(np.float64))) for a in first]
    if name == "sgd":
        oracle = torch.optim.SGD(parameters, lr=1.0)
    else:
        wide = [p for p in parameters if p.dim() > 1]
        narrow = [p for p in parameters if p.dim() <= 1]
        groups = [{"params": wide, "weight_decay": 0.1}, {"params": narrow, "weight_decay": 0.0}]
        oracle = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.99), eps=1e-8)
    theta = flat(first)
    slots = tuple(np.zeros_like(theta) for _ in rule.slots)
    moved = np.zeros(theta.size)
    for step, gradient in enumerate(gradients(2)):
        warm = min(1.0, (step + 1) / 10)
        decay = 0.55 + 0.45 * np.cos(np.pi * min(1.0, max(0, step - 10) / 90))
        for group in oracle.param_groups:
            group["lr"] = 0.01 * warm * decay
        for parameter, value in zip(parameters, gradient, strict=True):
            parameter.grad = torch.from_numpy(value.astype(np.float64))
        before = flat([p.detach() for p in parameters])
        scale = 1.0
        if clip:
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip))
            assert square_norm(flat(gradient)) == pytest.approx(norm**2, rel=1e-9)
            scale = float(np.float32(min(1.0, clip / norm)))
            assert scale < 1.0
        oracle.step()
        moved += np.abs(flat([p.detach() for p in parameters]) - before)
        terms = StepTerms(step, scale, plain=narrow_ranges())
        rule.step(terms, theta, slots, flat(gradient), 0)
        expected = flat([p.detach() for p in parameters])
        # A few roundings of 2**-24 relative to theta per step, whatever the direction.
        assert np.abs(theta - expected).max() <= 2e-6 + 1e-5 * moved.max()
    assert np.abs(theta - flat(first)).max() > 1e-3  # far beyond the tolerance


def test_a_recovered_stage_equals_a_new_optimizer_of_pytorch():
    """Moments and step count start anew; warm-up and bump are the schedule's."""
    rule = StageOptimizer("adamw", lr=0.01, weight_decay=0.0, warmup=0, total=0)
    first = next(gradients(3))
    parameters = [torch.nn.Parameter(torch.from_numpy(a.astype(np.float64))) for a in first]
    oracle = torch.optim.AdamW(parameters, lr=1.0, betas=(0.9, 0.99), weight_decay=0.0)
    theta = flat(first)
    slots = tuple(np.zeros_like(theta) for _ in rule.slots)
    for age, gradient in enumerate(gradients(4)):
        bump = 1.1 - 0.1 * age / 500
        oracle.param_groups[0]["lr"] = 0.01 * bump * min(1.0, (age + 1) / 20)
        for parameter, value in zip(parameters, gradient, strict=True):
            parameter.grad = torch.from_numpy(value.astype(np.float64))
        oracle.step()
        rule.step(StepTerms(700 + age, recovered=700), theta, slots, flat(gradient), 0)
    np.testing.assert_allclose(theta, flat([p.detach() for p in parameters]), atol=2e-6)


def test_what_does_not_decay_is_what_a_preset_leaves_out():
    """The ranges of a flat vector against the groups that ``presets.build`` makes."""
    model = ByteGPT(Sizes(d_model=16, heads=2, context=8), 0)
    ranges = plain_ranges(layout_of(model))
    parts = [torch.full((p.numel(),), float(p.dim() <= 1)) for p in model.parameters()]
    expected = torch.cat(parts).numpy() > 0
    inside = np.zeros(expected.size, bool)
    for first, last in ranges:
        inside[first:last] = True
    assert are_ranges(ranges, expected.size) and (inside == expected).all() and inside.any()
    assert plain_ranges([("a", (3,)), ("b", ()), ("c", (2, 2)), ("d", (5,))]) == ((0, 4), (8, 13))
