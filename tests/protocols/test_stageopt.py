"""The optimizer of stages: vectors, plain Python, schedules, and where weights do not decay."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain_protocols.channels import are_ranges
from swarmtrain_protocols.codecs import kernels, use_numba
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.stageopt import (
    AdamWNumbers,
    StageOptimizer,
    StepTerms,
    cosine,
    lr_factor,
    pieces,
    power,
    square_norm,
)
from tests.protocols import reference_numbers as reference

Array = np.ndarray[Any, Any]
VECTORS = json.loads((reference.VECTORS / "stageopt.json").read_text())
SGD = StageOptimizer("sgd", 0.5, 0.1, 0, 0)
ADAMW = StageOptimizer("adamw", 3e-3, 0.1, 0, 0)


@pytest.fixture(params=[False, True], ids=["numpy", "numba"])
def _kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    use_numba(request.param)
    yield
    use_numba(False)


def f32(hexed: str) -> Array:
    return np.frombuffer(bytes.fromhex(hexed), "<f4").copy()


def vectors(n: int, seed: int = 0) -> list[Array]:
    """theta, m, v and a gradient, with zeros, denormals and large values among them."""
    rng = np.random.default_rng(seed)
    made = [rng.standard_normal(n).astype(np.float32) for _ in range(4)]
    made[2] = np.abs(made[2])
    for index, array in enumerate(made):
        array[index::97] = [0.0, 2.0**-149, 2.0**100, 1e-30][index]
    return made


def test_the_vector_file_is_what_the_reference_computes() -> None:
    assert reference.build_stageopt() == VECTORS


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("case", VECTORS["adamw"], ids=lambda c: f"decay-{c['weight_decay']}")
def test_vectors_of_adamw(case: dict[str, Any]) -> None:
    rule = StageOptimizer("adamw", case["lr"], case["weight_decay"], 0, 0)
    m, v = np.zeros(16, "f4"), np.zeros(16, "f4")
    for step in case["steps"]:
        terms = StepTerms(step["step"], case["scale"])
        numbers = np.array(rule.numbers(terms, decays=True), "<f4")
        assert numbers.tobytes().hex() == step["numbers"]
        theta = f32(step["theta_before"])
        rule.step(terms, theta, (m, v), f32(step["gradient"]), 0)
        for name, array in (("theta", theta), ("m", m), ("v", v)):
            assert array.tobytes().hex() == step[name], name


@pytest.mark.usefixtures("_kernels")
def test_vectors_of_sgd_and_of_the_norm() -> None:
    case = VECTORS["sgd"]
    theta = f32(case["theta_before"])
    rule = StageOptimizer("sgd", case["rate"], 0.0, 0, 0)
    rule.step(StepTerms(7, case["scale"]), theta, (), f32(case["gradient"]), 0)
    assert theta.tobytes().hex() == case["theta"]
    norm = VECTORS["norm"]
    assert struct.pack("<d", square_norm(f32(norm["values"]))).hex() == norm["square_norm"]


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("n", [1, 255, 256, 257, 1000, 40_000])
def test_plain_python_agrees_bit_for_bit(n: int) -> None:
    theta, m, v, gradient = vectors(n)
    terms = StepTerms(41, scale=0.25, recovered=12)
    numbers = ADAMW.numbers(terms, decays=True)._asdict()
    expected = reference.adamw_step(
        theta.tolist(), m.tolist(), v.tolist(), gradient.tolist(), numbers
    )
    plain = theta.copy()
    ADAMW.step(terms, theta, (m, v), gradient, 0)
    assert (theta.tolist(), m.tolist(), v.tolist()) == expected
    rate = float(np.float32(SGD.rate(terms)))
    wanted = reference.sgd_step(plain.tolist(), gradient.tolist(), 0.25, rate)
    SGD.step(terms, plain, (), gradient, 0)
    assert plain.tolist() == wanted
    assert square_norm(gradient) == reference.square_norm(gradient.tolist())


def test_the_norm_is_right_and_the_order_of_its_sum_is_fixed() -> None:
    x = vectors(3000)[3]
    assert square_norm(x) == pytest.approx(math.fsum(v * v for v in x.tolist()), rel=1e-12)
    # fp64 sums that depend on the order: one large value, then many that vanish beside it.
    x = np.array([2.0**27, *[0.7] * 2047], np.float32)
    in_order = 0.0
    for value in x.tolist():
        in_order += value * value
    assert reference.square_norm(x.tolist()) != in_order
    for numba in (False, True):
        use_numba(numba)
        assert square_norm(x) == reference.square_norm(x.tolist())
    use_numba(False)


@pytest.mark.usefixtures("_kernels")
def test_a_fused_multiply_add_would_be_noticed() -> None:
    keep, x = np.float32(1 + 2.0**-12), np.float32(1 + 2.0**-12)
    theta, m, v = np.full(64, x), np.full(64, -1.0, "f4"), np.full(64, 1.0, "f4")
    # beta1, beta2 and root2 are 1 and everything else is 0 or 1: theta = keep * theta + 1.
    numbers = AdamWNumbers(1, 1, 0, 1, 0, 1, 0, float(keep), -1)
    fused = np.float32(float(keep) * float(x) - 1.0)
    rounded = np.float32(keep * x) - np.float32(1.0)
    assert fused != rounded
    kernels.active().adamw_step(theta, m, v, np.zeros(64, "f4"), np.array(numbers, "f4"))
    assert (theta == rounded).all()


@pytest.mark.usefixtures("_kernels")
def test_values_in_plain_ranges_do_not_decay_and_chunks_do_not_show() -> None:
    n, ranges = 1000, ((0, 3), (40, 300), (512, 513), (998, 1000))
    theta, m, v, gradient = vectors(n, seed=5)
    with_decay = StageOptimizer("adamw", 0.01, 0.5, 0, 0)
    without = StageOptimizer("adamw", 0.01, 0.0, 0, 0)

    def stepped(rule: StageOptimizer, cuts: list[int], plain: Any = ()) -> Array:
        out, first, second = theta.copy(), m.copy(), v.copy()
        for start, stop in zip([0, *cuts], [*cuts, n], strict=True):
            part = slice(start, stop)
            terms = StepTerms(3, plain=plain)
            rule.step(terms, out[part], (first[part], second[part]), gradient[part], start)
        return out

    whole = stepped(with_decay, [], ranges)
    inside = np.zeros(n, bool)
    for first, last in ranges:
        inside[first:last] = True
    assert (
        whole.tobytes() == np.where(inside, stepped(without, []), stepped(with_decay, [])).tobytes()
    )
    assert (whole != stepped(with_decay, [])).any()
    for cuts in ([1], [256, 512, 768], [41, 299, 512, 513, 999]):
        assert stepped(with_decay, cuts, ranges).tobytes() == whole.tobytes()


@given(st.lists(st.integers(0, 60), max_size=10), st.integers(0, 60), st.integers(1, 40))
def test_pieces_cover_every_value_once(borders: list[int], start: int, n: int) -> None:
    borders = sorted(set(borders))
    ranges = tuple(zip(borders[0::2], borders[1::2], strict=False))
    assert are_ranges(ranges, 60)
    found = [
        (start + index, inside)
        for part, inside in pieces(ranges, start, n)
        for index in range(part.start, part.stop)
    ]
    expected = [
        (value, any(first <= value < last for first, last in ranges))
        for value in range(start, start + n)
    ]
    assert found == expected


def test_functions_that_must_not_come_from_the_c_library() -> None:
    for index in range(2001):
        turn = index / 2000
        assert cosine(turn) == pytest.approx(math.cos(math.pi * turn), abs=1e-15)
    assert (cosine(0.0), cosine(0.5), cosine(1.0)) == (1.0, 0.0, -1.0)
    for n in (0, 1, 2, 3, 10, 1000, 123_457):
        assert power(0.99, n) == pytest.approx(0.99**n, rel=1e-13)
    assert power(0.9, 10**9) == 0.0


def test_schedule() -> None:
    assert lr_factor(0, 0, 4, 0) == 0.25 and lr_factor(3, 3, 4, 0) == 1.0
    for step in range(4, 120):
        progress = min(1.0, (step - 4) / 100)
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2
        assert lr_factor(step, step, 4, 104) == pytest.approx(expected, rel=1e-14)
    rule = StageOptimizer.of(
        RunKeys(inner_lr=0.2, inner_warmup_steps=10, total_steps=110, inner_optimizer="sgd")
    )
    assert rule == StageOptimizer("sgd", 0.2, 0.1, 10, 110)
    assert rule.rate(StepTerms(0)) == pytest.approx(0.02)
    assert rule.rate(StepTerms(60)) == pytest.approx(0.2 * 0.55)
    assert rule.slots == () and ADAMW.slots == ("m", "v")


def test_a_recovered_stage_warms_up_above_the_others_and_settles() -> None:
    rule = StageOptimizer("adamw", 1.0, 0.0, 0, 0)
    rates = [rule.rate(StepTerms(step, recovered=1000)) for step in range(1000, 1600)]
    assert rates[0] == pytest.approx(1.1 / 20)
    assert rates[9] == pytest.approx((1 + 0.1 * 491 / 500) / 2)
    assert rates[19] == pytest.approx(1 + 0.1 * 481 / 500) == max(rates)
    assert rates[250] == pytest.approx(1.05)
    assert rates[500:] == [1.0] * 100
    # Bias correction begins anew with the moments: the first step of a constant gradient is lr.
    theta, m, v = np.zeros(4, "f4"), np.zeros(4, "f4"), np.zeros(4, "f4")
    rule.step(StepTerms(1000, recovered=1000), theta, (m, v), np.full(4, 3.0, "f4"), 0)
    assert theta == pytest.approx(-1.1 / 20, rel=1e-6)


def test_a_gradient_too_large_to_square_stops_a_value_and_poisons_nothing() -> None:
    theta, m, v = np.ones(2, "f4"), np.zeros(2, "f4"), np.zeros(2, "f4")
    ADAMW.step(StepTerms(0), theta, (m, v), np.array([2.0**110, 1.0], "f4"), 0)
    assert math.isinf(v[0]) and np.isfinite(theta).all() and np.isfinite(m).all()
    assert theta[0] == pytest.approx(1 - 3e-4) and theta[1] == pytest.approx(1 - 3e-4 - 3e-3)
