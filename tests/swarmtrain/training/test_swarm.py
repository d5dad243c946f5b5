"""The hook on a real optimizer, against peer processes that average in NumPy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from swarmtrain.training.swarm import Swarm
from swarmtrain_protocols.errors import ConfigError, QuorumLost
from tests.swarmtrain.training.fake_peer import FakeRun
from tests.swarmtrain.training.loops import Trainer, batch, make_model, train_step, vector

CHANNEL = "train/0/0"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def together(*jobs: Callable[[], None]) -> None:
    """Run jobs on threads of their own and raise what any of them raised."""
    errors: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def test_offline_it_simply_trains():
    plain, hooked = make_model(), make_model()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (plain, hooked)]
    with Swarm(hooked, optimizers[1]) as swarm:
        assert swarm.offline
        for step, data in enumerate(swarm.data([batch(0, s) for s in range(5)])):
            train_step(plain, optimizers[0], batch(0, step))
            swarm.log(loss=train_step(hooked, optimizers[1], data))
        assert swarm.state.step == 5 and swarm.state.members == 1 and not swarm.should_stop
        canonical = swarm.canonical()
        assert list(canonical) == [name for name, _ in hooked.named_parameters()]
        assert all(torch.equal(canonical[n], p) for n, p in hooked.named_parameters())
        assert swarm.flush()
    assert np.array_equal(vector(plain), vector(hooked))
    train_step(hooked, optimizers[1], batch(0, 9))
    assert swarm.state.step == 5, "after close the loop is left alone"


@pytest.mark.parametrize("sites", [2, 3])
def test_sgd_with_one_inner_step_is_data_parallel(tmp_path, sites):
    """H = 1, SGD, outer (1, 0), off: equals one worker on the union of the batches."""
    run = FakeRun(tmp_path, sites, inner_steps=1)
    trainers: dict[int, Trainer] = {}

    def work(site: int) -> None:
        trainers[site] = trainer = Trainer(run, site)
        barrier.wait(timeout=20)
        trainer.step(20)
        trainer.swarm.close()

    barrier = threading.Barrier(sites)
    together(*(lambda s=s: work(s) for s in range(sites)))
    reference = make_model(seed=int(run.author.removeprefix("site")))
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05)
    for step in range(20):
        parts = [batch(s, step) for s in range(sites)]
        train_step(reference, optimizer, tuple(torch.cat(x) for x in zip(*parts, strict=True)))
    assert run.rounds[CHANNEL] == 20
    for trainer in trainers.values():
        assert np.abs(vector(trainer.model) - vector(reference)).max() < 1e-5
        assert np.array_equal(vector(trainer.model), run.theta[CHANNEL])


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


def test_weights_are_samples(tmp_path):
    run = FakeRun(tmp_path, 2, inner_steps=2)
    sizes = {0: 8, 1: 24}
    barrier = threading.Barrier(2)

    def work(site: int) -> None:
        trainer = Trainer(run, site)
        barrier.wait(timeout=20)
        for step in range(2):
            train_step(trainer.model, trainer.optimizer, batch(site, step, sizes[site]))
        trainer.swarm.close()

    together(lambda: work(0), lambda: work(1))
    assert run.decisions == [(CHANNEL, 0, {"site0": 0.25, "site1": 0.75})]


def test_samples_of_accumulated_and_of_skipped_steps(tmp_path):
    run = FakeRun(tmp_path, 1, inner_steps=2)
    trainer = Trainer(run, 0)
    x, y = batch(0, 0, 4)
    for _ in range(3):  # three micro-batches, one step
        (trainer.model(x) - y).square().mean().backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    (trainer.model(x) - y).square().mean().backward()
    trainer.optimizer.zero_grad()  # skipped, as a GradScaler does after an overflow
    with torch.no_grad():
        trainer.model(x)
    train_step(trainer.model, trainer.optimizer, (x, y))
    trainer.swarm.close()
    said = [args["samples"] for name, args in run.sites["site0"].calls if name == "handover"]
    assert said == [16.0]


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
    ages = [args["age"] for name, args in run.sites["site0"].calls if name == "handover"]
    assert ages == [0, 1]
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


def test_a_peer_process_that_dies_and_comes_back(tmp_path):
    """Training goes on alone, and what was in flight goes into the next hand-over."""
    run = FakeRun(tmp_path, 1, {"overlap": "eager"}, inner_steps=4)
    site = run.sites["site0"]
    site.withheld = True
    trainer = Trainer(run, 0)
    start = run.theta[CHANNEL].copy()
    trainer.step(4)
    assert trainer.swarm._port.wait_until(lambda: len(run.waiting) == 1, 10.0)
    first = run.waiting[("site0", CHANNEL)]["value"]
    site.kill()
    trainer.step(6)
    assert "peer_lost" in trainer.names() and trainer.steps == 10
    site.restart()
    site.withheld = False
    port = trainer.swarm._port
    assert port.wait_until(lambda: port.session is not None, 10.0)
    trainer.step(2)
    assert "handover_requeued" in trainer.names()
    assert trainer.swarm.flush(10.0)
    again = [args for name, args in site.calls if name == "attach"]
    assert [args["again"] for args in again] == [False, True]
    assert again[1]["in_flight"] == {CHANNEL: 2}, "the first number was θ⁰"
    # One round with both phases: what was lost with the process is in the one contribution.
    assert run.rounds[CHANNEL] == 1
    moved = start - run.theta[CHANNEL]
    assert np.abs(moved - first).max() > 1e-4
    last = next(args for name, args in reversed(site.calls) if name == "handover")
    assert (last["age"], last["seq"]) == (1, 3)
    trainer.swarm.close()


def test_a_successor_that_knows_the_outcome_is_believed(tmp_path):
    """Committed while the peer process was away: nothing is contributed twice."""
    run = FakeRun(tmp_path, 1, {"overlap": "delayed"}, inner_steps=4)
    site = run.sites["site0"]
    site.withheld = True
    trainer = Trainer(run, 0)
    trainer.step(4)
    assert trainer.swarm._port.wait_until(lambda: len(run.waiting) == 1, 10.0)
    waiting = dict(run.waiting)
    site.kill()
    run.waiting = waiting  # other members have the bytes and commit
    run.decide(CHANNEL)
    site.restart()
    site.withheld = False
    port = trainer.swarm._port
    assert port.wait_until(lambda: port.session is not None, 10.0)
    trainer.step(4)
    assert "handover_requeued" not in trainer.names()
    assert trainer.swarm.flush(10.0)
    last = next(args for name, args in reversed(site.calls) if name == "handover")
    assert last["age"] == 0 and run.rounds[CHANNEL] == 2
    trainer.swarm.close()


def test_a_dropped_connection_keeps_what_is_in_flight(tmp_path):
    run = FakeRun(tmp_path, 1, {"overlap": "eager"}, inner_steps=4)
    site = run.sites["site0"]
    site.withheld = True
    trainer = Trainer(run, 0)
    trainer.step(4)
    port = trainer.swarm._port
    assert port.wait_until(lambda: len(run.waiting) == 1, 10.0)
    old = port.session
    site.drop_connections()
    assert port.wait_until(lambda: port.session not in (None, old), 10.0)
    trainer.step(1)
    assert port.wait_until(lambda: [n for n, _ in site.calls].count("handover") == 2, 10.0)
    run.decide(CHANNEL)
    trainer.step(3)
    assert "handover_requeued" not in trainer.names()
    seqs = [args["seq"] for name, args in site.calls if name == "handover"]
    assert seqs[:2] == [2, 2]
    assert port.wait_until(lambda: len(run.waiting) == 1, 10.0)
    run.decide(CHANNEL)
    assert trainer.swarm.flush(10.0) and run.rounds[CHANNEL] == 2
    trainer.swarm.close()


def test_a_joiner_takes_the_runs_state_not_its_own(tmp_path):
    run = FakeRun(tmp_path, 2, inner_steps=1)
    founder = Trainer(run, 0)
    joiner = Trainer(run, 1)
    assert np.array_equal(vector(founder.model), vector(make_model(seed=0)))
    assert np.array_equal(vector(joiner.model), vector(founder.model))
    assert [name for name, _ in run.sites["site1"].calls] == ["attach"]
    assert joiner.swarm.state.members == 2
    for trainer in (founder, joiner):
        trainer.swarm.close(0.0)


def test_no_state_in_time_is_a_typed_error(tmp_path):
    run = FakeRun(tmp_path, 1)
    run.theta["train/0/9"] = np.zeros(1, np.float32)  # somebody defined it, nothing has arrived
    run.sites["site0"].port.publish = lambda *a: None  # type: ignore[method-assign]
    run.rounds["train/0/9"] = 0
    with pytest.raises(QuorumLost, match="no state"):
        Trainer(run, 0, wait_s_max=0.1)


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


def test_stop_state_events_and_logs_reach_the_loop(tmp_path):
    run = FakeRun(tmp_path, 1, inner_steps=2)
    trainer = Trainer(run, 0)
    seen: list[Any] = []
    trainer.swarm.on("round_committed", seen.append)
    site = run.sites["site0"]
    site.push(event="round_committed", round=1, state_hash="ab" * 32, members=["site0", "x"])
    assert seen == [], "callbacks run between steps, on the training thread"
    trainer.swarm.log(loss=2.0, accuracy=0.5)
    trainer.step()
    trainer.swarm.log(loss=4.0)
    trainer.step()
    assert seen == [
        {"event": "round_committed", "round": 1, "state_hash": "ab" * 32, "members": ["site0", "x"]}
    ]
    state = trainer.swarm.state
    assert (state.step, state.members, state.loss, state.state_hash) == (2, 2, 3.0, "ab" * 32)
    assert 0.0 < trainer.swarm.compute_utilization <= 1.0
    site.port.set_should_stop("max_rounds reached")
    trainer.step()
    assert trainer.swarm.should_stop and trainer.swarm.stop_reason == "max_rounds reached"
    assert trainer.swarm.state.round == 1
    assert list(trainer.swarm.data([1, 2, 3])) == []
    trainer.swarm.close()
    assert site.calls[-1][0] == "detach"
    said = dict(site.calls)
    assert said["scalars"] == {"values": {"accuracy": 0.5}, "step": 0}
    assert said["handover"]["loss"] == 3.0


def test_data_is_dealt_by_member(tmp_path):
    run = FakeRun(tmp_path, 2, inner_steps=100)
    trainers = [Trainer(run, 0), Trainer(run, 1)]
    shares = [list(t.swarm.data(range(7))) for t in trainers]
    assert shares == [[0, 2, 4, 6], [1, 3, 5]]
    for trainer in trainers:
        trainer.swarm.close(0.0)


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
