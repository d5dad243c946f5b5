"""Local steps: when they are due, what is in them, and what becomes of contributions."""

from __future__ import annotations

import msgspec
import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.messages import pipeline as m
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.localsteps import LocalPolicy, first_phase, steps_before
from swarmtrain_protocols.rounds import effects as fx
from tests.protocols.pipeline.local_kit import (
    DRIVER,
    HEAD,
    LEADER,
    ME,
    OTHER,
    Bench,
)
from tests.protocols.rounds_kit import faults, hash_of, of_kind, sent


def short(**changes: int) -> LocalPolicy:
    """A policy of two local steps in a round."""
    fields = {"micro_batches": 2, "inner_steps": 2, "samples": 3, "max_rounds": 0, **changes}
    return LocalPolicy(**fields, scatter_codec="fp32")


def contributed(bench: Bench, first: int = 0) -> None:
    """Train stage 3 through a phase of two steps and announce it."""
    bench.train(3, *range(first, first + 4))
    bench.hand()


@pytest.mark.parametrize(
    "stages, steps, firsts", [(4, 8, [8, 2, 4, 6]), (4, 10, [10, 2, 5, 7]), (3, 2, [2, 2, 1])]
)
def test_first_exchanges_are_spread_over_a_phase(
    stages: int, steps: int, firsts: list[int]
) -> None:
    assert [first_phase(stage, stages, steps) for stage in range(stages)] == firsts
    for stage, first in enumerate(firsts):
        found = [steps_before(stage, stages, steps, number) for number in range(4)]
        assert found == [0, first, first + steps, first + 2 * steps]


def test_only_stages_that_step_by_themselves_have_a_policy() -> None:
    assert LocalPolicy.of(RunKeys()) is None
    assert LocalPolicy.of(RunKeys(stages=2)) is None
    keys = RunKeys(stages=2, pipeline_mode="diloco", micro_batches=6, batch_size=5, inner_steps=9)
    assert LocalPolicy.of(keys) == LocalPolicy(6, 9, 5, 0, keys.codec_scatter)


def test_a_step_is_due_when_a_micro_batch_of_everybody_is_there() -> None:
    bench = Bench(1)
    bench.train(1, 5)
    assert bench.stepped == [] and bench.worker.have(1) == [5]
    bench.train(1, 9, 11)
    assert bench.stepped == [(1, 0, [(1, 5), (1, 9)])]
    assert bench.worker.have(1) == [11], "the next step has begun"
    shared = Bench(1, others={LEADER: 1})
    shared.train(1, 5, 9)
    assert [pairs for _, _, pairs in shared.stepped] == [[(1, 5)], [(1, 9)]], "halved with another"


def test_the_ends_count_both_of_their_hops() -> None:
    bench = Bench(0)
    bench.train(HEAD, 1, 2)
    bench.train(0, 1)
    assert bench.stepped == []
    bench.train(0, 2)
    assert bench.stepped == [(0, 0, [(HEAD, 1), (HEAD, 2), (0, 1), (0, 2)])]


def test_what_the_device_had_before_a_step_is_in_it_and_weighs() -> None:
    """Two computations are under way; the second one was asked for before the step was."""
    bench = Bench(3, policy=short())
    bench.train(3, 0)
    bench.ask("backward", 3, 1, 2)
    bench.work()
    assert bench.stepped == [(3, 0, [(3, 0), (3, 1), (3, 2)])]
    assert bench.worker.have(3) == [], "micro-batch 2 is in that step already"
    assert len(bench.handed) == 1, "ends are stage 0: stage 3 of 4 contributes after one step"
    bench.hand()
    (ready,) = bench.announced()
    assert ready.samples == 3 * 3.0, "three micro-batches of three sequences"


def test_the_weight_waits_for_what_was_under_way() -> None:
    bench = Bench(3, policy=short())
    bench.train(3, 0)
    bench.ask("backward", 3, 1, 2)
    bench.collect()
    slow = bench.todo.pop(1)
    bench.work()
    bench.hand()
    assert bench.announced() == []
    assert isinstance(slow, px.Compute)
    bench.worker.compute_failed(0.0, slow.job, "failed")
    assert [ready.samples for ready in bench.announced()] == [6.0]


def test_a_contribution_goes_to_the_round_it_is_made_for() -> None:
    bench = Bench(3)  # six steps before the first exchange of stage 3
    bench.train(3, *range(12))
    assert [number for _, number, _ in bench.stepped] == list(range(6))
    bench.hand("delta")
    (ready,) = bench.announced()
    found = (ready.channel, ready.root, ready.samples, ready.base_round, ready.codec)
    assert found == ("train/3/0", hash_of("delta"), 36.0, 0, "fp32")
    opened = bench.open(3, ME, OTHER, root=hash_of("delta"))
    bench.commit(opened)
    bench.train(3, 12)
    assert bench.codes() == ["not_ready"], "its state is not here yet"
    bench.arrive(3)
    bench.train(3, *range(13, 29))
    assert [number for _, number, _ in bench.stepped[6:]] == list(range(6, 14)), "eight more"
    assert len(bench.handed) == 1


def test_while_it_waits_it_takes_what_it_has_begun_and_no_new_work() -> None:
    bench = Bench(0, 3, policy=short())
    contributed(bench)
    assert bench.worker.have(3) == [2, 3], "a step's worth is there, and no step is taken"
    bench.ask("forward", 3, 7)
    assert bench.codes() == ["closing"]
    bench.train(3, 8)
    assert bench.codes() == [] and bench.worker.have(3) == [2, 3, 8]
    bench.train(HEAD, *range(4))
    bench.train(0, *range(4))
    assert len(bench.handed) == 1, "the ends have done their two steps"
    bench.train(HEAD, *range(4, 8))
    assert bench.codes() == []
    bench.ask("backward", HEAD, 9)
    assert bench.codes() == ["closing"], "the head is new work"
    bench.ask("backward", 0, 9)
    assert bench.codes() == [], "the embedding's forward was here"


def test_after_the_outcome_the_next_phase_begins_with_what_was_gathered() -> None:
    bench = Bench(3, policy=short())
    contributed(bench)
    bench.commit(bench.open(3, ME, root=hash_of("delta")))
    assert len(bench.stepped) == 1
    bench.arrive(3)
    bench.work()
    assert bench.stepped[1:] == [(3, 1, [(3, 2), (3, 3)])]


def test_a_round_without_it_takes_its_steps_away() -> None:
    bench = Bench(3, policy=short())
    bench.train(3, 0, 1)
    bench.commit(bench.open(3, OTHER))
    bench.hand()
    assert bench.announced() == []
    assert of_kind(bench.out, fx.ReleaseContribution) == [
        fx.ReleaseContribution("train/3/0", hash_of("delta"))
    ]
    bench.arrive(3)
    bench.train(3, 2, 3, 4, 5)
    bench.hand("second")
    (ready,) = bench.announced()
    assert (ready.base_round, ready.samples) == (1, 12.0), "two steps of two micro-batches"


def test_an_aborted_contribution_goes_into_a_longer_one() -> None:
    bench = Bench(3, policy=short())
    contributed(bench)
    opened = bench.open(3, ME, root=hash_of("delta"))
    bench.out.clear()
    bench.apply(e.RoundAborted(opened.key, "too many holders lost"))
    bench.work()
    assert [pairs for _, _, pairs in bench.stepped] == [[(3, 0), (3, 1)], [(3, 2), (3, 3)]]
    bench.hand("longer")
    (ready,) = bench.announced()
    assert (ready.root, ready.samples, ready.base_round) == (hash_of("longer"), 12.0, 0)


def test_nothing_counts_twice_even_in_a_later_step() -> None:
    bench = Bench(1)
    bench.train(1, 0, 1)
    bench.out.clear()
    bench.ask("backward", 1, 0, attempt=1)
    (reply,) = [x for _, x in sent(bench.out, m.HopReply)]
    assert reply.id.attempt == 1 and bench.todo == [], "answered from memory"
    other = bench.request("backward", 1, 1, attempt=1)
    bench.worker.receive(0.0, PeerId(DRIVER), msgspec.structs.replace(other, gradient=m.EMPTY))
    assert bench.codes() == ["malformed"]
    bench.worker._sums.claim(1, 1).output = None  # type: ignore[union-attr]
    bench.ask("backward", 1, 1, attempt=2)
    bench.collect()
    (again,) = of_kind(bench.todo, px.Compute)
    assert not again.accumulate
    bench.work()
    assert bench.worker.have(1) == []


def test_memory_of_what_was_done_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LOCAL_CLAIMS_KEPT", 3)
    bench = Bench(1)
    bench.train(1, *range(5))
    known = [k for k in range(5) if bench.worker._sums.claim(1, k) is not None]
    assert known == [2, 3, 4]


def test_a_dead_trainer_takes_its_steps_with_it_and_nothing_else() -> None:
    bench = Bench(3, policy=short())
    contributed(bench)
    bench.worker.trainer(0.0, 0)
    bench.worker.trainer(0.0, 1 << 20)
    bench.sums.clear()
    assert bench.member.undecided("train/3/0") is not None, "what was announced is still here"
    bench.worker.reconcile(0.0)
    bench.train(3, 6, 7)
    assert len(bench.stepped) == 2, "from the state of its round, a whole phase again"
    bench.commit(bench.open(3, ME, root=hash_of("delta")))
    bench.arrive(3)
    assert bench.member.undecided("train/3/0") is None


def test_what_a_dead_trainer_was_asked_for_is_void() -> None:
    bench = Bench(3, policy=short())
    bench.train(3, 0, 1)
    bench.worker.trainer(0.0, 0)
    bench.hand()
    assert bench.announced() == [] and of_kind(bench.out, fx.ReleaseContribution)


def test_when_another_stage_is_lost_steps_stay_and_sums_go() -> None:
    bench = Bench(3, policy=short(inner_steps=4))  # three steps before the first exchange
    bench.train(3, 0, 1, 2)
    bench.ask("backward", 3, 3)
    bench.apply(e.StageLost(1, 0, OTHER, "nobody"))
    bench.work()
    assert bench.sums == {} and bench.worker.have(3) == [], "also what was under way"
    bench.train(3, 4)
    assert bench.codes() == ["not_ready"]
    bench.apply(e.StageRecovered(1, 0, OTHER, ("fresh",), (1.0,), 0, (), hash_of("new")))
    bench.train(3, 5, 6, 7, 8)
    assert [pairs for _, _, pairs in bench.stepped[1:]] == [[(3, 5), (3, 6)], [(3, 7), (3, 8)]]
    bench.hand()
    (ready,) = bench.announced()
    assert ready.samples == 18.0, "three steps of two micro-batches, one of them before the loss"


def test_the_last_round_is_the_last() -> None:
    bench = Bench(3, policy=short(max_rounds=1))
    contributed(bench)
    bench.commit(bench.open(3, ME, root=hash_of("delta")))
    bench.arrive(3)
    before = len(bench.stepped)
    bench.train(3, *range(6, 12))
    assert len(bench.stepped) == before and bench.worker.have(3) == [2, 3]
    assert bench.sums[3] == [(3, 2), (3, 3)], "computed for others, and not accumulated"


def test_a_driver_that_is_not_known_yet_is_told_to_wait() -> None:
    bench = Bench(1)
    bench.worker.receive(0.0, PeerId(b"s" * 32), bench.request("forward", 1, 0))
    assert faults(bench.out) == [] and bench.codes() == ["not_ready"]


def test_evaluation_takes_any_version() -> None:
    bench = Bench(1)
    bench.ask("evaluate", 1, 1 << 33, version=77)
    bench.ask("forward", 1, 0, version=77)
    bench.collect()
    assert bench.codes() == ["not_ready"]
    assert [job.kind for job in of_kind(bench.todo, px.Compute)] == ["evaluate"]


def test_a_spoiled_sum_is_dropped() -> None:
    bench = Bench(1)
    bench.ask("backward", 1, 0)
    bench.collect()
    (job,) = of_kind(bench.todo, px.Compute)
    bench.todo.clear()
    bench.worker.computed(0.0, job.job, m.EMPTY, float("nan"), 0.1)
    bench.collect()
    assert of_kind(bench.todo, px.ClearGradients) == [px.ClearGradients((1,))]
    assert bench.worker.have(1) == [] and bench.worker._sums.claim(1, 0) is None
