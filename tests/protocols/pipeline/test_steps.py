"""The leader of steps: from leases to the two entries of a step, and every way it can fail."""

from __future__ import annotations

import math

import numpy as np
import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.messages import pipeline as m
from swarmtrain_protocols.messages import rounds as rm
from swarmtrain_protocols.pipeline import claims as cl
from swarmtrain_protocols.pipeline.book import step_key
from swarmtrain_protocols.pipeline.step_policy import StepPolicy
from tests.protocols.pipeline.stage_kit import state_hash
from tests.protocols.pipeline.step_kit import (
    BLOCKS,
    COUNT,
    DRIVER,
    HOPS,
    LATE_S,
    TTL_S,
    WORKERS,
    Podium,
)
from tests.protocols.rounds_kit import A, B, C, D, E, faults, hash_of

FIRST, SECOND = sorted(WORKERS)
ALL = {hop: range(COUNT) for hop in HOPS}


@pytest.fixture
def podium() -> Podium:
    return Podium()


# --- leases ------------------------------------------------------------------------------------


def test_micro_batches_are_leased_and_pushed_when_they_become_free(podium: Podium) -> None:
    (lease,) = podium.ask(3)
    assert lease == m.Lease(0, 0, (0, 1, 2), TTL_S, ())
    (lease,) = podium.ask(0, 0, 1, 2)
    assert lease.micro_batches == (), "a renewal is answered"
    assert [x.micro_batches for x in podium.ask(5, peer=C)] == [(3,)]
    podium.take()
    podium.done(1, abandoned=True)
    assert [(to, x.micro_batches) for to, x in podium.sent(m.Lease)] == [(C, (1,))]


def test_what_does_not_belong_to_the_step_is_ignored(podium: Podium) -> None:
    podium.take()
    podium.say(DRIVER, m.LeaseRequest(0, 1, 4))
    podium.say(DRIVER, m.LeaseRequest(1, 0, 4))
    podium.say(E, m.LeaseRequest(0, 0, 4))
    podium.say(DRIVER, m.MicroBatchDone(0, 1, 99, 0.0))
    assert podium.take() == []
    podium.say(DRIVER, m.MicroBatchDone(0, 0, COUNT, 0.0))
    podium.say(DRIVER, m.MicroBatchDone(0, 0, 0, math.nan))
    assert faults(podium.take()) == [("bad_micro_batch", DRIVER)] * 2


# --- from open to closed -------------------------------------------------------------------------


def test_a_step_in_the_good_case(podium: Podium) -> None:
    podium.drive(0, 1, 2)
    assert podium.sent(m.CloseQuery) == []
    podium.done(3, loss=4.0)
    key = step_key(podium.log.ledger)
    number = podium.query()
    assert [to for to, _ in podium.sent(m.CloseQuery)] == [FIRST, SECOND]
    podium.answer(FIRST, {0: [0, 1], 1: [0, 1, 2, 3], 3: [0, 1, 2, 3]}, number=number)
    assert podium.sent(m.StepPlan) == [], "one answer is missing"
    podium.answer(SECOND, {0: [2, 3], 2: [0, 1, 2, 3]}, number=number)
    plan = podium.plan()
    assert (plan.key, plan.query, plan.micro_batches) == (key, number, (0, 1, 2, 3))
    assert cl.owned(plan, FIRST, BLOCKS) == {0: 0b0011, 1: 0b1111, 3: 0b1111}
    assert cl.owned(plan, SECOND, BLOCKS) == {0: 0b1100, 2: 0b1111}
    podium.ready(FIRST)
    assert podium.proposed == []
    podium.ready(SECOND)
    (body,) = podium.proposed
    assert isinstance(body, e.StepClosed)
    assert (body.digest, body.micro_batches) == (cl.plan_digest(plan), 4)
    assert body.loss == (3 * 2.0 + 4.0) / 4
    ends, first, second = body.stages
    assert [c.member for c in ends.contributors] == [FIRST, SECOND]
    assert [c.samples for c in ends.contributors] == [6.0, 2.0], "two of the first hop, four heads"
    assert [c.member for c in first.contributors] == [FIRST]
    assert [c.member for c in second.contributors] == [SECOND]
    for item in body.stages:
        assert item.holders == (FIRST, SECOND)
        assert item.state_hash == state_hash(item.stage, 0)
        assert sum(part.count for part in item.parts) == 3
        assert {part.owner for part in item.parts} <= {FIRST, SECOND}


def test_a_whole_step_ends_with_one_outcome_for_all_stages(podium: Podium) -> None:
    podium.close()
    podium.hold_all((9.0, 16.0, 0.0))
    (body,) = podium.commit()
    assert isinstance(body, e.StepOutcome)
    assert [s.square_norm for s in body.stages] == [9.0, 16.0, 0.0]
    assert [s.root for s in body.stages] == [hash_of(f"result {stage}") for stage in range(3)]
    assert [s.held_by for s in body.stages] == [(FIRST, SECOND)] * 3
    assert body.scale == float(np.float32(1 / 5)), "the norm over all stages is five"
    assert podium.log.ledger.pipeline.step == 1
    assert podium.ask(1)[0].step == 1, "the next step is dealt at once"


def test_the_second_step_needs_no_look_and_no_patience(podium: Podium) -> None:
    podium.close()
    podium.hold_all()
    podium.commit()
    podium.in_step(*WORKERS)
    podium.take()
    podium.tick(4.0)
    assert podium.sent(m.CloseQuery) == []
    assert podium.ask(9)[0].micro_batches == (0, 1, 2, 3)
    podium.close()
    podium.hold_all()
    podium.commit()
    assert podium.log.ledger.pipeline.step == 2


def test_what_workers_lack_is_sent_again_by_its_driver(podium: Podium) -> None:
    podium.drive(0, 1, 2, 3)
    number = podium.query()
    have = {**ALL, 1: [0, 1, 3]}
    podium.take()
    for worker in WORKERS:
        podium.answer(worker, have, number=number)
    key = step_key(podium.log.ledger)
    reopened = [(to, x) for to, x in podium.sent(m.Reopen)]
    assert reopened == [(FIRST, m.Reopen(key, number)), (SECOND, m.Reopen(key, number))]
    ((to, lease),) = podium.sent(m.Lease)
    assert (to, lease.redo, lease.micro_batches) == (DRIVER, ((1, 2),), ())
    assert podium.ask(0)[0].redo == ((1, 2),), "told again until it is done"
    podium.done(2)
    podium.answer_all(dict.fromkeys(WORKERS, ALL))
    assert podium.plan().micro_batches == (0, 1, 2, 3)


def test_micro_batches_of_a_dead_driver_that_are_incomplete_go_to_another(podium: Podium) -> None:
    podium.drive(0, 1, 2, 3)
    number = podium.query()
    podium.gone(DRIVER)
    podium.ask(COUNT, peer=A)
    for worker in WORKERS:
        podium.answer(worker, {**ALL, 1: [0, 1, 3]}, number=number)
    ((to, lease),) = [x for x in podium.sent(m.Lease) if x[1].micro_batches]
    assert (to, lease.micro_batches) == (A, (2,))


def test_a_late_step_closes_without_stragglers(podium: Podium) -> None:
    podium.drive(0, 2)
    podium.tick(LATE_S - 1)
    assert podium.sent(m.CloseQuery) == []
    assert podium.steps.deadline() <= LATE_S
    podium.tick(LATE_S)
    podium.answer_all({w: {hop: [0, 2] for hop in HOPS} for w in WORKERS})
    podium.ready_all()
    (body,) = podium.proposed
    assert isinstance(body, e.StepClosed) and body.micro_batches == 2


def test_a_late_step_with_too_few_waits_on(podium: Podium) -> None:
    podium.drive(0)
    podium.tick(LATE_S + 1)
    assert podium.sent(m.CloseQuery) == []
    podium.done(1)
    podium.answer_all({w: {hop: [1] for hop in HOPS} for w in WORKERS})
    assert podium.sent(m.StepPlan) == [] and len(podium.sent(m.Reopen)) == 2


def test_patience_follows_the_steps_so_far() -> None:
    podium = Podium(policy=StepPolicy(COUNT, 0.5, lease_ttl_s=TTL_S))
    assert podium.steps.late_at() == 120.0
    for number in range(3):
        podium.tick(podium.now + 20.0)
        if number:
            podium.in_step(*WORKERS)
        podium.close()
        podium.hold_all()
        podium.commit()
    assert podium.steps.late_at() == podium.now + 60.0, "three times the median of 23, 20, 20"


# --- workers that fail while a step is closed ----------------------------------------------------


def test_a_worker_that_dies_before_it_answers_claims_nothing(podium: Podium) -> None:
    podium.drive(*range(COUNT))
    number = podium.query()
    podium.answer(FIRST, ALL, number=number)
    podium.gone(SECOND)
    assert podium.plan().members == (FIRST,)


def test_a_worker_that_dies_after_it_answered_claims_nothing(podium: Podium) -> None:
    podium.drive(*range(COUNT))
    number = podium.query()
    podium.answer(FIRST, {**ALL, 1: [0, 1]}, number=number)
    podium.gone(FIRST)
    podium.take()
    podium.answer(SECOND, {**ALL, 1: [2, 3]}, number=number)
    assert podium.sent(m.StepPlan) == []
    ((_, lease),) = podium.sent(m.Lease)
    assert lease.redo == ((1, 0), (1, 1))


def test_a_worker_that_never_answers_is_left_out_in_the_end(podium: Podium) -> None:
    podium.drive(*range(COUNT))
    podium.answer(SECOND, ALL)
    number, asked_at = podium.query(), podium.now
    for _ in range(5):
        podium.take()
        due = podium.steps.deadline()
        podium.tick(due)
        again = podium.sent(m.CloseQuery)
        assert [(peer, query.query) for peer, query in again] == [(FIRST, number)]
    podium.take()
    assert podium.steps.deadline() == asked_at + 30.0
    podium.tick(asked_at + 30.0)
    assert podium.plan().members == (SECOND,)


def test_an_answer_that_comes_when_nobody_asks_is_told_to_go_on(podium: Podium) -> None:
    """The word to go on was lost, and the worker takes no backwards until it hears it."""
    podium.drive(*range(COUNT))
    number = podium.query()
    podium.answer_all({})
    podium.take()
    podium.answer(FIRST, {}, number=number)
    key = step_key(podium.log.ledger)
    assert podium.sent(m.Reopen) == [(FIRST, m.Reopen(key, number))]


def test_an_answer_that_is_said_twice_does_not_void_the_plan(podium: Podium) -> None:
    plan = planned(podium)
    podium.answer(FIRST, {**ALL, 1: [0, 1]}, number=plan.query)
    assert podium.plan() == plan
    podium.answer(FIRST, {1: [0, 1]}, number=plan.query)
    assert podium.query() > plan.query


def test_a_link_that_breaks_and_returns_is_not_waited_for(podium: Podium) -> None:
    """On the new link the worker takes backwards again: it will not answer what was asked."""
    podium.drive(*range(COUNT))
    number = podium.query()
    podium.gone(FIRST)
    podium.back(FIRST)
    podium.in_step(FIRST)
    podium.answer(SECOND, ALL, number=number)
    assert podium.plan().members == (SECOND,)


def planned(podium: Podium) -> m.StepPlan:
    podium.drive(*range(COUNT))
    podium.answer_all({FIRST: {**ALL, 1: [0, 1]}, SECOND: {**ALL, 1: [2, 3]}})
    return podium.plan()


def test_an_owner_that_dies_before_it_is_ready_costs_a_query(podium: Podium) -> None:
    plan = planned(podium)
    podium.ready(FIRST)
    podium.take()
    podium.gone(SECOND)
    assert podium.proposed == []
    number = podium.query()
    assert number > plan.query
    podium.answer(FIRST, {**ALL, 1: [0, 1]}, number=number)
    assert [x.redo for _, x in podium.sent(m.Lease)] == [((1, 2), (1, 3))]


def test_an_owner_that_lacks_what_was_planned_costs_a_query(podium: Podium) -> None:
    plan = planned(podium)
    podium.take()
    podium.answer(SECOND, ALL, number=plan.query)
    assert podium.query() > plan.query
    podium.answer_all(dict.fromkeys(WORKERS, ALL))
    podium.ready_all()
    assert len(podium.proposed) == 1


def test_an_owner_that_says_nothing_costs_a_query_with_more_patience(podium: Podium) -> None:
    plan, planned_at = planned(podium), podium.now
    podium.ready(FIRST)
    podium.take()
    podium.tick(planned_at + 5.0)
    assert podium.sent(m.StepPlan) == [(SECOND, plan)]  # once more to who is not ready
    podium.take()
    podium.tick(planned_at + 30.0)
    late_at, number = podium.now, podium.query()
    assert number > plan.query
    podium.tick(late_at + 59.9)
    assert podium.query() == number
    podium.answer_all(dict.fromkeys(WORKERS, ALL))
    podium.ready_all()
    assert len(podium.proposed) == 1


def test_sums_of_another_plan_count_for_nothing(podium: Podium) -> None:
    planned(podium)
    podium.ready(FIRST, digest=hash_of("another"))
    podium.ready(SECOND)
    assert podium.proposed == [] and faults(podium.take()) == []


def test_a_sum_of_something_else_is_a_fault(podium: Podium) -> None:
    planned(podium)
    podium.ready(FIRST, owned=1)
    plan = podium.plan()
    podium.say(D, m.StepReady(plan.key, cl.plan_digest(plan), 1, hash_of("x"), 4))
    assert {code for code, _ in faults(podium.out)} == {"bad_sum"}
    podium.ready(SECOND)
    assert podium.proposed == []


def test_claims_of_what_does_not_exist_count_for_nothing(podium: Podium) -> None:
    podium.drive(*range(COUNT))
    number = podium.query()
    podium.answer(FIRST, {9: [0]}, number=number)
    assert faults(podium.out) == [("bad_claims", FIRST)]
    podium.answer(SECOND, ALL, number=number)
    assert podium.plan().members == (SECOND,)


def test_a_worker_that_is_not_in_step_with_a_stage_is_not_believed_about_it(podium: Podium) -> None:
    """Its gradients are of other weights."""
    podium.in_step(FIRST, stage1=hash_of("wrong"))
    podium.log_entry(e.StageAssigned(D, (1,), "test"))
    podium.in_step(D)
    podium.drive(*range(COUNT))
    podium.answer_all(dict.fromkeys(WORKERS, ALL))
    podium.answer(D, {})
    plan = podium.plan()
    assert 1 not in (cl.owned(plan, FIRST, BLOCKS) or {})
    podium.ready_all()
    (body,) = podium.proposed
    assert isinstance(body, e.StepClosed)
    assert body.stages[1].holders == tuple(sorted((SECOND, D)))


def test_a_stage_that_nobody_has_is_waited_for(podium: Podium) -> None:
    for worker in WORKERS:
        podium.log_entry(e.StageAssigned(worker, (0, 1), "moved"))
    podium.drive(*range(COUNT))
    assert podium.sent(m.CloseQuery) == []
    assert podium.steps.deadline() == pytest.approx(podium.now + 0.1)
    podium.log_entry(e.StageAssigned(D, (2,), "moved"))
    podium.in_step(D)
    podium.tick(podium.now + 0.1)
    assert [to for to, _ in podium.sent(m.CloseQuery)] == sorted((B, C, D))


# --- the outcome ---------------------------------------------------------------------------------


def test_an_outcome_waits_for_every_stage(podium: Podium) -> None:
    podium.close()
    for worker in WORKERS:
        podium.hold(worker, 0)
        podium.hold(worker, 2)
    podium.hold(FIRST, 1)
    assert podium.proposed == [], "two holders: both must have it"
    podium.hold(SECOND, 1)
    (body,) = podium.proposed
    assert isinstance(body, e.StepOutcome) and body.stages
    podium.hold(SECOND, 1)
    podium.tick(podium.now + 1)
    assert len(podium.proposed) == 1, "said once"


def test_an_outcome_says_what_the_next_step_leaves_out_and_claims_must_agree() -> None:
    policy = StepPolicy(COUNT, 0.5, lease_ttl_s=TTL_S, step_timeout_s=LATE_S, skips=1)
    podium = Podium(policy=policy, skip=2)
    podium.close()
    for stage in range(BLOCKS + 1):
        for worker in WORKERS:
            podium.hold(worker, stage)
    (body,) = podium.proposed
    assert isinstance(body, e.StepOutcome) and body.skip == 2
    podium.commit()
    assert podium.log.ledger.pipeline.skip == 2
    podium.in_step(*WORKERS)
    podium.drive(*range(COUNT))
    number = podium.query()
    podium.answer(FIRST, {1: range(COUNT)}, number=number)
    assert faults(podium.out) == [("bad_claims", FIRST)], "0 does not visit stage 2"


def test_a_contributor_lost_before_it_delivered_ends_the_attempt_at_once(podium: Podium) -> None:
    body = podium.close({FIRST: {**ALL, 1: [0, 1]}, SECOND: {**ALL, 1: [2, 3]}})
    assert [c.member for c in body.stages[1].contributors] == [FIRST, SECOND]
    podium.gone(SECOND)
    (outcome,) = podium.commit()
    assert isinstance(outcome, e.StepOutcome) and outcome.stages == ()
    assert "contributor is lost" in outcome.reason
    assert podium.log.ledger.pipeline.attempt == 1
    assert podium.query() > 0, "and everybody is asked at once what there is"


def test_a_contributor_that_has_delivered_may_go(podium: Podium) -> None:
    body = podium.close({FIRST: {**ALL, 1: [0, 1]}, SECOND: {**ALL, 1: [2, 3]}})
    for item in body.stages:
        for number, part in enumerate(item.parts):
            everybody = tuple(range(len(item.contributors)))
            key = podium.key(item.stage)
            assert FIRST in (part.owner, part.deputy)
            podium.say(FIRST, rm.PartsHeld(key, number, everybody))
    podium.gone(SECOND)
    assert podium.proposed == [], "it waits for its return as a holder"
    podium.tick(podium.now + 2.0)
    (outcome,) = podium.proposed
    assert isinstance(outcome, e.StepOutcome) and "holder" in outcome.reason


def test_bytes_that_died_with_a_restart_end_the_attempt(podium: Podium) -> None:
    body = podium.close()
    mine = body.stages[1].contributors[0]
    podium.say(mine.member, rm.Withdraw(0, "train/1/0", mine.root))
    (outcome,) = podium.proposed
    assert isinstance(outcome, e.StepOutcome) and outcome.stages == ()


def test_results_that_differ_end_the_attempt(podium: Podium) -> None:
    podium.close()
    podium.hold(FIRST, 1)
    podium.hold(SECOND, 1, root="other")
    (outcome,) = podium.proposed
    assert isinstance(outcome, e.StepOutcome)
    assert outcome.reason == "train/1/0: results differ"


def test_an_attempt_that_takes_for_ever_ends(podium: Podium) -> None:
    podium.close()
    podium.tick(podium.now + 8.0)
    assert isinstance(podium.proposed[0], e.StepOutcome) and not podium.proposed[0].stages


def test_after_an_abort_the_same_micro_batches_are_closed_again(podium: Podium) -> None:
    podium.close({FIRST: {**ALL, 1: [0, 1]}, SECOND: {**ALL, 1: [2, 3]}})
    podium.take()
    podium.gone(SECOND)
    podium.commit()
    podium.answer(FIRST, {**ALL, 1: [0, 1]})
    assert podium.sent(m.Lease)[-1][1].redo == ((1, 2), (1, 3))
    podium.done(2, 3)
    podium.answer(FIRST, ALL)
    podium.ready(FIRST)
    (body,) = podium.commit()
    assert isinstance(body, e.StepClosed) and body.attempt == 1
    for stage in range(3):
        podium.hold(FIRST, stage)
    podium.commit()
    assert podium.log.ledger.pipeline.step == 1


def test_a_log_that_takes_nothing_is_asked_again(podium: Podium) -> None:
    podium.refusing = True
    podium.drive(*range(COUNT))
    podium.answer_all(dict.fromkeys(WORKERS, ALL))
    podium.ready_all()
    assert podium.steps.deadline() == pytest.approx(podium.now + 0.1)
    podium.refusing = False
    podium.tick(podium.now + 0.1)
    assert isinstance(podium.proposed[0], e.StepClosed)
    podium.commit()
    podium.refusing = True
    podium.hold_all()
    assert podium.steps.deadline() == pytest.approx(podium.now + 0.1)
    podium.refusing = False
    podium.tick(podium.now + 0.1)
    assert isinstance(podium.proposed[0], e.StepOutcome)
