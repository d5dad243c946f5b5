"""The leader assigns stages: in a fleet in virtual time, and by hand where a fleet is too much."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import Effect, Emit, PeerId
from swarmtrain_protocols.messages.pipeline import StageReport, WorkerReport
from swarmtrain_protocols.pipeline.assigner import (
    DRAIN_S_MIN,
    LOOK_S_MIN,
    PERIOD_S_MAX,
    PERIOD_S_MIN,
    PERIOD_STEPS,
    PROPOSAL_PATIENCE_S,
    Assigner,
)
from swarmtrain_protocols.pipeline.census import AssignPolicy
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.testing.fleet import Fleet, FleetWorker
from tests.protocols.pipeline.test_census import ledger_of
from tests.protocols.rounds_kit import A, B, C

PERIOD_S = 30.0
DOWNLOAD_S = 5.0
POLICY = AssignPolicy(
    replicas_min=2, ends_replicas=3, period_s=PERIOD_S, report_s=2.0, grace_s=10.0
)


def fleet(policy: AssignPolicy = POLICY, blocks: int = 4, **changes: object) -> Fleet:
    return Fleet(blocks=blocks, policy=policy, download_s=DOWNLOAD_S, **changes)  # type: ignore[arg-type]


def crowd(world: Fleet, count: int, at: float = 0.0, **changes: float) -> list[PeerId]:
    return [world.arrive(at, f"worker {k}", **changes) for k in range(count)]  # type: ignore[arg-type]


def notices(out: list[Effect]) -> list[fx.Notice]:
    return [x.event for x in out if isinstance(x, Emit) and isinstance(x.event, fx.Notice)]


class Chair:
    """An assigner on member A whose proposals are logged when the test says so."""

    def __init__(self, *members: bytes, policy: AssignPolicy = POLICY, blocks: int = 2) -> None:
        self.ledger = ledger_of(*members, blocks=blocks)
        self.out: list[Effect] = []
        self.links = [PeerId(k) for k in members if k != A]
        self.proposed: list[e.StageAssigned] = []
        self.refusing = False
        self.assigner = Assigner(
            me=PeerId(A),
            ledger=self.ledger,
            out=self.out,
            policy=policy,
            propose=self.propose,
            connected=lambda: self.links,
        )
        self.assigner.activate(0.0, True)

    def propose(self, now: float, body: e.EntryBody) -> bool:
        assert isinstance(body, e.StageAssigned)
        if not self.refusing:
            self.proposed.append(body)
        return not self.refusing

    def commit(self, now: float) -> None:
        bodies, self.proposed = self.proposed, []
        for body in bodies:
            assert self.ledger.apply(self.ledger.index + 1, body)
        self.assigner.reconcile(now)

    def join(self, now: float, peer: bytes, room: int = 150) -> None:
        self.assigner.receive(now, PeerId(peer), WorkerReport(0, (), room, 0))


# --- joining -------------------------------------------------------------------------------------


def test_a_joiner_is_placed_at_once_and_only_once() -> None:
    chair = Chair(A, B, C)
    chair.join(0.5, B)
    assert [(x.member, x.stages) for x in chair.proposed] == [(B, (0, 1))]
    chair.join(0.6, B)
    chair.join(0.7, C)
    assert [(x.member, x.stages) for x in chair.proposed[1:]] == [(C, (0, 2))]
    chair.commit(0.8)
    assert chair.ledger.pipeline.assigned == {B: (0, 1), C: (0, 2)}
    chair.join(0.9, C)
    assert chair.proposed == []


def test_joiners_in_the_same_moment_are_looked_at_together() -> None:
    chair = Chair(A, B, C)
    chair.join(0.5, B)
    chair.join(0.5, C)
    assert len(chair.proposed) == 1
    assert chair.assigner.deadline() == 0.5 + LOOK_S_MIN
    chair.assigner.step(0.5 + LOOK_S_MIN)
    assert [x.member for x in chair.proposed] == [B, C]


def test_a_proposal_that_got_lost_is_made_again() -> None:
    chair = Chair(A, B)
    chair.join(0.0, B)
    chair.proposed.clear()
    chair.assigner.step(PROPOSAL_PATIENCE_S)
    assert chair.proposed == []
    chair.assigner.step(PROPOSAL_PATIENCE_S + 2.1)
    assert [x.member for x in chair.proposed] == [B]


def test_while_the_log_takes_nothing_nobody_counts_as_placed() -> None:
    chair = Chair(A, B)
    chair.refusing = True
    chair.join(0.0, B)
    chair.refusing = False
    chair.assigner.step(2.0)
    assert [x.member for x in chair.proposed] == [B]


def test_the_first_workers_wait_for_as_many_as_the_run_starts_with() -> None:
    chair = Chair(A, B, C, policy=replace(POLICY, start_peers=2))
    chair.join(0.0, B)
    chair.assigner.step(60.0)
    assert chair.proposed == []
    chair.join(61.0, C)
    assert [x.member for x in chair.proposed] == [B, C]


def test_a_worker_that_fits_nowhere_is_named_once() -> None:
    chair = Chair(A, B, blocks=2)
    chair.join(0.0, B, room=49)
    for now in range(1, 20):
        chair.join(float(now), B, room=49)
    assert chair.proposed == []
    assert [n.fields["using"] for n in notices(chair.out)] == [B.hex()]


def test_nonsense_is_an_event_with_the_peer_named() -> None:
    chair = Chair(A, B)
    chair.assigner.receive(0.0, PeerId(B), WorkerReport(0, (StageReport(7, 0, True, 0.0),), 100, 0))
    (notice,) = notices(chair.out)
    assert (notice.name, notice.fields) == ("peer_fault", {"peer": B.hex(), "fault": "bad_stage"})


def test_nobody_is_accused_of_news_that_this_node_has_not_or_no_more() -> None:
    chair = Chair(A, B)
    chair.assigner.receive(0.0, PeerId(C), WorkerReport(0, (), 100, 0))
    chair.assigner.receive(0.0, PeerId(B), WorkerReport(7, (), 100, 0))
    assert notices(chair.out) == []


def test_nothing_is_assigned_by_who_does_not_lead_nor_without_a_model_nor_at_the_end() -> None:
    chair = Chair(A, B)
    chair.assigner.activate(1.0, False)
    chair.join(1.0, B)
    assert chair.proposed == [] and chair.assigner.deadline() == math.inf
    chair.assigner.activate(2.0, True)
    chair.ledger.channels.clear()
    chair.join(2.0, B)
    assert chair.proposed == []
    over = Chair(A, B)
    assert over.ledger.apply(over.ledger.index + 1, e.RunEnded("done"))
    over.join(1.0, B)
    assert over.proposed == [] and over.assigner.deadline() == math.inf


@pytest.mark.parametrize("count", [1, 5, 16, 41])
def test_a_herd_spreads_to_within_one_joiner(count: int) -> None:
    world = fleet(replace(POLICY, replicas_min=1))
    crowd(world, count)
    world.run(1.0)
    assert sum(world.counts()) == count
    assert max(world.counts()) - min(world.counts()) <= 1
    assert not world.moves()


def test_a_herd_that_arrives_in_an_uneven_fleet_evens_it() -> None:
    world = fleet()
    crowd(world, 8)
    world.run(20.0)
    for peer in [w.id for w in world.workers.values() if 1 in w.stages]:
        world.crash(20.0, peer)
    world.run(29.0)
    for number in range(10):
        world.arrive(30.0 + 0.01 * number, f"late {number}")
    world.run(31.5)
    assert sorted(world.counts()) == [4, 4, 4, 4]


# --- cover, protection and less ------------------------------------------------------------------


def test_too_few_workers_with_room_serve_several_stages_until_more_come() -> None:
    world = fleet(blocks=3)
    crowd(world, 2, room=10_000_000)
    world.run(20.0)
    assert world.counts() == [2, 2, 2]
    for number in range(10):
        world.arrive(20.0 + number, f"late {number}", room=10_000_000)
    world.run(60.0)
    blocks = [[s for s in w.stages if s] for w in world.workers.values()]
    assert all(len(served) == 1 for served in blocks) and world.counts() == [4, 4, 4]
    assert not world.moves()


def test_the_last_worker_of_a_stage_is_replaced_after_the_grace_time() -> None:
    world = fleet(replace(POLICY, replicas_min=1), blocks=2)
    crowd(world, 4)
    world.run(20.0)
    for peer in [w.id for w in world.workers.values() if 2 in w.stages]:
        world.crash(20.0, peer)
    world.run(29.9)
    assert world.counts() == [2, 0]
    world.run(33.0)
    assert world.counts() == [1, 1]


def test_a_worker_that_comes_back_within_the_grace_time_changes_nothing() -> None:
    world = fleet(blocks=2)
    peers = crowd(world, 4)
    world.run(20.0)
    before = len(world.assignments)
    world.crash(20.0, peers[0])
    world.back(29.0, peers[0])
    world.run(60.0)
    assert len(world.assignments) == before


# --- moving --------------------------------------------------------------------------------------


def uneven() -> Fleet:
    """Five workers at stage 1, one at each other: of twenty evenly placed ones twelve are lost."""
    world = fleet()
    crowd(world, 20)
    world.run(100.0)
    assert world.counts() == [5, 5, 5, 5]
    for stage in (2, 3, 4):
        for peer in [w.id for w in world.workers.values() if stage in w.stages][1:]:
            world.crash(100.0, peer)
    world.run(100.1)
    assert world.counts() == [5, 1, 1, 1]
    return world


def test_five_one_one_one_doubles_within_four_periods_and_nobody_moves_twice() -> None:
    world = uneven()
    assert world.rate() == pytest.approx(1.0)
    world.run(100.0 + POLICY.grace_s + 4 * PERIOD_S)
    assert world.rate() >= 1.8
    assert world.counts() == [2, 2, 2, 2]
    moves = world.moves()
    assert len(moves) == 3 and len({m.member for m in moves}) == 3
    gaps = [b.at - a.at for a, b in itertools.pairwise(moves)]
    assert all(gap >= PERIOD_S - 0.1 for gap in gaps)
    world.run(100.0 + 12 * PERIOD_S)
    assert len(world.moves()) == 3


def test_a_new_leader_moves_nobody_who_may_have_just_come() -> None:
    world = uneven()
    world.run(115.0)
    assert len(world.moves()) == 1
    world.new_leader()
    world.run(115.0 + 2 * PERIOD_S - 1.0)
    assert len(world.moves()) == 1
    world.run(115.0 + 5 * PERIOD_S)
    assert world.counts() == [2, 2, 2, 2]
    assert not world.returns(2 * PERIOD_S)


def test_noisy_measurements_move_nobody_in_an_even_fleet() -> None:
    world = fleet(noise=0.05)
    crowd(world, 12)
    world.run(20 * PERIOD_S)
    assert world.counts() == [3, 3, 3, 3] and not world.moves()


def test_speed_counts_not_heads() -> None:
    world = fleet(replace(POLICY, replicas_min=1), blocks=2)
    for number in range(4):
        world.arrive(0.0, f"slow {number}", speed=0.5)
    world.run(10.0)
    for number in range(4):
        world.arrive(10.0 + 20 * number, f"quick {number}", speed=2.0)
    world.run(16 * PERIOD_S)
    assert world.rate() == pytest.approx(world.optimum(), rel=0.1)


def test_the_period_follows_the_steps_and_is_bounded() -> None:
    chair = Chair(A, B, policy=replace(POLICY, period_s=0.0))
    chair.join(0.0, B)

    def period(now: float) -> float:
        return chair.assigner.pace(now, chair.assigner.table(now)).period_s

    assert period(0.0) == PERIOD_S_MIN
    for step, now in enumerate((0.0, 1.0, 2.0)):
        for channel in chair.ledger.channels.values():
            channel.round = step
        chair.assigner.reconcile(now)
    assert period(2.0) == PERIOD_STEPS * 1.0
    for channel in chair.ledger.channels.values():
        channel.round += 1
    chair.assigner.reconcile(1002.0)
    assert period(1002.0) == PERIOD_S_MAX


# --- leaving, and the slow -----------------------------------------------------------------------


def test_a_leaver_serves_on_until_its_replacement_is_in_step() -> None:
    world = fleet(replace(POLICY, replicas_min=1), blocks=2)
    crowd(world, 3)
    world.run(20.0)
    alone = next(w.id for w in world.workers.values() if 2 in w.stages)
    assert world.counts() == [2, 1] and not world.assigner.may_leave(alone)
    world.assigner.leaving(20.0, alone)
    world.run(24.0)
    assert world.counts() == [1, 2] and not world.assigner.may_leave(alone)
    world.run(30.0)
    assert world.counts() == [1, 1] and world.assigner.may_leave(alone)
    assert world.rate() > 0.0


def test_a_leaver_that_nobody_can_replace_goes_and_it_is_said() -> None:
    world = fleet(blocks=2)
    peers = crowd(world, 2)
    world.run(20.0)
    world.assigner.leaving(20.0, peers[0])
    world.run(23.0)
    assert world.assigner.may_leave(peers[0])
    assert any("without its last worker" in str(n.fields["what"]) for n in notices(world.out))


def test_a_leaver_does_not_wait_for_ever() -> None:
    policy = replace(POLICY, replicas_min=1)
    world = Fleet(blocks=2, policy=policy, download_s=1e6)
    crowd(world, 3)
    world.run(20.0)
    for worker in world.workers.values():
        worker.ready = dict.fromkeys(worker.stages, 0.0)
    world.run(25.0)
    alone = next(w.id for w in world.workers.values() if 2 in w.stages)
    world.assigner.leaving(25.0, alone)
    world.run(20.0 + DRAIN_S_MIN)
    assert not world.assigner.may_leave(alone)
    world.run(35.0 + DRAIN_S_MIN)
    assert world.assigner.may_leave(alone)


def test_whoever_returns_is_not_let_go() -> None:
    world = fleet(blocks=2)
    peers = crowd(world, 6)
    world.run(20.0)
    world.assigner.leaving(20.0, peers[0])
    world.assigner.returned(peers[0])
    world.run(30.0)
    assert not world.assigner.may_leave(peers[0])


def test_a_very_slow_worker_is_named_once() -> None:
    world = fleet(blocks=1)
    crowd(world, 4)
    slow = world.arrive(0.0, "slow", speed=0.05)
    world.run(60.0)
    found = [n for n in notices(world.out) if n.fields["what"] == "a slow worker"]
    assert [n.fields["using"] for n in found] == [slow.hex()]


# --- the fleet itself ----------------------------------------------------------------------------


def test_the_fleet_counts_what_it_could_have_done() -> None:
    homes = iter([1, 1, 1, 2])

    def place(world: Fleet, worker: FleetWorker) -> int:
        return next(homes)

    world = Fleet(blocks=2, policy=POLICY, download_s=10.0, place=place)
    crowd(world, 4)
    world.run(110.0)
    assert world.done == pytest.approx(100 * 1.0, rel=1e-4)
    assert world.best == pytest.approx(110 * 2.0)
