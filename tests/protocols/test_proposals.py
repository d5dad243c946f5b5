"""Proposals of cores: taken, not taken, and refused with an event."""

from __future__ import annotations

from typing import cast

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import Effect, Emit, PeerId
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.log.core import LogCore
from swarmtrain_protocols.proposals import Proposals
from swarmtrain_protocols.rounds.effects import Notice

BODY = e.Paused("tea")


class Log:
    def __init__(self) -> None:
        self.is_leader = True
        self.refuses = False
        self.taken: list[object] = []

    def propose(self, now: float, body: e.EntryBody) -> None:
        self._take(body)

    def change_voters(self, now: float, voters: tuple[PeerId, ...]) -> None:
        self._take(voters)

    def _take(self, what: object) -> None:
        if self.refuses:
            raise LocalProtocolError("not now", "no majority")
        self.taken.append(what)


def rig() -> tuple[Proposals, Log, list[Effect]]:
    out: list[Effect] = []
    made, log = Proposals(out), Log()
    made.log = cast(LogCore, log)
    return made, log, out


def test_nothing_is_taken_before_there_is_a_log_or_by_one_that_does_not_lead() -> None:
    early: list[Effect] = []
    assert not Proposals(early).propose(0.0, BODY)
    assert not Proposals(early).change_voters(0.0, ())
    made, log, out = rig()
    log.is_leader = False
    assert not made.propose(0.0, BODY)
    assert (log.taken, out, early) == ([], [], [])


def test_what_the_log_takes_is_appended_once() -> None:
    made, log, out = rig()
    voters = (PeerId(b"v" * 32),)
    assert made.propose(0.0, BODY) and made.change_voters(0.0, voters)
    assert log.taken == [BODY, voters] and out == []


def test_a_refusal_is_an_event() -> None:
    made, log, out = rig()
    log.refuses = True
    assert not made.propose(0.0, BODY)
    assert not made.change_voters(0.0, ())
    events = [effect.event for effect in out if isinstance(effect, Emit)]
    assert [event.fields["what"] for event in events if isinstance(event, Notice)] == [
        "proposal",
        "change of stewards",
    ]
