"""The leader of steps when leadership, the run or a stage comes to an end."""

from __future__ import annotations

import math

import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.messages import pipeline as m
from swarmtrain_protocols.messages import rounds as rm
from tests.protocols.pipeline.stage_kit import state_hash
from tests.protocols.pipeline.step_kit import (
    COUNT,
    DRIVER,
    HOPS,
    TTL_S,
    WORKERS,
    Podium,
)
from tests.protocols.rounds_kit import B, E, faults, hash_of, joined

FIRST, SECOND = sorted(WORKERS)
ALL = {hop: range(COUNT) for hop in HOPS}


@pytest.fixture
def podium() -> Podium:
    return Podium()


def planned(podium: Podium) -> m.StepPlan:
    podium.drive(*range(COUNT))
    podium.answer_all({FIRST: {**ALL, 1: [0, 1]}, SECOND: {**ALL, 1: [2, 3]}})
    return podium.plan()


def test_a_new_leader_asks_what_there_is_before_it_deals() -> None:
    podium = Podium(ready=False)
    podium.ask(COUNT)
    assert podium.sent(m.CloseQuery) == [], "nobody has reported yet"
    podium.in_step(*WORKERS)
    podium.tick(0.1)
    assert len(podium.sent(m.CloseQuery)) == 2
    podium.answer_all({w: {hop: [0, 2] for hop in HOPS} for w in WORKERS})
    podium.done(0, loss=3.0)
    podium.take()
    podium.tick(TTL_S)
    assert [x.micro_batches for _, x in podium.sent(m.Lease)] == [(1, 3)], "the rest, after a lease"


def test_a_new_leader_that_finds_everything_closes_at_once() -> None:
    podium = Podium(ready=False)
    podium.in_step(*WORKERS)
    podium.tick(0.1)
    podium.answer_all(dict.fromkeys(WORKERS, ALL))
    podium.ready_all()
    (body,) = podium.proposed
    assert isinstance(body, e.StepClosed)
    assert body.loss == -1.0, "no driver has said it to this leader"


def test_a_new_leader_decides_what_another_one_closed() -> None:
    podium = Podium(ready=False)
    podium.log_entry(podium.log.closing(*WORKERS))
    podium.hold_all()
    (body,) = podium.proposed
    assert isinstance(body, e.StepOutcome) and len(body.stages) == 3


def test_queries_of_two_leaderships_have_different_numbers(podium: Podium) -> None:
    podium.drive(*range(COUNT))
    first = podium.query()
    podium.steps.activate(1.0, False)
    assert podium.steps.deadline() == math.inf
    podium.log_entry(e.NoOp())
    podium.steps.activate(1.0, True)
    podium.tick(1.1)
    assert podium.query() > first + 1


def test_a_leader_that_is_none_any_more_says_nothing(podium: Podium) -> None:
    podium.steps.activate(1.0, False)
    podium.take()
    podium.drive(*range(COUNT))
    podium.steps.committable(1.0, podium.key(0), hash_of("x"), (B,), 1.0)
    podium.steps.reconcile(1.0)
    assert podium.take() == []


def test_a_pause_lets_workers_go_on_and_a_resume_asks_them(podium: Podium) -> None:
    podium.drive(*range(COUNT))
    number = podium.query()
    podium.take()
    podium.log_entry(e.Paused("test"))
    assert [x.query for _, x in podium.sent(m.Reopen)] == [number] * 2
    assert podium.steps.deadline() == math.inf
    podium.log_entry(e.Resumed("test"))
    assert podium.query() > number


def test_a_closing_that_a_pause_refused_is_made_again(podium: Podium) -> None:
    planned(podium)
    podium.ready_all()
    (body,) = podium.proposed
    podium.proposed.clear()
    podium.log.ok(e.Paused("test"))
    assert not podium.log.add(body)
    podium.reconcile()
    podium.log_entry(e.Resumed("test"))
    podium.answer_all(dict.fromkeys(WORKERS, ALL))
    podium.ready_all()
    assert isinstance(podium.proposed[0], e.StepClosed)


def test_a_lost_stage_stops_everything_until_it_is_back(podium: Podium) -> None:
    podium.drive(*range(COUNT))
    podium.take()
    podium.log_entry(e.StageLost(1, 0, B, "silent"))
    podium.tick(podium.now + 10)
    assert podium.sent(m.CloseQuery) == [] and podium.ask(4)[0].micro_batches == ()
    podium.take()
    podium.log_entry(e.StageRecovered(1, 0, B, ("copy",), (1.0,), 0, (), state_hash(1, 0)))
    ((to, lease),) = podium.sent(m.Lease)
    assert (to, lease.micro_batches) == (DRIVER, (0, 1, 2, 3)), "all of them, anew"
    podium.close()
    podium.hold_all()
    podium.commit()
    assert podium.log.ledger.pipeline.step == 1


def test_an_ended_run_decides_what_is_closed_and_closes_nothing(podium: Podium) -> None:
    podium.close()
    podium.log_entry(e.RunEnded("enough"))
    podium.hold_all()
    podium.commit()
    assert podium.log.ledger.pipeline.step == 1
    podium.in_step(*WORKERS)
    podium.take()
    podium.ask(4)
    podium.done(*range(COUNT))
    podium.tick(500.0)
    assert podium.sent(m.CloseQuery) == [] and podium.steps.deadline() == math.inf


def test_contributions_of_stages_are_not_announced_one_by_one(podium: Podium) -> None:
    podium.say(B, rm.Ready(0, "train/1/0", hash_of("x"), 20, "fp32", 1.0, 0))
    assert faults(podium.take()) == [("unknown_channel", B)]


def test_members_that_join_later_take_part() -> None:
    podium = Podium()
    podium.log_entry(joined(E))
    podium.links.append(PeerId(E))
    podium.log_entry(e.StageAssigned(E, (1,), "test"))
    podium.in_step(E)
    podium.drive(*range(COUNT))
    assert E in [to for to, _ in podium.sent(m.CloseQuery)]
