"""The leader notices lost stages, names hosts, and says so if a recovery did not heal."""

from __future__ import annotations

import math

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import Effect, Emit, PeerId
from swarmtrain_protocols.messages.member import StateReport
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.pipeline.recovery import (
    GUARD_STEPS,
    LOOK_S,
    RecoveryLeader,
    RecoveryPolicy,
)
from swarmtrain_protocols.rounds import effects as fx
from tests.protocols.pipeline.stage_kit import StageLog, state_hash
from tests.protocols.rounds_kit import A, B, C, D, hash_of

POLICY = RecoveryPolicy(dead_s=10.0, return_s=30.0, apply_s=60.0, host_s=900.0)


class Chair:
    """A leads; B and C serve stage 1, A serves the rest; D may be given stage 1."""

    def __init__(self, steps: int = 3) -> None:
        self.log = StageLog(A, B, C, D)
        self.log.assign(A, 0, 2)
        self.log.assign(B, 1)
        self.log.assign(C, 1)
        for _ in range(steps):
            self.log.step(A, B)
        self.out: list[Effect] = []
        self.here = [A, B, C, D]
        self.trained = [A, B, C, D]
        self.proposed: list[e.EntryBody] = []
        self.refusing = False
        self.reports: dict[tuple[str, bytes], StateReport] = {}
        self.leader = RecoveryLeader(
            ledger=self.log.ledger,
            out=self.out,
            propose=self.propose,
            present=lambda: self.here,
            reported=self.reported,
            able=self.able,
            policy=POLICY,
        )
        self.leader.activate(0.0, True)
        for member, stages in ((A, (0, 2)), (B, (1,)), (C, (1,))):
            self.says(member, *stages)

    def propose(self, now: float, body: e.EntryBody) -> bool:
        if not self.refusing:
            self.proposed.append(body)
        return not self.refusing

    def reported(self, channel: str) -> list[tuple[bytes, StateReport]]:
        found = self.reports.items()
        return [(k, r) for (name, k), r in found if name == channel and k in self.here]

    def able(self, stage: int) -> list[PeerId]:
        serving = self.log.ledger.pipeline.serving(stage)
        return [PeerId(k) for k in serving if k in self.here and k in self.trained]

    def says(self, member: bytes, *stages: int, behind: int = 0) -> None:
        for stage in stages:
            name = stage_channel(stage)
            number = self.log.ledger.channels[name].round - behind
            report = StateReport(0, name, number, state_hash(stage, number), True, True)
            self.reports[name, member] = report

    def run(self, start: float, stop: float) -> list[e.EntryBody]:
        """Let the leader look every second; returns and forgets what it proposed."""
        for second in range(int((stop - start) / LOOK_S) + 1):
            self.leader.step(start + second * LOOK_S)
        taken, self.proposed = self.proposed, []
        return taken

    def commit(self, now: float, *bodies: e.EntryBody) -> None:
        for body in bodies:
            self.log.ok(body)
        self.leader.reconcile(now)


def lost(host: bytes, reason: str = "no holder of its state is left", step: int = 3) -> e.StageLost:
    return e.StageLost(1, step, host, reason)


def test_while_somebody_has_the_state_nothing_is_lost() -> None:
    chair = Chair()
    chair.here.remove(C)
    assert chair.run(0.0, 100.0) == []
    assert chair.leader.deadline() == 101.0


def test_a_stage_is_lost_when_nobody_comes_back_and_a_worker_of_it_is_the_host() -> None:
    chair = Chair()
    chair.here = [A, D]
    chair.log.assign(D, 1)
    assert chair.run(0.0, 29.0) == [], "B and C may be back with their disks"
    assert chair.run(30.0, 39.0) == [lost(D)]
    chair.commit(40.0, lost(D))
    assert chair.run(40.0, 100.0) == []


def test_a_stage_that_was_rebuilt_at_once_is_not_lost_again_before_its_host_reports() -> None:
    chair = Chair()
    chair.here = [A, D]
    chair.log.assign(D, 1)
    assert chair.run(0.0, 30.0) == [lost(D)]
    chair.commit(30.1, lost(D))
    back = e.StageRecovered(1, 3, D, ("fresh",), (5.0,), 0, (), hash_of("new"))
    chair.commit(30.5, back)  # between two looks
    assert chair.run(31.0, 55.0) == [], "the state is on its way to the disk"


def test_if_nobody_is_expected_back_it_is_sooner() -> None:
    chair = Chair()
    chair.here = [A, D]
    chair.log.assign(D, 1)
    chair.commit(0.0, e.MemberLeft(B, "lost"), e.MemberLeft(C, "lost"))
    assert chair.run(0.0, 9.0) == []
    assert chair.run(10.0, 10.0) == [lost(D)]


def test_without_anybody_to_be_the_host_it_waits_for_the_assigner() -> None:
    chair = Chair()
    chair.here = [A, D]
    chair.commit(0.0, e.MemberLeft(B, "lost"), e.MemberLeft(C, "lost"))
    assert chair.run(0.0, 60.0) == []
    chair.log.assign(D, 1)
    chair.trained.remove(D)
    assert chair.run(61.0, 70.0) == []
    chair.trained.append(D)
    assert chair.run(71.0, 71.0) == [lost(D)]


def test_whoever_comes_back_in_time_ends_the_wait() -> None:
    chair = Chair()
    chair.here = [A, D]
    chair.log.assign(D, 1)
    chair.run(0.0, 28.0)
    chair.here = [A, B, D]
    chair.run(29.0, 29.0)
    chair.here = [A, D]
    assert chair.run(30.0, 59.0) == [], "the wait began anew"
    assert len(chair.run(60.0, 60.0)) == 1


def test_holders_of_the_last_result_have_time_to_apply_it() -> None:
    chair = Chair()
    channel = chair.log.ledger.channels[stage_channel(1)]
    assert channel.history[-1].held_by == (A,)
    chair.log.assign(A, 0, 1, 2)
    chair.says(A, 1, behind=1)
    chair.here = [A, D]
    assert chair.run(0.0, 59.0) == []
    assert chair.run(60.0, 60.0) == [lost(A)]


def test_an_older_state_does_not_count_nor_one_of_another_generation() -> None:
    chair = Chair()
    chair.says(B, 1, behind=1)
    name = stage_channel(1)
    chair.reports[name, C] = StateReport(1, name, 3, state_hash(1, 3), True, True)
    assert chair.run(0.0, 9.0) == []
    assert chair.run(10.0, 12.0) == [lost(min(B, C))]


def test_before_the_first_step_nothing_can_be_lost() -> None:
    chair = Chair(steps=0)
    chair.here = [A]
    chair.reports.clear()
    assert chair.run(0.0, 100.0) == []


def test_a_member_that_comes_back_with_the_state_becomes_the_host() -> None:
    chair = Chair()
    chair.here = [A, D]
    chair.log.assign(D, 1)
    chair.run(0.0, 30.0)
    chair.commit(31.0, lost(D))
    chair.here = [A, C, D]
    (again,) = chair.run(32.0, 40.0)
    assert again == lost(C, "a member is back with its state")
    chair.commit(41.0, again)
    assert chair.run(41.0, 100.0) == []


def test_another_host_is_named_when_one_is_gone_or_takes_for_ever() -> None:
    chair = Chair()
    chair.here = [A, D]
    chair.log.assign(D, 1)
    chair.log.assign(A, 0, 1, 2)
    first, second = sorted((A, D))
    (body,) = chair.run(0.0, 30.0)
    assert body == lost(first)
    chair.commit(31.0, body)
    chair.here = [second]
    assert chair.run(31.0, 40.0) == []
    (body,) = chair.run(41.0, 45.0)
    assert body == lost(second, "its host is gone")
    chair.commit(46.0, body)
    chair.here = [first, second]
    assert chair.run(46.0, 46.0 + 899.0) == []
    (body,) = chair.run(46.0 + 900.0, 46.0 + 901.0)
    assert body == lost(first, "its host did not finish")


def test_a_proposal_is_made_once_and_again_if_it_got_lost() -> None:
    chair = Chair()
    chair.here = [A, D]
    chair.log.assign(D, 1)
    chair.refusing = True
    assert chair.run(0.0, 30.0) == []
    chair.refusing = False
    assert chair.run(31.0, 40.0) == [lost(D)]
    assert chair.run(41.0, 44.0) == [lost(D)]


def recover(chair: Chair, now: float) -> None:
    chair.commit(now, lost(D))
    names, losses = ("copy-left", "fresh"), (2.5, 3.0)
    body = e.StageRecovered(1, 3, D, names, losses, 0, (), hash_of("rebuilt"))
    chair.commit(now, body)
    chair.says(D, 1)


def test_after_a_recovery_the_watch_begins_anew() -> None:
    chair = Chair()
    chair.here = [A, D]
    chair.log.assign(D, 1)
    chair.run(0.0, 30.0)
    recover(chair, 31.0)
    assert chair.run(31.0, 100.0) == []
    chair.here = [A, B]
    chair.log.assign(B, 1)
    chair.says(B, 1, behind=3)
    assert chair.run(101.0, 130.0) == []
    assert chair.run(131.0, 131.0) == [lost(B)]


def test_a_recovery_that_did_not_heal_is_told() -> None:
    for after, expected in ((2.9, 0), (3.1, 1)):
        chair = Chair()
        chair.here = [A, D]
        chair.log.assign(D, 1)
        chair.leader.reconcile(0.0)
        chair.run(0.0, 30.0)
        recover(chair, 31.0)
        for _ in range(GUARD_STEPS):
            chair.log.ok(chair.log.closing(A, D, loss=after))
            chair.log.ok(chair.log.outcome())
            chair.leader.reconcile(40.0)
        told = [x.event for x in chair.out if isinstance(x, Emit)]
        assert len(told) == expected
        assert all(isinstance(x, fx.Notice) and x.name == "fallback" for x in told)


def test_who_does_not_lead_does_nothing() -> None:
    chair = Chair()
    chair.here = [A, D]
    chair.log.assign(D, 1)
    chair.leader.activate(0.0, False)
    assert chair.run(0.0, 100.0) == [] and chair.leader.deadline() == math.inf
    chair.leader.activate(100.0, True)
    assert chair.run(100.0, 129.0) == []
    assert chair.run(130.0, 130.0) == [lost(D)]
