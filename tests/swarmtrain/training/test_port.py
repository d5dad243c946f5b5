"""Losing the peer process and finding it again: nothing is lost, nothing contributed twice."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.swarmtrain.training.fake_peer import FakeRun
from tests.swarmtrain.training.loops import Trainer

CHANNEL = "train/0/0"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
