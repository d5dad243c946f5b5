"""Following the leader: who is told what, when duties begin, and what came too early."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from swarmtrain_protocols.core import Connect, Effect, PeerId, Send
from swarmtrain_protocols.leadership import EARLY_MESSAGES_MAX, Leadership
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.log.core import LogCore
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.messages import member as mm
from swarmtrain_protocols.messages import pipeline as pm
from swarmtrain_protocols.messages import rounds as rm

ME = PeerId(b"m" * 32)
OTHER = PeerId(b"o" * 32)
EARLY = rm.Withdraw(0, "train/0/0", bytes(32))


@dataclass
class Log:
    """What ``Leadership`` looks at."""

    leader: PeerId | None = None
    term: int = 0
    is_leader: bool = False
    ready: bool = False


@dataclass
class Rig:
    log: Log = field(default_factory=Log)
    told: list[object] = field(default_factory=list)
    out: list[Effect] = field(default_factory=list)
    linked: dict[PeerId, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.it = Leadership(
            me=ME,
            ledger=Ledger(),
            log=cast(LogCore, self.log),
            out=self.out,
            linked=self.linked,
            changed=lambda now, leader: self.told.append(("changed", leader)),
            announce=lambda now: self.told.append("announced"),
            duties=(cast(Any, self),),
            dispatch=self.dispatched,
        )
        self.it.follow(0.0)
        self.told.clear()

    def activate(self, now: float, active: bool) -> None:
        self.told.append(("active", active))

    def dispatched(self, now: float, peer: PeerId, message: Message) -> None:
        self.told.append((peer, message))

    def lead(self, *, ready: bool) -> None:
        self.log.leader, self.log.is_leader, self.log.ready = ME, True, ready
        self.it.follow(1.0)


def test_every_leader_and_every_term_is_told_everything() -> None:
    rig = Rig()
    rig.log.leader, rig.log.term = OTHER, 3
    rig.it.follow(1.0)
    assert rig.told == [("changed", OTHER), "announced"]
    assert rig.out == [Connect(OTHER)]
    rig.linked[OTHER] = None
    rig.it.follow(2.0)
    assert len(rig.told) == 2
    rig.log.term = 4
    rig.it.follow(3.0)
    assert rig.told[2:] == [("changed", OTHER), "announced"]
    assert rig.out == [Connect(OTHER)]


def test_duties_begin_when_the_log_is_ready_and_then_come_the_early_messages() -> None:
    rig = Rig()
    rig.lead(ready=False)
    assert rig.told == [("changed", ME)]
    assert rig.it.too_early(OTHER, EARLY)
    rig.lead(ready=True)
    assert rig.told[1:] == [("active", True), "announced", (OTHER, EARLY)]
    assert not rig.it.too_early(OTHER, EARLY)
    rig.log.leader, rig.log.is_leader = OTHER, False
    rig.it.follow(2.0)
    assert ("active", False) in rig.told and not rig.it.leading


def test_only_messages_for_the_leader_wait_and_only_where_one_is_about_to_lead() -> None:
    rig = Rig()
    assert not rig.it.too_early(OTHER, EARLY)
    rig.lead(ready=False)
    assert not rig.it.too_early(OTHER, mm.LeaveRequest("bye"))
    assert rig.it.too_early(OTHER, pm.LeaseRequest(0, 0, 4))
    rig.log.is_leader = False  # it was not elected after all
    rig.log.leader = None
    rig.it.follow(2.0)
    rig.lead(ready=True)
    assert (OTHER, pm.LeaseRequest(0, 0, 4)) not in rig.told


def test_early_messages_are_bounded() -> None:
    rig = Rig()
    rig.lead(ready=False)
    for number in range(EARLY_MESSAGES_MAX + 7):
        rig.it.too_early(OTHER, pm.LeaseRequest(0, number, 0))
    rig.lead(ready=True)
    waited = [t for t in rig.told if isinstance(t, tuple) and isinstance(t[1], pm.LeaseRequest)]
    assert len(waited) == EARLY_MESSAGES_MAX
    assert waited[0] == (OTHER, pm.LeaseRequest(0, 7, 0))


def test_a_finished_trainer_is_said_again_to_every_leader() -> None:
    rig = Rig()
    rig.it.finished = True
    rig.log.leader = OTHER
    rig.it.follow(1.0)
    assert Send(OTHER, mm.Finished(0, True)) in rig.out
    rig.out.clear()
    rig.it.finished = False
    rig.it.announce(2.0)
    assert rig.out == []
    rig.it.say_finished()
    assert rig.out == [Send(OTHER, mm.Finished(0, False))]
