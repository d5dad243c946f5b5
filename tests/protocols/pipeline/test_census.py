"""What the leader knows of workers: reports, links, speeds, costs, downloads, lifetimes."""

from __future__ import annotations

import math

import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.messages.pipeline import StageReport, WorkerReport
from swarmtrain_protocols.pipeline.book import pipeline_state, stage_channel
from swarmtrain_protocols.pipeline.census import (
    LIFETIME_S,
    SECONDS_PER_VALUE,
    AssignPolicy,
    Census,
)
from tests.protocols.rounds_kit import FOUNDER, RUN, A, B, C, D, hash_of, joined

POLICY = AssignPolicy(replicas_min=2, ends_replicas=3, report_s=2.0, grace_s=10.0)


def ledger_of(*members: bytes, blocks: int = 2, values: tuple[int, ...] = (50, 100, 100)) -> Ledger:
    ledger = Ledger(pipeline=pipeline_state(blocks, "sync"))
    layout = tuple(e.ChannelLayout(stage_channel(s), values[s]) for s in range(blocks + 1))
    roots = tuple(hash_of("root") for _ in layout)
    add(ledger, e.Genesis(RUN, FOUNDER.peer_id, A, bytes(64)))
    for member in members:
        add(ledger, joined(member))
    add(ledger, e.ModelDefined(bytes(32), layout, roots, A))
    return ledger


def add(ledger: Ledger, body: e.EntryBody) -> None:
    assert ledger.apply(ledger.index + 1, body), body


def report(*stages: tuple[int, float], ready: bool = True, room: int = 100) -> WorkerReport:
    items = tuple(StageReport(s, 1, ready, seconds) for s, seconds in stages)
    return WorkerReport(0, items, room, 0)


class Desk:
    """A census and the ledger it follows."""

    def __init__(self, *members: bytes, **changes: object) -> None:
        self.ledger = ledger_of(*members, **changes)  # type: ignore[arg-type]
        self.census = Census(PeerId(A), self.ledger, POLICY, 0.0)

    def assign(self, now: float, member: bytes, *stages: int) -> None:
        add(self.ledger, e.StageAssigned(member, stages, "test"))
        self.census.reconcile(now)

    def say(self, now: float, member: bytes, *stages: tuple[int, float], **changes: object) -> None:
        message = report(*stages, **changes)  # type: ignore[arg-type]
        assert self.census.reported(now, PeerId(member), message) == ""

    def look(self, now: float, *linked: bytes) -> list[bytes]:
        self.census.look(now, [PeerId(k) for k in linked])
        return list(self.census.table(now, {}, {}).workers)


@pytest.mark.parametrize(
    ("peer", "message", "code"),
    [
        (B, WorkerReport(1, (), 100, 0), "stale_generation"),
        (D, report(), "not_a_member"),
        (B, report((3, 0.0)), "bad_stage"),
        (B, report((1, 0.0), (1, 0.0)), "bad_stage"),
        (B, report((2, 0.0), (1, 0.0)), "bad_stage"),
        (B, report((1, -1.0)), "bad_rate"),
        (B, report((1, math.inf)), "bad_rate"),
        (B, report((1, math.nan)), "bad_rate"),
    ],
)
def test_what_makes_no_sense_has_a_code(peer: bytes, message: WorkerReport, code: str) -> None:
    desk = Desk(A, B)
    assert desk.census.reported(1.0, PeerId(peer), message) == code
    assert desk.look(1.0, B) == []


def test_a_worker_is_one_that_is_linked_and_has_a_trainer() -> None:
    desk = Desk(A, B, C)
    desk.say(0.0, B)
    desk.say(0.0, C, room=0)
    assert desk.look(0.0, B, C) == [B]
    assert desk.look(9.0, C) == [B], "its link is down, but not for long"
    table = desk.census.table(9.0, {}, {})
    assert table.workers[B].ready == ()
    assert desk.look(10.1, C) == []
    assert desk.look(11.0, B, C) == [B]
    desk.say(12.0, B, room=0)
    assert desk.look(12.0, B, C) == [B]
    assert desk.look(21.5, B, C) == [], "its trainer is away for longer than the grace time"


def test_a_new_leader_counts_on_those_whom_the_ledger_names() -> None:
    ledger = ledger_of(A, B, C)
    add(ledger, e.StageAssigned(B, (1,), "test"))
    add(ledger, e.StageAssigned(C, (2,), "test"))
    census = Census(PeerId(A), ledger, POLICY, 100.0)
    census.look(100.0, [PeerId(B)])
    table = census.table(100.0, {}, {})
    assert (table.live(1), table.live(2)) == (1, 1)
    assert table.workers[B].ready == (1,) and table.workers[B].since == 100.0
    census.look(103.9, [PeerId(B)])
    census.look(113.0, [PeerId(B)])
    assert list(census.table(113.0, {}, {}).workers) == [B], "it has not reported, but may yet"
    census.look(114.0, [PeerId(B)])
    assert list(census.table(114.0, {}, {}).workers) == []


def test_speeds_are_measured_and_others_taken_as_usual() -> None:
    desk = Desk(A, B, C, D)
    desk.say(0.0, B)
    desk.look(0.0, B, C, D)
    assert desk.census.table(0.0, {}, {}).workers[B].speed == 1.0
    for member, stage in ((A, 1), (C, 1), (D, 2)):
        desk.assign(0.0, member, stage)
    desk.say(0.0, A, (1, 0.5))
    desk.say(0.0, C, (1, 0.125))
    desk.say(0.0, D, (2, 0.25))
    desk.look(0.0, B, C, D)
    speeds = {k: w.speed for k, w in desk.census.table(0.0, {}, {}).workers.items()}
    assert speeds == {A: 2.0, C: 8.0, D: 4.0, B: 4.0}


def test_the_ends_cost_what_is_measured_beside_a_block_stage() -> None:
    desk = Desk(A, B, C)
    desk.look(0.0, B)
    costs = [stage.cost for stage in desk.census.table(0.0, {}, {}).stages.values()]
    assert costs == [0.5, 1.0, 1.0]  # by their parameters, until somebody has measured
    desk.assign(0.0, B, 0, 1)
    desk.say(0.0, B, (0, 0.3), (1, 0.2), room=150)
    desk.look(0.0, B)
    table = desk.census.table(0.0, {}, {})
    assert table.stages[0].cost == pytest.approx(1.5)
    assert table.workers[B].speed == pytest.approx(5.0)
    assert table.stages[0].replicas_min == 3 and table.stages[1].replicas_min == 2


def test_stages_of_unequal_size_cost_by_their_size() -> None:
    desk = Desk(A, B, values=(50, 100, 300))
    costs = [stage.cost for stage in desk.census.table(0.0, {}, {}).stages.values()]
    assert costs == [0.25, 0.5, 1.5]


def test_the_time_of_downloads_is_learned() -> None:
    desk = Desk(A, B)
    desk.assign(0.0, B, 1)
    desk.say(5.0, B, (1, 0.0))
    assert desk.census.seconds_per_value == SECONDS_PER_VALUE, "nothing to fetch before step 1"
    desk.ledger.channels[stage_channel(2)].round = 7
    desk.assign(10.0, B, 2)
    desk.say(20.0, B, (2, 0.0), ready=False)
    assert desk.census.seconds_per_value == SECONDS_PER_VALUE
    desk.say(60.0, B, (2, 0.0))
    assert desk.census.seconds_per_value == pytest.approx(0.3 * 0.5, rel=1e-4)
    desk.say(99.0, B, (2, 0.0))
    assert desk.census.seconds_per_value == pytest.approx(0.3 * 0.5, rel=1e-4)


def test_a_worker_is_new_in_a_stage_it_came_to_but_not_where_it_gave_one_up() -> None:
    desk = Desk(A, B)
    desk.say(0.0, B, room=300)

    def since() -> float:
        desk.look(50.0, B)
        return desk.census.table(50.0, {}, {}).workers[B].since

    desk.assign(10.0, B, 1)
    assert since() == 10.0
    desk.assign(20.0, B, 0, 1)
    assert since() == 10.0, "the ends come beside"
    desk.assign(30.0, B, 0, 1, 2)
    assert since() == 30.0
    desk.assign(40.0, B, 1)
    assert since() == 30.0
    table = desk.census.table(50.0, {B: (2,)}, {})
    assert table.workers[B].stages == (2,) and table.workers[B].since == 50.0


def test_what_a_worker_has_on_disk_is_known() -> None:
    desk = Desk(A, B)
    desk.say(0.0, B, (2, 0.0), ready=False)
    desk.look(0.0, B)
    assert desk.census.table(0.0, {}, {}).workers[B].kept == (2,)
    desk.assign(1.0, B, 2)
    assert desk.census.table(1.0, {}, {}).workers[B].kept == ()


def test_steps_are_timed_by_the_slowest_stage() -> None:
    desk = Desk(A, B)
    desk.census.reconcile(0.0)
    for now in (4.0, 8.0):
        for stage in range(3):
            desk.ledger.channels[stage_channel(stage)].round += 2
            desk.census.reconcile(now)
    assert desk.census.step_s == pytest.approx(2.0)


def test_the_expected_lifetime_falls_with_losses() -> None:
    desk = Desk(A, B, C)
    desk.say(0.0, B)
    desk.say(0.0, C)
    assert desk.census.lifetime_s() == LIFETIME_S
    for now in range(0, 7201, 5):
        desk.look(float(now), B, *([C] if now < 3600 else []))
    present = 7200 + 3600 + 10  # worker seconds; the loss is seen after the grace time
    assert desk.census.lifetime_s() == pytest.approx((present + LIFETIME_S) / 2, abs=6.0)
