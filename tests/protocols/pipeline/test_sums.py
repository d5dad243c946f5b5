"""Have-sets and the close of a step, as the leader sees them: freeze, answer, plan, undo, reset."""

from __future__ import annotations

import random

import msgspec
import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.messages import pipeline as m
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.book import stage_channel, step_key
from swarmtrain_protocols.pipeline.sums import ANSWER_AGAIN_S, FROZEN_S_MAX
from swarmtrain_protocols.rounds import effects as fx
from tests.protocols.pipeline.worker_kit import (
    BLOCKS,
    DRIVER,
    HEAD,
    LEADER,
    ME,
    MICRO_BATCHES,
    OTHER,
    Bench,
    jobs,
)
from tests.protocols.rounds_kit import B, events, faults, hash_of, of_kind, sent


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_query_freezes_backwards_and_is_answered(bench: Bench) -> None:
    bench.run("backward", 1, 2, 0)
    bench.run("backward", HEAD, 1)
    bench.query()
    assert bench.answers() == [{1: [0, 2], HEAD: [1]}]
    bench.ask("backward", 1, 3)
    assert bench.refusals() == ["closing"]
    bench.run("forward", 1, 3)
    assert len(bench.replies()) == 1, "forwards go on"
    bench.query()
    assert bench.answers() == [{1: [0, 2], HEAD: [1]}], "asked again it says it again"


def test_the_answer_waits_for_what_is_being_accumulated(bench: Bench) -> None:
    bench.ask("backward", 1, 0)
    bench.ask("backward", 1, 1)
    bench.ask("backward", 1, 2)
    bench.query()
    assert bench.answers() == [] and bench.refusals() == [], "two run, one was refused before"
    bench.work(1)
    assert bench.answers() == []
    bench.work()
    assert bench.answers() == [{1: [0, 1]}]
    bench.truth()


def test_reopening_takes_backwards_again(bench: Bench) -> None:
    bench.query(1)
    bench.say(m.Reopen(step_key(bench.log.ledger), 7))
    bench.ask("backward", 1, 0)
    assert bench.refusals() == ["closing"], "that was another query"
    bench.say(m.Reopen(step_key(bench.log.ledger), 1))
    bench.run("backward", 1, 0)
    assert bench.worker.have(1) == [0]


def test_only_the_leader_is_heard(bench: Bench) -> None:
    key = step_key(bench.log.ledger)
    bench.say(m.CloseQuery(key, 1), peer=OTHER)
    bench.run("backward", 1, 0)
    assert bench.worker.have(1) == [0] and bench.answers() == []


def test_a_query_for_the_next_step_waits_until_this_one_is_over(bench: Bench) -> None:
    bench.say(m.CloseQuery(m.StepKey(0, 1, 0), 1))
    bench.run("backward", 1, 0)
    assert bench.answers() == []
    bench.apply(bench.log.closing(OTHER))
    bench.apply(bench.log.outcome())
    assert bench.answers() == [{}]
    bench.say(m.CloseQuery(m.StepKey(0, 0, 0), 1))
    assert bench.answers() == [], "the past is not answered for"


def test_a_worker_that_owns_all_it_has_hands_it_over(bench: Bench) -> None:
    for hop in (0, 1, HEAD):
        bench.run("backward", hop, 0, 1)
    bench.query()
    bench.take()
    digest = bench.plan({0: [0, 1], 1: [0, 1], HEAD: [0, 1]})
    bench.work()
    key = step_key(bench.log.ledger)
    both = 1 + 4
    assert bench.readies() == [
        m.StepReady(key, digest, 0, hash_of(f"sum {[both, both]}"), 4),
        m.StepReady(key, digest, 1, hash_of(f"sum {[both]}"), 2),
    ], "stage 2 has nothing to give"
    offer = bench.member.undecided(stage_channel(1))
    assert offer is not None and (offer.samples, offer.base_round) == (2.0, 0)
    bench.truth()


def test_what_others_own_is_taken_out_first(bench: Bench) -> None:
    bench.run("backward", 1, 0, 1, 2, 5)
    bench.query()
    digest = bench.plan({1: [0, 2]})
    assert bench.readies() == []
    bench.work(1)
    bench.truth()
    assert bench.readies() == []
    bench.work()
    assert bench.worker.have(1) == [0, 2]
    (ready,) = bench.readies()
    assert (ready.digest, ready.root, ready.owned) == (digest, hash_of(f"sum {[1 + 16]}"), 2)
    bench.truth()


def test_a_stage_without_a_share_keeps_what_it_has(bench: Bench) -> None:
    """It counts for nothing if the step is committed, and still counts if it is not."""
    bench.run("backward", 1, 0)
    bench.run("backward", 2, 0, 1)
    bench.query()
    bench.plan({1: [0]})
    bench.work()
    assert [r.stage for r in bench.readies()] == [1]
    assert bench.worker.have(2) == [0, 1]


def test_the_same_plan_again_is_answered_again(bench: Bench) -> None:
    bench.run("backward", 1, 0)
    bench.query()
    bench.plan({1: [0]})
    bench.work()
    bench.plan({1: [0]})
    assert bench.work() == 0
    first, second = bench.readies()
    assert first == second


def test_a_plan_for_what_is_not_here_is_answered_with_what_is(bench: Bench) -> None:
    bench.run("backward", 1, 0)
    bench.query()
    bench.take()
    bench.plan({1: [0, 3]})
    assert bench.answers() == [{1: [0]}]
    assert bench.work() == 0 and bench.readies() == []


def test_a_plan_behind_another_query_freezes_and_says_what_is_here(bench: Bench) -> None:
    bench.run("backward", 1, 0)
    bench.plan({1: [0]}, number=9)
    assert bench.answers() == [{1: [0]}]
    bench.ask("backward", 1, 3)
    assert bench.refusals() == ["closing"]


def test_a_malformed_plan_is_a_fault(bench: Bench) -> None:
    bench.query()
    bench.take()
    plan = m.StepPlan(step_key(bench.log.ledger), 1, (ME,), (0,), (m.HopOwners(0, (0,)),))
    bench.say(plan)
    assert faults(bench.out) == [("bad_plan", LEADER)]


def test_an_undo_that_fails_drops_the_stage_and_says_so(bench: Bench) -> None:
    for hop in (0, 1, HEAD):
        bench.run("backward", hop, 0, 1, 2)
    bench.query()
    bench.take()
    bench.plan({1: [0]})
    first, _ = of_kind(bench.device.todo, px.Undo)
    assert (first.stage, first.peer, first.request.id.micro_batch) == (1, PeerId(DRIVER), 1)
    bench.worker.compute_failed(0.0, first.job, "the driver does not serve its tensors any more")
    (notice,) = events(bench.out, fx.Notice)
    assert notice.name == "fallback"
    assert bench.answers() == [{0: [0, 1, 2], HEAD: [0, 1, 2]}]
    bench.device.todo.remove(first)
    bench.work()
    assert bench.device.digits(1) == {}
    bench.truth()


def test_a_new_query_waits_for_what_is_being_taken_out(bench: Bench) -> None:
    bench.run("backward", 1, 0, 1, 2)
    bench.query(1)
    bench.plan({1: [0]})
    bench.take()
    bench.query(2)
    bench.work(1)
    assert bench.answers() == []
    bench.work()
    assert bench.answers() == [{1: [0]}] and bench.readies() == [], "that plan is void"
    bench.plan({1: [0]}, number=2)
    bench.work()
    assert len(bench.readies()) == 1


def test_a_hand_over_of_a_void_plan_is_let_go(bench: Bench) -> None:
    bench.run("backward", 1, 0, 1)
    bench.query(1)
    bench.plan({1: [0, 1]})
    first = bench.device.todo.pop()
    bench.say(m.Reopen(step_key(bench.log.ledger), 1))
    bench.run("backward", 1, 2)
    bench.query(2)
    bench.plan({1: [0, 1, 2]}, number=2)
    bench.take()
    bench.worker.handed_over(0.0, 1, first.key, hash_of("old"))
    assert bench.take() == [], "the second is on its way"
    bench.work()
    (ready,) = bench.readies()
    assert ready.owned == 3
    bench.worker.handed_over(0.0, 1, first.key, hash_of("nobody asked"))
    released = of_kind(bench.take(), fx.ReleaseContribution)
    assert released == [fx.ReleaseContribution("train/1/0", hash_of("nobody asked"))]


def test_a_later_contribution_takes_the_place_of_the_earlier(bench: Bench) -> None:
    bench.run("backward", 1, 0)
    bench.query(1)
    bench.plan({1: [0]})
    bench.work()
    (old,) = bench.readies()
    bench.query(2)
    bench.say(m.Reopen(step_key(bench.log.ledger), 2))
    bench.run("backward", 1, 1)
    bench.query(3)
    bench.plan({1: [0, 1]}, number=3)
    bench.take()
    bench.work()
    released = of_kind(bench.take(), fx.ReleaseContribution)
    assert released == [fx.ReleaseContribution("train/1/0", old.root)]


def closed_with(bench: Bench, numbers: list[int]) -> e.StepClosed:
    """A step in which this worker's contribution to stage 1 is listed."""
    bench.run("backward", 1, *numbers)
    bench.query()
    bench.plan({1: numbers})
    bench.work()
    (ready,) = bench.readies()
    body = bench.log.closing(ME)
    sums = list(body.stages)
    mine = e.Contributor(ME, ready.root, float(ready.owned), 0)
    sums[1] = msgspec.structs.replace(sums[1], contributors=(mine,))
    return msgspec.structs.replace(body, stages=tuple(sums))


def test_a_commit_clears_everything_and_the_next_step_begins_empty(bench: Bench) -> None:
    bench.apply(closed_with(bench, [0, 1]))
    offer = bench.member.undecided("train/1/0")
    assert offer is not None and offer.bound == RoundKey(0, "train/1/0", 0, 0)
    bench.take()
    bench.apply(bench.log.outcome())
    bench.work()
    assert bench.worker.have(1) == [] and bench.device.digits(1) == {}
    decided = events(bench.take(), fx.ContributionDecided)
    assert [(x.channel, x.outcome) for x in decided] == [("train/1/0", "committed")]
    bench.run("backward", 1, 0)
    assert bench.worker.have(1) == [0]
    bench.truth()


def test_an_abort_loses_nothing_and_takes_backwards_again(bench: Bench) -> None:
    bench.apply(closed_with(bench, [0, 1]))
    bench.ask("backward", 1, 2)
    bench.take()
    bench.apply(bench.log.abort())
    bench.work()
    assert bench.device.digits(1) == {0: 1, 1: 1}
    (decided,) = events(bench.take(), fx.ContributionDecided)
    assert decided.outcome == "aborted"
    bench.run("backward", 1, 2)
    bench.query(5)
    bench.take()
    bench.query(5)
    assert bench.answers() == [{1: [0, 1, 2]}]
    bench.truth()


def test_a_lost_stage_drops_all_that_was_accumulated(bench: Bench) -> None:
    bench.run("backward", 1, 0)
    bench.ask("backward", 1, 1)
    bench.apply(e.StageLost(2, 0, B, "silent"))
    bench.work()
    assert bench.worker.have(1) == [] and bench.device.digits(1) == {}
    bench.take()
    bench.ask("backward", 1, 2)
    assert bench.refusals() == ["not_ready"]


def test_a_pledged_contribution_goes_with_its_step(bench: Bench) -> None:
    bench.run("backward", 1, 0)
    bench.query()
    bench.plan({1: [0]})
    bench.work()
    (ready,) = bench.readies()
    bench.take()
    bench.apply(bench.log.closing(OTHER))
    bench.apply(bench.log.outcome())
    assert of_kind(bench.take(), fx.ReleaseContribution) == [
        fx.ReleaseContribution("train/1/0", ready.root)
    ]
    assert bench.member.undecided("train/1/0") is None


def test_a_new_leader_frees_what_the_old_one_froze(bench: Bench) -> None:
    bench.run("backward", 1, 0)
    bench.query()
    bench.plan({1: [0]})
    bench.worker.leader = bench.member.leader = PeerId(OTHER)
    bench.worker.announce(0.0)
    bench.work()
    assert bench.readies() == [], "nobody asks for that any more"
    bench.run("backward", 1, 1)
    bench.truth()
    assert bench.worker.have(1) == [0, 1]


def test_who_is_frozen_and_told_nothing_says_again_what_it_has(bench: Bench) -> None:
    bench.run("backward", 1, 0)
    bench.query(4)
    (answer,) = [x for _, x in sent(bench.take(), m.CloseAnswer)]
    bench.worker.tick(ANSWER_AGAIN_S - 0.1)
    assert sent(bench.take(), m.CloseAnswer) == []
    bench.worker.tick(ANSWER_AGAIN_S)
    assert [x for _, x in sent(bench.take(), m.CloseAnswer)] == [answer]
    bench.say(m.Reopen(answer.key, 4))
    bench.worker.tick(2 * ANSWER_AGAIN_S)
    assert sent(bench.take(), m.CloseAnswer) == []


def test_a_query_that_is_said_twice_does_not_void_the_plan(bench: Bench) -> None:
    bench.run("backward", 1, 0)
    bench.query()
    bench.plan({1: [0]})
    bench.take()
    bench.query()
    bench.worker.tick(ANSWER_AGAIN_S)
    assert sent(bench.take(), m.CloseAnswer) == []
    bench.work()
    assert [ready.stage for ready in bench.readies()] == [1]


def test_nobody_waits_for_ever_for_a_leader_that_says_no_more(bench: Bench) -> None:
    bench.now = 5.0
    bench.query()
    assert bench.worker.deadline() <= 5.0 + FROZEN_S_MAX
    bench.worker.tick(5.0 + FROZEN_S_MAX)
    bench.run("backward", 1, 1)
    assert bench.worker.have(1) == [1]


def test_a_trainer_lost_between_plan_and_hand_over_is_told_at_once(bench: Bench) -> None:
    bench.run("backward", 1, 0, 1)
    bench.query()
    bench.take()
    bench.plan({1: [0]})
    bench.worker.trainer(0.0, 0)
    assert bench.answers() == [{}]
    bench.device.sums.clear()
    bench.device.todo.clear()
    bench.truth()


def test_a_trainer_lost_after_the_hand_over_costs_nothing(bench: Bench) -> None:
    bench.run("backward", 1, 0)
    bench.query()
    bench.plan({1: [0]})
    bench.work()
    bench.take()
    bench.worker.trainer(0.0, 0)
    assert bench.answers() == []
    assert bench.member.undecided("train/1/0") is not None, "the bytes are in the peer process"


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_accumulators_hold_their_have_sets(seed: int) -> None:
    """Random requests, repeats, failures, queries, plans, losses and outcomes."""
    rng = random.Random(seed)
    bench = Bench()
    queries = 0
    for _ in range(300):
        act = rng.random()
        hop, k = rng.randrange(BLOCKS + 2), rng.randrange(MICRO_BATCHES)
        if act < 0.5:
            text = rng.choice(["", "", "abc"]) if hop else ""
            peer = rng.choice([DRIVER, OTHER])
            bench.ask("backward", hop, k, attempt=rng.randrange(3), text=text, peer=peer)
        elif act < 0.8:
            bench.work(rng.randrange(4))
        elif act < 0.83 and (running := jobs(bench)):
            victim = rng.choice(running)
            bench.device.todo.remove(victim)
            bench.worker.compute_failed(0.0, victim.job, "bad luck")
        elif act < 0.88:
            queries += 1
            bench.query(queries)
        elif act < 0.92:
            share = {h: [n for n in bench.worker.have(h) if rng.random() < 0.7] for h in range(4)}
            bench.plan({h: s for h, s in share.items() if s} or {0: [k]}, number=queries)
        elif act < 0.96:
            bench.say(m.Reopen(step_key(bench.log.ledger), queries))
        elif act < 0.98:
            bench.worker.trainer(0.0, 0)
            bench.device.todo.clear()
            bench.device.sums.clear()
            bench.worker.trainer(0.0, 1)
        else:
            bench.apply(bench.log.closing(OTHER))
            bench.apply(rng.choice([bench.log.abort, bench.log.outcome])())
        bench.collect()
        if not bench.device.todo:
            bench.truth()
    bench.work()
    bench.truth()
