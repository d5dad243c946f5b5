"""The overlay against three independent accounts: its history, the published recursion, DiLoCo."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from swarmtrain_protocols import overlap
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.overlap import MODES, Mode, Overlay
from tests.protocols import reference_numbers as reference

VECTORS = json.loads((reference.VECTORS / "overlap.json").read_text())
Array = np.ndarray[Any, Any]
CLOSE = {"rtol": 0, "atol": 1e-12}
N = 5


class Canon:
    """The canonical recursion in fp64."""

    def __init__(self, theta: Array, lr: float, beta: float) -> None:
        self.theta, self.b, self.lr, self.beta = theta.copy(), np.zeros_like(theta), lr, beta

    def commit(self, mean: Array) -> None:
        self.b = self.beta * self.b + mean
        self.theta = self.theta - self.lr * (mean + self.beta * self.b)


def inner_phase(x: Array, target: Array) -> Array:
    """Made-up inner steps: deterministic, not linear, different per member by its target."""
    for _ in range(3):
        x = x - 0.2 * np.tanh(x - target)
    return x


def test_the_vector_file_is_what_the_reference_computes() -> None:
    assert json.loads(json.dumps(reference.build_overlap())) == VECTORS


@pytest.mark.parametrize("run", VECTORS["runs"], ids=lambda run: run["mode"])
def test_golden_trajectories(run: dict[str, Any]) -> None:
    overlay = Overlay(run["mode"], 3, run["lr"], run["beta"], np.float64)
    theta = np.array(run["theta"])
    x = np.zeros(3)
    overlay.start(theta, x)
    for phase in run["phases"]:
        x -= phase["progress"]
        handover = overlay.boundary(theta, x, phase["weight"])
        np.testing.assert_allclose(handover.delta, phase["delta"], **CLOSE)
        if run["mode"] != "off":
            np.testing.assert_allclose(x, phase["base"], **CLOSE)
        theta = np.array(phase["theta"])
        overlay.decided(phase["outcome"])
        if run["mode"] == "off":
            overlay.new_base(theta, x)
            np.testing.assert_allclose(x, phase["base"], **CLOSE)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(25))
def test_any_mix_of_outcomes_equals_the_history(mode: Mode, seed: int) -> None:
    """Aborts, exclusions, rounds without us, changing weights and coefficients, late decisions."""
    draw = random.Random(seed)
    lr, beta = draw.choice([(0.7, 0.9), (1.0, 0.0), (0.3, 0.5)])
    start = np.array([draw.uniform(-1, 1) for _ in range(N)])
    canon = Canon(start, lr, beta)
    overlay, oracle = (
        Overlay(mode, N, lr, beta, np.float64),
        reference.OverlapOracle(mode, N, lr, beta),
    )
    x = np.zeros(N)
    overlay.start(canon.theta, x)
    oracle.base = start.tolist()
    ages = 0
    for _ in range(40):
        x -= np.array([draw.uniform(-0.1, 0.1) for _ in range(N)])
        weight = draw.choice([1.0, 0.5, 0.25, 0.1])
        expected = oracle.boundary(x.tolist())
        handover = overlay.boundary(canon.theta, x, weight)
        np.testing.assert_allclose(handover.delta, expected, **CLOSE)
        assert handover.age == ages
        delta = handover.delta.copy()
        if mode != "off":
            view = oracle.view(canon.theta.tolist(), weight)
            np.testing.assert_allclose(x, view, **CLOSE)
            oracle.base = x.tolist()
            x -= 0.01  # inner steps go on while the round is decided
        kept = x.copy()
        for _ in range(draw.choice([0, 0, 1])):
            canon.commit(np.array([draw.uniform(-0.1, 0.1) for _ in range(N)]))
            overlay.passed()
            oracle.commits.append(None)
        outcome = draw.choice([None, 0.0, weight, draw.uniform(0.05, 1)])
        if outcome is not None:
            canon.commit(outcome * delta + np.array([draw.uniform(-0.1, 0.1) for _ in range(N)]))
        overlay.decided(outcome)
        oracle.decided(outcome)
        ages = 0 if outcome else ages + 1
        assert overlay.requeued == ages
        assert (x == kept).all()  # a decision moves neither x nor base
        if mode == "off":
            overlay.new_base(canon.theta, x)
            oracle.base = x.tolist()
            np.testing.assert_array_equal(x, canon.theta)
        if mode == "eager":
            np.testing.assert_allclose(overlay.A, oracle.momentum(), **CLOSE)


@pytest.mark.parametrize("members", [1, 2, 4])
@pytest.mark.parametrize(("lr", "beta"), [(0.7, 0.5), (0.3, 0.9), (1.0, 0.0)])
def test_eager_equals_the_published_recursion(members: int, lr: float, beta: float) -> None:
    """Algorithm 3 of arXiv 2502.12996: private theta and momentum, fed by corrected averages."""
    rng = np.random.default_rng(members)
    start = rng.standard_normal(N)
    targets = rng.standard_normal((members, N))
    theirs, momenta = np.tile(start, (members, 1)), np.zeros((members, N))
    previous, mean_before = np.zeros((members, N)), np.zeros(N)
    canon = Canon(start, lr, beta)
    overlays = [Overlay("eager", N, lr, beta, np.float64) for _ in range(members)]
    ours = np.zeros((members, N))
    for overlay, x in zip(overlays, ours, strict=True):
        overlay.start(canon.theta, x)
    for round_number in range(30):
        deltas = np.stack([v - inner_phase(v, t) for v, t in zip(theirs, targets, strict=True)])
        mixed = deltas / members + (mean_before - previous / members)
        momenta = beta * momenta + mixed
        theirs = theirs - lr * (mixed + beta * momenta)
        mean_before, previous = deltas.mean(axis=0), deltas
        if round_number:
            canon.commit(np.mean([o.delta for o in overlays], axis=0))
            for overlay in overlays:
                overlay.decided(1 / members)
        for overlay, x, target in zip(overlays, ours, targets, strict=True):
            x[:] = inner_phase(x, target)
            overlay.boundary(canon.theta, x, 1 / members)
        np.testing.assert_allclose(ours, theirs, **CLOSE)


def test_eager_alone_is_undelayed_diloco() -> None:
    rng = np.random.default_rng(0)
    start, target = rng.standard_normal(N), rng.standard_normal(N)
    diloco, canon = Canon(start, 0.7, 0.9), Canon(start, 0.7, 0.9)
    overlay, x = Overlay("eager", N, 0.7, 0.9, np.float64), np.zeros(N)
    overlay.start(canon.theta, x)
    for round_number in range(40):
        diloco.commit(diloco.theta - inner_phase(diloco.theta, target))
        if round_number:
            canon.commit(overlay.delta)
            overlay.decided(1.0)
        x[:] = inner_phase(x, target)
        overlay.boundary(canon.theta, x, 1.0)
        np.testing.assert_allclose(x, diloco.theta, **CLOSE)


def test_off_is_diloco_and_delayed_is_one_round_late() -> None:
    rng = np.random.default_rng(1)
    start, target = rng.standard_normal(N), rng.standard_normal(N)
    for mode in ("off", "delayed"):
        plain, canon = Canon(start, 0.2, 0.9), Canon(start, 0.2, 0.9)
        overlay, x = Overlay(mode, N, 0.2, 0.9, np.float64), np.zeros(N)
        overlay.start(canon.theta, x)
        view = start
        for _ in range(20):
            fresh = view - inner_phase(view, target)
            if mode == "delayed":
                view = plain.theta
            plain.commit(fresh)
            if mode == "off":
                view = plain.theta
            x[:] = inner_phase(x, target)
            overlay.boundary(canon.theta, x, 1.0)
            canon.commit(overlay.delta)
            overlay.decided(1.0)
            if mode == "off":
                overlay.new_base(canon.theta, x)
            np.testing.assert_allclose(x, view, **CLOSE)


def test_progress_of_an_aborted_round_is_neither_lost_nor_counted_twice() -> None:
    """With lr 1 and momentum 0, one member alone ends where it would without aborts."""
    canon, overlay, x = (
        Canon(np.zeros(N), 1.0, 0.0),
        Overlay("eager", N, 1.0, 0.0, "f8"),
        np.ones(N),
    )
    overlay.start(canon.theta, x)
    total = np.zeros(N)
    for outcome in (None, 0.0, None, 1.0, None, 1.0):
        x -= 0.5
        total -= 0.5
        overlay.boundary(canon.theta, x, 1.0)
        np.testing.assert_allclose(x, total, **CLOSE)
        if outcome is not None:
            canon.commit(outcome * overlay.delta)
        overlay.decided(outcome)
    np.testing.assert_allclose(canon.theta, total, **CLOSE)


def test_long_vectors_in_slices_equal_short_ones() -> None:
    n = overlap.SLICE_VALUES + 17
    rng = np.random.default_rng(2)
    theta, progress = rng.standard_normal(n).astype("f4"), rng.standard_normal(n).astype("f4")
    whole, x = Overlay("eager", n, 0.4, 0.9), np.zeros(n, "f4")
    whole.start(theta, x)
    last, y = Overlay("eager", 20, 0.4, 0.9), np.zeros(20, "f4")
    last.start(theta[-20:], y)
    for outcome in (0.25, None, 0.5):
        x -= progress
        y -= progress[-20:]
        whole.boundary(theta, x, 0.25)
        last.boundary(theta[-20:], y, 0.25)
        assert x[-20:].tobytes() == y.tobytes()
        whole.decided(outcome)
        last.decided(outcome)
    assert whole.A[-20:].tobytes() == last.A.tobytes()


def test_the_handover_can_live_in_a_given_buffer() -> None:
    shared = np.full(N, np.nan, np.float32)
    overlay, x = Overlay("delayed", N, 0.2, 0.9, delta=shared), np.zeros(N, np.float32)
    overlay.start(np.ones(N, np.float32), x)
    x -= 2
    assert overlay.boundary(np.ones(N, np.float32), x, 1.0).delta is shared
    assert shared.tolist() == [2.0] * N
    with pytest.raises(LocalProtocolError):
        Overlay("delayed", N, 0.2, 0.9, delta=np.zeros(N))


def test_start_forgets_private_progress() -> None:
    overlay, x, theta = Overlay("eager", N, 0.4, 0.9, "f8"), np.zeros(N), np.ones(N)
    overlay.start(theta, x)
    for outcome in (0.5, None):
        x -= 1
        overlay.boundary(theta, x, 0.5)
        overlay.decided(outcome)
    assert overlay.A.any()
    assert overlay.P.any()
    overlay.start(theta, x)
    assert not overlay.A.any()
    assert not overlay.P.any()
    assert (x == theta).all()
    assert overlay.requeued == 0


def test_order_of_calls_is_enforced() -> None:
    overlay, x, theta = Overlay("off", N, 0.4, 0.9, "f8"), np.zeros(N), np.ones(N)
    overlay.start(theta, x)
    with pytest.raises(LocalProtocolError):
        overlay.decided(1.0)
    overlay.boundary(theta, x, 1.0)
    with pytest.raises(LocalProtocolError):
        overlay.boundary(theta, x, 1.0)
    with pytest.raises(LocalProtocolError):
        overlay.new_base(theta, x)
    with pytest.raises(LocalProtocolError):
        Overlay("maybe", N, 0.4, 0.9)  # type: ignore[arg-type]


SWITCHES: tuple[tuple[int, Mode, float], ...] = (
    (0, "off", 0.7),
    (9, "eager", 0.4),
    (21, "off", 0.7),
    (27, "delayed", 0.2),
    (33, "eager", 0.4),
)
"""(first round, mode, outer learning rate): what a log may say of a run."""


def step_at(round_number: int) -> tuple[Mode, float]:
    return [(mode, lr) for first, mode, lr in SWITCHES if first <= round_number][-1]


class SwitchingMember:
    """The rules of the specification, written down from the history of one member.

    ``commits`` are the committed contributions since eager mode began, newest last.
    """

    def __init__(self, theta: Array, beta: float) -> None:
        self.base, self.beta = theta.copy(), beta
        self.mode: Mode = "off"
        self.commits: list[Array] = []
        self.waiting: list[Array] = []

    def boundary(self, theta: Array, x: Array, mode: Mode, lr: float, weight: float) -> Array:
        if mode != self.mode:
            self.mode, self.commits = mode, []
        self.waiting.append(self.base - x)
        delta = np.sum(self.waiting, axis=0)
        if mode == "delayed":
            self.base = theta.copy()
        elif mode == "eager":
            own = np.zeros_like(theta)
            for age, mean in enumerate(reversed(self.commits)):
                own = own + self.beta**age * mean
            pending = weight * delta
            self.base = theta - lr * (pending + self.beta * (self.beta * own + pending))
        return delta

    def decided(self, theta: Array, coefficient: float | None) -> None:
        if coefficient is not None:
            mean = coefficient * np.sum(self.waiting, axis=0)
            self.commits.append(mean)
        if coefficient:
            self.waiting = []
        if self.mode == "off":
            self.base = theta.copy()


@pytest.mark.parametrize("seed", range(20))
def test_modes_switch_at_boundaries_without_losing_or_repeating_progress(seed: int) -> None:
    """Four members through off, eager, off, delayed, eager: aborts, exclusions, other weights.

    Against the rules written down from the history, and against a balance: what a member's inner
    steps have moved is in committed contributions, each once, or waits in the next.
    """
    draw, members, beta = random.Random(seed), 4, draw_beta(seed)
    canon = Canon(np.array([draw.uniform(-1, 1) for _ in range(N)]), 0.7, beta)
    overlays = [Overlay("off", N, 0.7, beta, np.float64) for _ in range(members)]
    oracles = [SwitchingMember(canon.theta, beta) for _ in range(members)]
    views = [np.zeros(N) for _ in range(members)]
    moved, counted = np.zeros((members, N)), np.zeros((members, N))
    for overlay, x in zip(overlays, views, strict=True):
        overlay.start(canon.theta, x)
    number = 0
    while number < 40:
        mode, lr = step_at(number)
        weights = [draw.choice([0.25, 0.25, 0.1, 0.4]) for _ in range(members)]
        handed = []
        for m in range(members):
            progress = np.array([draw.uniform(-0.1, 0.1) for _ in range(N)])
            views[m] -= progress
            moved[m] += progress
            overlays[m].switch(mode, lr, beta)
            expected = oracles[m].boundary(canon.theta, views[m], mode, lr, weights[m])
            delta = overlays[m].boundary(canon.theta, views[m], weights[m]).delta
            np.testing.assert_allclose(delta, expected, **CLOSE)
            if mode != "off":
                np.testing.assert_allclose(views[m], oracles[m].base, **CLOSE)
            handed.append(delta.copy())
        aborted = draw.random() < 0.2
        out = [m for m in range(members) if draw.random() < 0.15][: members - 1]
        fates = [None if aborted else 0.0 if m in out else weights[m] for m in range(members)]
        if not aborted:
            canon.lr = lr
            canon.commit(np.sum([(a or 0.0) * d for a, d in zip(fates, handed, strict=True)], 0))
            number += 1
        for m, fate in enumerate(fates):
            overlays[m].decided(fate)
            oracles[m].decided(canon.theta, fate)
            counted[m] += handed[m] if fate else 0.0
            if mode == "off":
                overlays[m].new_base(canon.theta, views[m])
            waiting = np.sum(oracles[m].waiting, axis=0) if oracles[m].waiting else np.zeros(N)
            np.testing.assert_allclose(counted[m] + waiting, moved[m], **CLOSE)
            assert overlays[m].requeued == len(oracles[m].waiting)


def draw_beta(seed: int) -> float:
    return (0.9, 0.5, 0.0)[seed % 3]


def test_off_eager_off_alone_ends_where_all_progress_leads() -> None:
    """With lr 1 and momentum 0 one member's model is the sum of its steps, whatever the modes."""
    canon, overlay, x = Canon(np.zeros(N), 1.0, 0.0), Overlay("off", N, 1.0, 0.0, "f8"), np.ones(N)
    overlay.start(canon.theta, x)
    total = np.zeros(N)
    modes: list[Mode] = ["off", "off", "eager", "eager", "eager", "off", "off", "eager", "off"]
    for mode, outcome in zip(modes, (1, None, 1, None, 1, None, 1, 1, 1), strict=True):
        x -= 0.5
        total -= 0.5
        overlay.switch(mode, 1.0, 0.0)
        overlay.boundary(canon.theta, x, 1.0)
        if mode == "eager":
            np.testing.assert_allclose(x, total, **CLOSE)
        if outcome is not None:
            canon.commit(outcome * overlay.delta)
        overlay.decided(outcome)
        if mode == "off":
            overlay.new_base(canon.theta, x)
    np.testing.assert_allclose(canon.theta, total, **CLOSE)


def test_nothing_switches_while_a_contribution_is_undecided() -> None:
    overlay, x, theta = Overlay("eager", N, 0.4, 0.9, "f8"), np.zeros(N), np.ones(N)
    overlay.start(theta, x)
    overlay.boundary(theta, x, 1.0)
    with pytest.raises(LocalProtocolError):
        overlay.switch("off", 0.7, 0.9)
    overlay.decided(0.5)
    with pytest.raises(LocalProtocolError):
        overlay.switch("maybe", 0.7, 0.9)  # type: ignore[arg-type]
    x -= 1
    overlay.boundary(theta, x, 1.0)
    overlay.decided(1.0)
    assert overlay.A.any()
    overlay.switch("eager", 0.3, 0.9)
    assert overlay.A.any(), "only another mode forgets it"
    overlay.switch("off", 0.7, 0.9)
    overlay.switch("eager", 0.4, 0.9)
    assert not overlay.A.any(), "a joiner's A"
