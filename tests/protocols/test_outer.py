"""The outer step: vectors, and settings that are stable where the theory says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from swarmtrain_protocols.codecs import use_numba
from swarmtrain_protocols.outer import outer_step
from swarmtrain_protocols.schedule import auto_outer
from tests.protocols import reference_numbers as reference

VECTORS = json.loads((reference.VECTORS / "outer.json").read_text())


@pytest.fixture(params=[False, True], ids=["numpy", "numba"])
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    use_numba(request.param)
    yield
    use_numba(False)


def f32(hexed: str) -> np.ndarray[Any, Any]:
    return np.frombuffer(bytes.fromhex(hexed), "<f4").copy()


def test_the_vector_file_is_what_the_reference_computes() -> None:
    assert reference.build_outer() == VECTORS


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda c: f"{c['lr']}-{c['beta']}")
def test_vectors(case: dict[str, Any]) -> None:
    lr, beta = f32(case["lr"])[0], f32(case["beta"])[0]
    for step in case["rounds"]:
        theta, momentum = f32(step["theta_before"]), f32(step["momentum_before"])
        outer_step(theta, momentum, f32(step["mean"]), lr, beta)
        assert momentum.tobytes().hex() == step["momentum"]
        assert theta.tobytes().hex() == step["theta"]


@pytest.mark.usefixtures("kernels")
def test_plain_python_agrees_on_a_long_vector() -> None:
    rng = np.random.default_rng(12)
    theta, momentum, mean = (rng.standard_normal(3000).astype(np.float32) for _ in range(3))
    lr, beta = np.float32(0.7), np.float32(0.9)
    expected = reference.outer_step(
        theta.tolist(), momentum.tolist(), mean.tolist(), float(lr), float(beta)
    )
    outer_step(theta, momentum, mean, lr, beta)
    assert theta.tolist() == expected[0]
    assert momentum.tolist() == expected[1]


def test_gains_of_the_published_setting() -> None:
    """A constant mean: first step lr*(1+beta), in the long run lr/(1-beta) per round."""
    theta, momentum, mean = np.zeros(1, "f4"), np.zeros(1, "f4"), np.ones(1, "f4")
    outer_step(theta, momentum, mean, np.float32(0.7), np.float32(0.9))
    assert theta[0] == pytest.approx(-0.7 * 1.9)
    for _ in range(300):
        before = theta.copy()
        outer_step(theta, momentum, mean, np.float32(0.7), np.float32(0.9))
    assert (before - theta)[0] == pytest.approx(7.0, rel=1e-4)


def spectral_radius(overlap: str, members: int, lr: float, beta: float, progress: float) -> float:
    """Of the linear model in which each phase covers ``progress`` of the way to the optimum.

    State (theta, b, A, delta of last phase), all members alike. Eager: the phase starts from
    theta - lr*(P + beta*(beta*A + P)), P = delta / members; delayed: from theta.
    """

    def step(state: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        theta, b, a, delta = state
        if overlap == "off":
            fresh = progress * theta
            b = beta * b + fresh
            return np.array([theta - lr * (fresh + beta * b), b, 0.0, 0.0])
        pending = delta / members if overlap == "eager" else 0.0
        base = theta - lr * (pending + beta * (beta * a + pending))
        fresh = progress * base
        b = beta * b + delta  # the last phase's mean arrives during this one
        theta = theta - lr * (delta + beta * b)
        a = beta * a + (delta / members if overlap == "eager" else 0.0)
        return np.array([theta, b, a, fresh])

    matrix = np.stack([step(unit) for unit in np.eye(4)], axis=1)
    return float(np.abs(np.linalg.eigvals(matrix)).max())


# Largest stable learning rates at beta = 0.9 and full progress, from the stability table of the
# research notes; this model must reproduce them before it may judge auto_outer.
@pytest.mark.parametrize(
    ("overlap", "members", "limit"),
    [
        ("off", 4, 1.36),
        ("eager", 2, 0.77),
        ("eager", 4, 0.42),
        ("eager", 8, 0.32),
        ("eager", 64, 0.26),
        ("delayed", 4, 0.25),
    ],
)
def test_the_linear_model_has_the_published_limits(
    overlap: str, members: int, limit: float
) -> None:
    assert spectral_radius(overlap, members, limit * 0.97, 0.9, 1.0) < 1
    assert spectral_radius(overlap, members, limit * 1.03, 0.9, 1.0) > 1


@pytest.mark.parametrize("overlap", ["off", "delayed", "eager"])
@pytest.mark.parametrize("members", [1, 2, 4, 5, 8, 16, 64, 1024])
@pytest.mark.parametrize("rounds", [0, 20, 50, 5000])
def test_auto_is_stable(overlap: str, members: int, rounds: int) -> None:
    lr, beta = auto_outer(overlap, members, rounds)
    for progress in (0.05, 0.3, 0.99):
        assert spectral_radius(overlap, members, lr, beta, progress) < 1
