"""The worker as drivers see it: answers, refusals, duplicates, a device that is lost."""

from __future__ import annotations

import math

import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.messages import pipeline as m
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.paths import PathRule
from swarmtrain_protocols.pipeline.requests import inline_tensor
from tests.protocols.pipeline.worker_kit import (
    BLOCKS,
    DRIVER,
    HEAD,
    LEADER,
    ME,
    MICRO_BATCHES,
    OTHER,
    TOKENS,
    Bench,
    jobs,
)
from tests.protocols.rounds_kit import E, faults, of_kind, sent


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_every_hop_is_computed_and_answered(bench: Bench) -> None:
    for hop in range(HEAD):
        bench.run("forward", hop, 5)
    for hop in reversed(range(HEAD + 1)):
        bench.run("backward", hop, 5)
    replies = bench.replies()
    assert [(r.id.hop, r.id.backward) for r in replies] == [
        (0, False),
        (1, False),
        (2, False),
        (3, True),
        (2, True),
        (1, True),
        (0, True),
    ]
    assert replies[4].output == inline_tensor(b"out 2 5") and replies[4].loss == 1.5
    assert replies[4].service_s == 0.25
    assert [bench.worker.have(hop) for hop in range(HEAD + 1)] == [[5]] * 4
    bench.truth()


def test_what_the_device_is_asked_for(bench: Bench) -> None:
    bench.ask("backward", 0, 2)
    (job,) = jobs(bench)
    request = bench.request("backward", 0, 2)
    assert job == px.Compute(
        job.job, PeerId(DRIVER), 0, 0, "backward", 0, 2, m.EMPTY, request.gradient, TOKENS, True, 0
    )
    bench.ask("evaluate", HEAD, 2)
    assert [x.accumulate for x in jobs(bench)] == [True, False]


def test_what_is_asked_of_a_trainer_says_in_which_life(bench: Bench) -> None:
    """What waits behind a write when the trainer is lost is void when the next one has come."""
    bench.ask("backward", 1, 3)
    bench.worker.trainer(bench.now, 0)
    bench.worker.trainer(bench.now, 1 << 20)
    bench.ask("backward", 1, 3, attempt=1)
    assert [job.life for job in jobs(bench)] == [0, 1]
    assert bench.worker.life == 1


def test_the_same_backward_is_accumulated_once_however_it_is_asked_again(bench: Bench) -> None:
    bench.run("backward", 1, 3)
    bench.run("backward", 1, 3, attempt=1)
    bench.run("backward", 1, 3, attempt=2, peer=OTHER)
    assert bench.device.digits(1) == {3: 1}
    assert [(r.id.attempt, r.output) for r in bench.replies()] == [
        (n, inline_tensor(b"out 1 3")) for n in range(3)
    ]


def test_other_bytes_for_the_same_micro_batch_are_recomputed_and_not_added(bench: Bench) -> None:
    bench.run("backward", 1, 3)
    bench.ask("backward", 1, 3, attempt=1, text="new")
    assert [x.accumulate for x in jobs(bench)] == [False]
    bench.work()
    assert len(bench.replies()) == 2 and bench.device.digits(1) == {3: 1}


def test_two_requests_for_one_gradient_at_the_same_time_wait_for_each_other(bench: Bench) -> None:
    bench.ask("backward", 1, 3)
    bench.ask("backward", 1, 3, attempt=1)
    bench.ask("backward", 1, 3, attempt=1)  # the network repeats itself
    assert len(jobs(bench)) == 1
    bench.work()
    assert [r.id.attempt for r in bench.replies()] == [0, 1]
    assert bench.device.digits(1) == {3: 1}
    bench.truth()


def test_if_the_first_of_two_fails_the_second_is_computed(bench: Bench) -> None:
    bench.ask("backward", 1, 3)
    bench.ask("backward", 1, 3, attempt=1)
    (job,) = jobs(bench)
    bench.device.todo.clear()
    bench.worker.compute_failed(0.0, job.job, "out of memory")
    bench.work()
    assert bench.device.digits(1) == {3: 1}
    assert [r.id.attempt for r in bench.replies()] == [1]
    assert bench.refusals() == ["failed"]


def test_without_duplicate_suppression_the_invariant_breaks() -> None:
    """The mutant that shows that these tests notice a double count."""
    bench = Bench(suppress_duplicates=False)
    bench.run("backward", 1, 3)
    bench.run("backward", 1, 3, attempt=1)
    assert bench.device.digits(1) == {3: 2}
    with pytest.raises(AssertionError):
        bench.truth()


def test_a_long_memory_is_not_needed_for_counting_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HOP_REPLIES_CACHED_BYTES_MAX", 10)
    bench.run("backward", 1, 3, 4)
    bench.ask("backward", 1, 3, attempt=1)
    assert [x.accumulate for x in jobs(bench)] == [False], "the answer was evicted"
    bench.work()
    assert bench.device.digits(1) == {3: 1, 4: 1}


def test_backwards_overtake_forwards(bench: Bench) -> None:
    for k in range(3):
        bench.ask("forward", 1, k)
    bench.ask("backward", 1, 3)
    assert [x.kind for x in jobs(bench)] == ["forward", "forward"], "two slots"
    bench.work(1)
    assert [x.kind for x in jobs(bench)] == ["forward", "backward"]


def test_refusals(bench: Bench) -> None:
    bench.ask("forward", 1, 0, version=1)
    bench.ask("forward", 1, 0, version=0, stage_generation=3)
    bench.ask("forward", 1, MICRO_BATCHES)
    bench.ask("forward", 1, 0, peer=E)
    bench.log.assign(ME, 0)
    bench.ask("forward", 1, 0)
    bench.away.add("train/0/0")
    bench.ask("forward", 0, 0)
    codes = ["not_ready", "not_ready", "malformed", "not_ready", "not_served", "not_ready"]
    assert [(x.code) for _, x in sent(bench.out, m.HopRefused)] == codes
    assert faults(bench.out) == [("bad_hop", DRIVER)]  # E may know of its entry before this node
    assert jobs(bench) == []


def test_hops_on_other_paths_than_that_of_the_micro_batch_are_refused() -> None:
    bench = Bench(paths=PathRule(BLOCKS, skips=2))
    bench.ask("forward", 1, 0, skip=2)
    bench.log.ledger.pipeline.skip = 2
    bench.ask("forward", 1, 0)
    bench.ask("forward", 1, 2, skip=2)
    assert [x.code for _, x in sent(bench.out, m.HopRefused)] == ["malformed"] * 3
    assert faults(bench.out) == [("bad_path", DRIVER)] * 3
    bench.out.clear()
    bench.ask("forward", 1, 0, skip=2)
    bench.ask("evaluate", 1, 0)
    bench.ask("forward", 1, 2)
    assert sent(bench.out, m.HopRefused) == []


def test_a_full_queue_is_busy(bench: Bench) -> None:
    for k in range(MICRO_BATCHES):
        for attempt in range(40):
            bench.ask("forward", 1, k, attempt=attempt)
    codes = bench.refusals()
    half = limits.HOP_REQUESTS_QUEUED_MAX // 2
    assert len(codes) == MICRO_BATCHES * 40 - half - 2 and set(codes) == {"busy"}


def test_what_waits_is_refused_when_its_step_is_over(bench: Bench) -> None:
    for k in range(3):
        bench.ask("backward", 1, k)
    assert len(jobs(bench)) == 2
    bench.apply(bench.log.closing(OTHER))
    assert bench.refusals() == ["closing"]
    bench.ask("forward", 1, 4)
    bench.apply(bench.log.outcome())
    assert bench.refusals() == ["stale"]
    bench.work()
    assert bench.worker.have(1) == [] and bench.device.digits(1) == {}, "cleared behind them"
    assert [r.id.micro_batch for r in bench.replies()] == [0, 1]


def test_a_loss_that_is_no_number_drops_the_stage(bench: Bench) -> None:
    bench.run("backward", HEAD, 0)
    bench.ask("backward", HEAD, 1)
    (job,) = jobs(bench)
    bench.device.add(HEAD, 1, 1)
    bench.device.todo.clear()
    bench.worker.computed(0.0, job.job, m.EMPTY, math.nan, 0.1)
    bench.work()
    assert bench.worker.have(HEAD) == [] and bench.device.digits(HEAD) == {}
    assert bench.refusals() == ["failed"]
    bench.run("backward", HEAD, 1)
    bench.truth()


def test_a_lost_trainer_takes_its_accumulators_along(bench: Bench) -> None:
    bench.run("backward", 1, 0, 1)
    bench.ask("backward", 1, 2)
    bench.ask("backward", 1, 2, attempt=1)
    bench.ask("forward", 1, 3)
    bench.ask("forward", 1, 4)
    (running, other) = jobs(bench)
    bench.take()
    bench.worker.trainer(1.0, 0)
    bench.device.todo.clear()
    bench.device.sums.clear()
    assert sorted(bench.refusals()) == ["failed"] * 3 + ["not_ready"]
    bench.truth()
    bench.worker.computed(1.0, running.job, m.EMPTY, 0.0, 0.1)
    bench.worker.compute_failed(1.0, other.job, "late")
    assert bench.worker.have(1) == [] and bench.take() == [], "answers of the dead are ignored"
    bench.ask("forward", 1, 0)
    assert bench.refusals() == ["not_ready"]
    bench.worker.trainer(2.0, 1 << 20)
    bench.run("backward", 1, 0)
    bench.truth()
    assert bench.worker.have(1) == [0]


def test_nobody_waits_for_a_driver_that_is_gone(bench: Bench) -> None:
    for k in range(4):
        bench.ask("forward", 1, k)
    bench.ask("forward", 1, 5, peer=OTHER)
    bench.worker.disconnected(0.0, PeerId(DRIVER))
    bench.work()
    assert [r.id.micro_batch for r in bench.replies()] == [0, 1, 5]


def test_stages_follow_the_log_and_are_kept_until_their_step_is_over() -> None:
    bench = Bench(stages=(0, 1))
    bench.run("backward", 1, 0)
    bench.take()
    bench.apply(e.StageAssigned(ME, (0, 2), "moved"))
    assert of_kind(bench.take(), px.ServeStages) == [px.ServeStages((0, 1, 2))]
    bench.ask("backward", 1, 1)
    assert bench.refusals() == ["not_served"]
    bench.query()
    assert bench.answers() == [{1: [0]}], "what it has done still counts"
    bench.apply(bench.log.closing(OTHER))
    bench.take()
    bench.apply(bench.log.outcome())
    assert of_kind(bench.take(), px.ServeStages) == [px.ServeStages((0, 2))]


def test_reports() -> None:
    bench = Bench(samples=4)
    leader = PeerId(LEADER)
    bench.away.add("train/2/0")
    bench.worker.announce(0.0)
    ((to, report),) = sent(bench.take(), m.WorkerReport)
    assert to == leader and (report.values_max, report.queued) == (1 << 20, 0)
    assert report.stages == (
        m.StageReport(0, 0, True, 0.0),
        m.StageReport(1, 0, True, 0.0),
        m.StageReport(2, 0, False, 0.0),
    )
    bench.worker.tick(0.1)
    assert bench.take() == [] and bench.worker.deadline() == pytest.approx(2.0)
    bench.run("forward", 1, 0)
    bench.run("backward", 1, 0)
    bench.worker.tick(0.2)
    assert not sent(bench.take(), m.WorkerReport), "figures can wait"
    assert bench.worker.deadline() == pytest.approx(1.0)
    bench.worker.tick(1.0)
    ((_, report),) = sent(bench.take(), m.WorkerReport)
    assert report.stages[1].seconds_per_sample == (0.25 + 0.25) / 4
    bench.away.clear()
    bench.worker.reconcile(1.1)
    ((_, report),) = sent(bench.take(), m.WorkerReport)
    assert report.stages[2].ready, "that cannot"
    bench.worker.tick(2.0)
    assert not sent(bench.take(), m.WorkerReport)
    bench.worker.tick(3.2)
    assert sent(bench.take(), m.WorkerReport) == [(leader, report)], "the first may be lost"


def test_rates_follow_slowly(bench: Bench) -> None:
    bench.run("forward", 1, 0)
    bench.ask("forward", 1, 1)
    (job,) = jobs(bench)
    bench.worker.computed(0.0, job.job, m.EMPTY, 0.0, 1.25)
    assert bench.worker.report().stages[1].seconds_per_sample == pytest.approx(0.25 + 0.2)


def test_generation_waits_for_its_share_and_says_when(bench: Bench) -> None:
    bench.run("forward", 1, 0)
    bench.ask("generate", 1, 7)
    assert jobs(bench) == []
    assert bench.worker.deadline() <= 1.0
    bench.now = 1.0
    bench.worker.tick(1.0)
    bench.work()
    assert bench.replies()[-1].id.micro_batch == 7


def test_a_failure_that_is_the_senders_is_called_so(bench: Bench) -> None:
    for reason in ("malformed activation: not finite", "CUDA out of memory", "x" * 400):
        bench.ask("forward", 1, 0)
        (job,) = jobs(bench)
        bench.device.todo.clear()
        bench.worker.compute_failed(0.0, job.job, reason)
    said = [(x.code, len(x.reason)) for _, x in sent(bench.out, m.HopRefused)]
    assert said == [("malformed", 32), ("failed", 18), ("failed", 256)]


def test_a_hop_of_a_text_is_charged_with_all_the_time_that_it_holds_up(bench: Bench) -> None:
    """Its arithmetic took 10 ms, but half a second went by; at a share of a tenth that is 5 s."""
    bench.now = 5.0
    bench.worker.tick(5.0)
    bench.ask("forward", 1, 0)
    bench.ask("generate", 1, 7)
    generate = next(job for job in jobs(bench) if job.kind == "generate")
    bench.now = 5.5
    bench.worker.computed(5.5, generate.job, m.EMPTY, 0.0, 0.01)
    bench.ask("generate", 1, 8)
    assert [said.code for _, said in sent(bench.out, m.HopRefused)] == ["share"]
