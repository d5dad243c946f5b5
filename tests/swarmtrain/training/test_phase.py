"""One channel through all outcomes: committed, aborted, excluded, overdue, rewound."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from swarmtrain.training.swarm import Swarm
from swarmtrain_protocols.changes import InnerStep
from swarmtrain_protocols.errors import ConfigError
from swarmtrain_protocols.schedule import OuterStep
from tests.swarmtrain.training.fake_peer import FakeRun
from tests.swarmtrain.training.loops import Trainer, batch, make_model, train_step, vector

CHANNEL = "train/0/0"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def oracle_eager(steps: int, inner: int, lr: float, beta: float, sites: int) -> list[np.ndarray]:
    """The published eager recursion (arXiv 2502.12996), its private outer optimizer and all.

    The decision of round t - 1 arrives during phase t, so e_t = Δ̄_{t-1} + (Δ_t - Δ_{t-1}) / M.
    """
    models = [make_model(seed=0) for _ in range(sites)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in models]
    theta = [vector(m).astype(np.float64) for m in models]
    momentum = [np.zeros_like(theta[0]) for _ in models]
    previous = [np.zeros_like(theta[0]) for _ in models]
    for phase in range(steps // inner):
        deltas = []
        for site, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            for step in range(phase * inner, (phase + 1) * inner):
                train_step(model, optimizer, batch(site, step))
            deltas.append(theta[site] - vector(model))
        late = np.mean(previous, axis=0)
        for site, model in enumerate(models):
            e = late + (deltas[site] - previous[site]) / sites
            momentum[site] = beta * momentum[site] + e
            theta[site] = theta[site] - lr * (e + beta * momentum[site])
            nn.utils.vector_to_parameters(
                torch.from_numpy(theta[site].astype(np.float32)), model.parameters()
            )
        previous = deltas
    return [vector(m) for m in models]


def test_eager_equals_the_published_recursion(tmp_path):
    run = FakeRun(
        tmp_path, 2, {"overlap": "eager", "outer_lr": 0.4, "outer_momentum": 0.9}, inner_steps=4
    )
    for site in run.sites.values():
        site.withheld = True
    trainers = [Trainer(run, 0), Trainer(run, 1)]
    for _ in range(6):
        for trainer in trainers:
            trainer.step(4)
        assert all(
            trainer.swarm._port.wait_until(lambda: len(run.waiting) == 2, 10.0)
            for trainer in trainers
        )
        run.decide(CHANNEL)  # before the next boundary, as in the paper
    expected = oracle_eager(24, 4, 0.4, 0.9, 2)
    for trainer, reference in zip(trainers, expected, strict=True):
        assert np.abs(vector(trainer.model) - reference).max() < 2e-5
        trainer.swarm.close()


def test_an_aborted_round_loses_nothing_and_a_later_one_has_it(tmp_path):
    """Off, one site, outer (1, 0): after abort and commit θ = θ⁰ - (Δ_0 + Δ_1)."""
    run = FakeRun(tmp_path, 1, inner_steps=3)
    outcomes = iter(["aborted", "committed"])
    run.fate = lambda site, round_: next(outcomes)
    trainer = Trainer(run, 0)
    before = run.theta[CHANNEL].copy()
    trainer.step(3)
    assert run.rounds[CHANNEL] == 0
    assert np.array_equal(vector(trainer.model), before), "back at θ, the progress waits"
    reference = make_model(seed=0)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05)
    deltas = []
    for first in (0, 3):  # both phases start from θ⁰
        nn.utils.vector_to_parameters(torch.from_numpy(before.copy()), reference.parameters())
        for step in range(first, first + 3):
            train_step(reference, optimizer, batch(0, step))
        deltas.append(before - vector(reference))
    trainer.step(3)
    assert run.rounds[CHANNEL] == 1
    assert np.abs(run.theta[CHANNEL] - (before - deltas[0] - deltas[1])).max() < 1e-6
    given = [args for name, args in run.sites["site0"].calls if name == "handover"]
    assert [args["age"] for args in given] == [0, 1]
    fresh = given[0]["samples"]
    assert fresh > 0 and [args["samples"] for args in given] == [fresh, fresh]
    assert [args["carried"] for args in given] == [0.0, fresh], "its samples go along with it"
    trainer.swarm.close()


def test_eager_trains_on_while_undecided_and_then_waits_with_a_deadline(tmp_path):
    run = FakeRun(tmp_path, 1, {"overlap": "eager"}, inner_steps=4, max_extra_steps_factor=1.5)
    site = run.sites["site0"]
    site.withheld = True
    trainer = Trainer(run, 0, wait_s_max=0.05)
    trainer.step(4 + 4 + 5)
    assert "round_overdue" not in trainer.names(), "four steps and then up to six more"
    trainer.step()
    assert trainer.names().count("round_overdue") == 1
    trainer.step(3)
    assert trainer.names().count("round_overdue") == 1, "after the deadline it trains on"
    run.decide(CHANNEL)
    trainer.step()
    assert len([1 for name, _ in site.calls if name == "handover"]) >= 1
    assert trainer.swarm._port.wait_until(lambda: len(run.waiting) == 1, 10.0)
    said = [args for name, args in site.calls if name == "handover"]
    assert [args["steps"] for args in said] == [4, 14]
    run.decide(CHANNEL)
    assert trainer.swarm.flush(10.0)
    assert run.rounds[CHANNEL] == 2
    trainer.swarm.close()


def test_non_finite_progress_never_leaves_and_stops_training(tmp_path):
    run = FakeRun(tmp_path, 1, inner_steps=1)
    trainer = Trainer(run, 0)
    before = run.theta[CHANNEL].copy()
    for times in (1, 2, 3):
        with torch.no_grad():
            next(trainer.model.parameters()).mul_(float("nan"))
        trainer.step()
        assert trainer.names().count("non_finite") == times
        assert np.array_equal(vector(trainer.model), before), "back at θ"
        assert trainer.swarm.should_stop is (times == 3)
    assert "handover" not in [name for name, _ in run.sites["site0"].calls]
    assert trainer.swarm.error is not None and trainer.swarm.error.exit_code == 13
    trainer.swarm.close()


def test_fragments_take_turns_and_all_average(tmp_path):
    run = FakeRun(tmp_path, 1, inner_steps=4, fragments=2)
    trainer = Trainer(run, 0)
    trainer.step(8)
    assert trainer.swarm.flush()
    said = [args["channel"] for name, args in run.sites["site0"].calls if name == "handover"]
    assert said == ["train/0/0", "train/0/1", "train/0/0", "train/0/1"]
    assert run.rounds == {"train/0/0": 2, "train/0/1": 2}
    # One site, outer (1, 0): sharing changes nothing.
    plain = make_model(seed=0)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    for step in range(8):
        train_step(plain, optimizer, batch(0, step))
    assert np.abs(vector(trainer.model) - vector(plain)).max() < 1e-5
    trainer.swarm.close()


def test_streaming_takes_theta_up_after_the_delay_and_mixes(tmp_path):
    """One fragment, delay 2, mix 0.25, two sites of which the other never moves: by hand."""
    run = FakeRun(tmp_path, 1, inner_steps=4, delay=2, mix=0.25)
    trainer = Trainer(run, 0)
    plain = make_model(seed=0)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    for step in range(6):
        train_step(plain, optimizer, batch(0, step))
        if step == 3:
            theta = vector(plain)  # what one site's commit makes of it, with outer (1, 0)
    trainer.step(6)
    assert np.abs(run.theta[CHANNEL] - theta).max() < 1e-6
    expected = 0.25 * vector(plain) + 0.75 * theta
    assert np.abs(vector(trainer.model) - expected).max() < 1e-6
    trainer.step(2)
    assert trainer.swarm.flush(), "the hand-over of step 8 is on its way, on another thread"
    assert run.rounds[CHANNEL] == 2, "the delay does not make phases longer"
    trainer.swarm.close()


def test_delay_without_off_is_refused(tmp_path):
    run = FakeRun(tmp_path, 1, {"overlap": "eager"}, inner_steps=4, delay=2)
    with pytest.raises(ConfigError, match="overlap"):
        Trainer(run, 0)


def test_a_rewind_drops_private_progress(tmp_path):
    run = FakeRun(tmp_path, 1, {"overlap": "eager"}, inner_steps=2)
    trainer = Trainer(run, 0)
    checkpoint = run.theta[CHANNEL].copy()
    for _ in range(3):
        trainer.step(2)
        assert trainer.swarm.flush(10.0)
    assert run.rounds[CHANNEL] == 3
    with run.lock:
        run.theta[CHANNEL], run.rounds[CHANNEL] = checkpoint.copy(), 0
        run.sites["site0"].port.publish(CHANNEL, 0, checkpoint)
    trainer.step(2)
    assert "progress_dropped" in trainer.names()
    assert np.array_equal(vector(trainer.model), checkpoint)
    trainer.swarm.close()


def test_the_mode_of_each_round_comes_with_its_theta(tmp_path):
    """Off, eager, off with their own learning rates: by hand, from the progress that was made."""
    modes = {0: ("off", 1.0), 1: ("off", 1.0), 2: ("eager", 0.5), 3: ("eager", 0.5)}
    modes |= {4: ("off", 0.8)}
    run = FakeRun(tmp_path, 1, {"overlap": "off"}, inner_steps=2)
    run.step_of = lambda round_: OuterStep(*modes[min(round_, 4)], 0.0)
    site = run.sites["site0"]
    trainer = Trainer(run, 0)
    port = trainer.swarm._port
    assert port is not None
    for round_ in range(6):
        base = vector(trainer.model)
        mode, lr = modes[min(round_, 4)]
        site.withheld = mode == "eager"
        before = run.theta[CHANNEL].copy()
        trainer.step(2)
        if mode == "eager":
            assert port.wait_until(lambda: len(run.waiting) == 1, 10.0)
            delta = run.waiting[("site0", CHANNEL)]["value"]
            # With momentum 0 and weight 1 the private view is θ with the own step in it.
            assert np.abs(vector(trainer.model) - (before - np.float32(lr) * delta)).max() < 1e-6
            run.decide(CHANNEL)
            assert np.abs(run.theta[CHANNEL] - vector(trainer.model)).max() < 1e-6
        assert run.rounds[CHANNEL] == round_ + 1
        if mode == "off":
            assert np.array_equal(vector(trainer.model), run.theta[CHANNEL]), "it has waited for θ"
        reference = make_model(seed=0)
        nn.utils.vector_to_parameters(torch.from_numpy(base.copy()), reference.parameters())
        optimizer = torch.optim.SGD(reference.parameters(), lr=0.05)
        for step in (2 * round_, 2 * round_ + 1):
            train_step(reference, optimizer, batch(0, step))
        progress = base - vector(reference)
        expected = before - np.float32(lr) * progress
        assert np.abs(run.theta[CHANNEL] - expected).max() < 1e-6, "each phase's progress, once"
    switched = [e["overlap"] for e in trainer.events if e["event"] == "overlap_switched"]
    assert switched == ["eager", "off"]
    trainer.swarm.close()


def test_half_precision_models_hand_over_only_real_progress(tmp_path):
    """A model that rounds θ must not hand its rounding error over as progress."""
    run = FakeRun(tmp_path, 1, {"overlap": "eager"}, inner_steps=1)
    model = make_model().to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    swarm = Swarm(model, optimizer, connect=run.sites["site0"].connect)
    run.theta[CHANNEL] += np.float32(1e-4)  # below what bfloat16 resolves
    run.sites["site0"].port.publish(CHANNEL, 0, run.theta[CHANNEL])
    before = run.theta[CHANNEL].copy()
    for step in range(3):
        x, y = batch(0, step)
        train_step(model, optimizer, (x.bfloat16(), y.bfloat16()))
        assert swarm.flush(10.0)
    assert run.rounds[CHANNEL] == 3
    assert np.array_equal(run.theta[CHANNEL], before)
    swarm.close()


def test_an_excluded_contribution_goes_into_the_next_round(tmp_path):
    """Eager, two sites: what the swarm left out is handed over again, and momentum decays once."""
    run = FakeRun(
        tmp_path, 2, {"overlap": "eager", "outer_lr": 0.5, "outer_momentum": 0.5}, inner_steps=2
    )
    for site in run.sites.values():
        site.withheld = True
    trainers = [Trainer(run, 0), Trainer(run, 1)]
    outcome = {("site1", 1): "excluded"}
    run.fate = lambda site, round_: outcome.get((site, round_), "committed")
    given: list[np.ndarray] = []
    for _ in range(3):
        for trainer in trainers:
            trainer.step(2)
        port = trainers[0].swarm._port
        assert port is not None and port.wait_until(lambda: len(run.waiting) == 2, 10.0)
        given.append(run.waiting[("site1", CHANNEL)]["value"])
        run.decide(CHANNEL)
    for trainer in trainers:
        assert trainer.swarm.flush(10.0)
    calls = [a for name, a in run.sites["site1"].calls if name == "handover"]
    assert [a["age"] for a in calls] == [0, 0, 1]
    assert [a["carried"] for a in calls] == [0.0, 0.0, calls[1]["samples"]]
    assert [weights for _, _, weights in run.decisions] == [
        {"site0": 0.5, "site1": 0.5},
        {"site0": 1.0},
        {"site0": 0.5, "site1": 0.5},
    ]
    # A = β·(β·(0.5·Δ0)) + 0.5·Δ2, where Δ2 holds what was left out.
    expected = 0.25 * 0.5 * given[0] + 0.5 * given[2]
    assert np.abs(trainers[1].swarm._phases[0].overlay.A - expected).max() < 1e-6
    for trainer in trainers:
        trainer.swarm.close()


def test_the_number_of_inner_steps_changes_with_the_round(tmp_path):
    """What the founder changes in flight holds in the phase that begins from that round's θ."""
    steps_of = {0: 4, 1: 4, 2: 2, 3: 2, 4: 6, 5: 6}
    run = FakeRun(tmp_path, 1, {"overlap": "off"}, inner_steps=4)
    run.inner_of = lambda round_: InnerStep(steps_of[round_], 0.1, 0.0, 1.0, 0, 0, 1.0)
    trainer = Trainer(run, 0)
    done = []
    for round_ in range(5):
        before = trainer.swarm.state.step
        while run.rounds[CHANNEL] == round_:
            trainer.step(1)
        done.append(trainer.swarm.state.step - before)
        assert trainer.swarm.inner == run.inner_of(round_ + 1), "the phase of the new θ has begun"
    assert done == [4, 4, 2, 2, 6]
    trainer.swarm.close()
