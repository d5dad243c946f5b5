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
from swarmtrain_protocols.errors import QuorumLost
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


def test_closures_scalers_clipping_and_schedulers_go_on_working(tmp_path):
    run = FakeRun(tmp_path, 1, inner_steps=2)
    trainer = Trainer(run, 0)
    model, optimizer = trainer.model, trainer.optimizer
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    x, y = batch(0, 0)

    def scaled_step(factor: float) -> None:
        loss = (model(x) - y).square().mean() * factor
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scheduler.step()

    scaled_step(1.0)
    scaled_step(float("inf"))  # overflows: the scaler skips it
    assert trainer.swarm.state.step == 1

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert trainer.swarm.state.step == 2
    said = [args for name, args in run.sites["site0"].calls if name == "handover"]
    assert [(args["steps"], args["samples"]) for args in said] == [(2, 16.0)]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 / 4)
    trainer.swarm.close()
