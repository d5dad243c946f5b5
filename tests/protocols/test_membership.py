"""Joining, staying and leaving: the joiner's requests and the shepherd's duties, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Connect, Effect, PeerId
from swarmtrain_protocols.errors import NotAuthorised
from swarmtrain_protocols.membership import (
    JOIN_RETRY_S,
    LOST_AFTER_S,
    Joiner,
    Shepherd,
    SiteConfig,
)
from swarmtrain_protocols.messages import member as mm
from swarmtrain_protocols.testing.keyring import FakeKeyring
from swarmtrain_protocols.tickets import Capability, parse_capability, sign_capability
from tests.protocols.rounds_kit import (
    FOUNDER,
    RUN,
    TRAIN,
    A,
    B,
    C,
    D,
    E,
    Log,
    hash_of,
    joined,
    of_kind,
    opening,
    sent,
    take,
)

WALL_S = 1000.0


def site(**changes: Any) -> SiteConfig:
    fields: dict[str, Any] = {
        "name": "b",
        "addresses": ("127.0.0.1:1",),
        "trains": True,
        "holds_state": True,
        "votes": True,
        "reachable": True,
        "capability": b"secret",
    }
    return SiteConfig(**{**fields, **changes})


class Door:
    """Peer B wants in."""

    def __init__(self, *members: bytes) -> None:
        self.log = Log(*members, model=False)
        self.out: list[Effect] = []
        self.joiner = Joiner(B, site(), self.log.ledger, self.out)

    def step(self, now: float, *linked: PeerId) -> list[Effect]:
        self.joiner.step(now, list(linked))
        return take(self.out)


def asked(effects: list[Effect]) -> list[PeerId]:
    return [to for to, _ in sent(effects, mm.JoinRequest)]


# --- the joiner ----------------------------------------------------------------------------------


def test_the_leader_is_asked_if_it_is_known_and_linked() -> None:
    door = Door(A)
    door.joiner.leader_changed(0.0, A)
    ((to, request),) = sent(door.step(0.0, C, A), mm.JoinRequest)
    assert to == A
    expected = mm.JoinRequest("b", ("127.0.0.1:1",), b"secret", True, True, True, True)
    assert request == expected


def test_without_a_leader_everybody_is_asked_in_turn() -> None:
    """GF4: whoever was asked first may know as little as this node."""
    door = Door(A)
    found = [asked(door.step(now * JOIN_RETRY_S, A, C, D)) for now in range(6)]
    assert {x for (x,) in found} == {A, C, D}
    door.joiner.leader_changed(10.0, E)
    effects = door.step(10.0, A, C)
    assert of_kind(effects, Connect) == [Connect(E)]
    assert len(asked(effects)) == 1


def test_requests_are_paced_and_their_deadline_does_not_stay_in_the_past() -> None:
    door = Door(A)
    assert asked(door.step(5.0)) == []  # nobody to ask
    assert door.joiner.deadline() == 5.0 + JOIN_RETRY_S
    door.joiner.linked(5.2)
    assert door.joiner.deadline() == 5.2
    assert asked(door.step(5.2, A)) == [A]
    assert asked(door.step(5.3, A)) == []
    assert door.joiner.deadline() == 5.2 + JOIN_RETRY_S


def test_a_redirect_leads_to_the_leader_and_an_empty_one_elsewhere() -> None:
    door = Door(A)
    door.joiner.redirected(0.0, mm.Redirect(D, ("10.0.0.4:4",)))
    assert take(door.out) == [Connect(D, ("10.0.0.4:4",))]
    assert asked(door.step(1.0, A, D)) == [D]
    door.joiner.redirected(1.1, mm.Redirect(b"", ()))
    assert asked(door.step(2.0, A)) == [A]
    door.joiner.redirected(2.1, mm.Redirect(b"short", ("10.0.0.4:4",)))
    door.joiner.redirected(2.1, mm.Redirect(B, ("10.0.0.4:4",)))  # to itself
    assert take(door.out) == []


def test_it_goes_on_until_the_ledger_says_what_it_wants() -> None:
    door = Door(A)
    door.log.add(joined(B, name="b", trains=False))
    assert not door.joiner.satisfied()
    assert asked(door.step(1.0, A)) == [A]
    assert door.joiner.asked(A) and not door.joiner.asked(C)
    door.log.add(joined(B, name="b"))
    assert door.joiner.satisfied() and door.joiner.is_member
    assert door.step(9.0, A) == [] and door.joiner.deadline() == math.inf
    assert not door.joiner.asked(A), "whoever answers now was not asked"


def test_a_refused_node_asks_no_more() -> None:
    door = Door(A)
    door.joiner.refused = "banned"
    assert door.step(1.0, A) == [] and door.joiner.deadline() == math.inf


def test_a_leave_is_repeated_until_the_ledger_knows() -> None:
    door = Door(A)
    door.log.add(joined(B, name="b"))
    door.joiner.leader_changed(0.0, A)
    door.joiner.leave(1.0, "done")
    assert sent(door.step(1.0, A), mm.LeaveRequest) == [(A, mm.LeaveRequest("done"))]
    assert sent(door.step(1.0 + JOIN_RETRY_S, A), mm.LeaveRequest) != []
    door.log.add(e.MemberLeft(B, "done"))
    assert door.step(9.0, A) == [] and door.joiner.satisfied()


# --- the shepherd --------------------------------------------------------------------------------


class Fold:
    """Peer A leads; proposals and changes of voters are kept."""

    def __init__(self, *members: bytes, max_rounds: int = 0, model: bool = False) -> None:
        self.log = Log(*members, model=model)
        self.out: list[Effect] = []
        self.links = [PeerId(x) for x in members if x != A]
        self.proposed: list[e.EntryBody] = []
        self.voters: list[tuple[bytes, ...]] = []
        self.refusing = False
        self.shepherd = Shepherd(
            me=A,
            ledger=self.log.ledger,
            out=self.out,
            propose=self.propose,
            change_voters=self.change_voters,
            check_capability=self.check,
            linked=lambda: self.links,
            max_rounds=max_rounds,
        )
        self.shepherd.activate(0.0, True)

    def propose(self, now: float, body: e.EntryBody) -> bool:
        if not self.refusing:
            self.proposed.append(body)
        return not self.refusing

    def change_voters(self, now: float, voters: tuple[PeerId, ...]) -> bool:
        if not self.refusing:
            self.voters.append(voters)
        return not self.refusing

    def check(self, now: float, data: bytes) -> Capability:
        return parse_capability(
            data, founder=FOUNDER.peer_id, run=RUN, wall_s=WALL_S + now, verify=FOUNDER.verify
        )

    def join(self, now: float, peer: bytes, capability: bytes = b"", **changes: Any) -> None:
        request = Joiner(PeerId(peer), site(capability=capability, **changes), self.log.ledger, [])
        self.shepherd.join(now, PeerId(peer), request.request())

    def commit(self) -> list[e.EntryBody]:
        bodies, self.proposed = self.proposed, []
        for body in bodies:
            self.log.add(body)
        return bodies

    def refusals(self) -> list[tuple[bytes, str, str]]:
        return [(to, x.code, x.reason) for to, x in sent(take(self.out), mm.JoinRefused)]


def grant(signer: Any = FOUNDER, **changes: Any) -> bytes:
    fields: dict[str, Any] = {"id": b"ticket-1", "run": RUN, "vote": True}
    return sign_capability(signer, Capability(**{**fields, **changes}))


def test_a_bearer_of_a_ticket_is_admitted_with_what_it_grants() -> None:
    fold = Fold(A)
    fold.join(1.0, B, grant())
    fold.join(1.1, C, grant(vote=False))
    fold.join(1.2, D, grant(), votes=False)
    bodies = fold.commit()
    assert [(x.member, x.may_vote, x.ticket) for x in bodies if isinstance(x, e.MemberJoined)] == [
        (B, True, b"ticket-1"),
        (C, False, b"ticket-1"),
        (D, False, b"ticket-1"),
    ]
    assert sorted(fold.log.ledger.members) == sorted((A, B, C, D))


def test_the_first_steward_needs_no_ticket() -> None:
    fold = Fold()
    fold.join(0.0, A)
    (body,) = fold.commit()
    assert isinstance(body, e.MemberJoined) and body.may_vote


@pytest.mark.parametrize(
    ("capability", "why"),
    [
        (b"", "malformed"),
        (b"garbage", "malformed"),
        (grant(expires_s=900), "expired"),
        (grant(run=bytes(32)), "wrong run"),
    ],
)
def test_bad_tickets_are_refused_by_name_and_nothing_is_logged(capability: bytes, why: str) -> None:
    """Bad input: malformed, expired, for another run."""
    fold = Fold(A)
    fold.join(1.0, B, capability)
    ((to, code, reason),) = fold.refusals()
    assert (to, code) == (B, "expired" if why == "expired" else "not_authorised")
    assert why in reason
    assert fold.proposed == []


def test_a_ticket_that_the_founder_did_not_sign_is_refused() -> None:
    fold = Fold(A)
    fold.join(1.0, B, grant(FakeKeyring("impostor")))
    ((_, code, reason),) = fold.refusals()
    assert code == "not_authorised" and "bad signature" in reason
    with pytest.raises(NotAuthorised):
        fold.check(0.0, grant(FakeKeyring("impostor")))


def test_a_banned_peer_is_refused_whatever_it_brings() -> None:
    fold = Fold(A, B)
    fold.log.add(e.MemberBanned(B, "lied"))
    fold.join(1.0, B, grant())
    assert fold.refusals() == [(B, "banned", "lied")]
    assert fold.proposed == []


def test_a_ticket_of_limited_uses_is_refused_when_it_is_used_up() -> None:
    fold = Fold(A)
    for peer in (B, C):
        fold.join(1.0, peer, grant(uses=1))
    fold.commit()
    assert sorted(fold.log.ledger.members) == sorted((A, B)), "the ledger counts, not the leader"
    fold.join(2.0, C, grant(uses=1))
    assert fold.refusals() == [(C, "used_up", "the ticket was for 1 member(s), and they have come")]
    fold.join(2.0, B, grant(uses=1), name="renamed")
    assert [x.member for x in fold.proposed if isinstance(x, e.MemberJoined)] == [B]


def test_a_full_run_refuses_newcomers() -> None:
    fold = Fold(A)
    for number in range(limits.MEMBERS_MAX - 1):
        fold.log.add(joined(number.to_bytes(32, "big")))
    fold.join(1.0, B, grant())
    assert [code for _, code, _ in fold.refusals()] == ["full"]
    assert fold.proposed == []


def test_a_member_whose_ticket_has_expired_may_change_its_name() -> None:
    fold = Fold(A, B)
    fold.join(1.0, B, grant(expires_s=900), name="new")
    (body,) = fold.commit()
    assert isinstance(body, e.MemberJoined) and (body.name, body.may_vote) == ("new", True)


def test_one_request_makes_one_entry_however_often_it_is_repeated() -> None:
    fold = Fold(A)
    for _ in range(5):
        fold.join(1.0, B, grant())
    assert len(fold.proposed) == 1
    fold.shepherd.step(1.5)
    fold.join(1.6, B, grant())
    assert len([x for x in fold.proposed if isinstance(x, e.MemberJoined)]) == 1


def test_a_silent_member_is_dialled_and_in_the_end_lost() -> None:
    fold = Fold(A, B)
    fold.links.clear()
    fold.shepherd.step(10.0)
    assert of_kind(take(fold.out), Connect) == [Connect(B)]
    assert fold.shepherd.deadline() == 10.0 + LOST_AFTER_S
    fold.shepherd.step(10.0 + LOST_AFTER_S - 0.1)
    assert fold.proposed == []
    fold.shepherd.step(10.0 + LOST_AFTER_S)
    assert fold.commit() == [e.MemberLeft(B, "lost")]
    fold.shepherd.step(100.0)
    assert fold.proposed == [] and fold.shepherd.deadline() == math.inf


def test_a_member_that_is_back_in_time_stays() -> None:
    fold = Fold(A, B)
    fold.links.clear()
    fold.shepherd.step(10.0)
    fold.links.append(B)
    fold.shepherd.step(20.0)
    fold.links.clear()
    fold.shepherd.step(30.0)
    fold.shepherd.step(10.0 + LOST_AFTER_S + 1)
    assert fold.proposed == []


def test_a_leave_waits_for_open_attempts_of_every_kind() -> None:
    fold = Fold(A, B, C, D, model=True)
    opened = opening(fold.log.ledger, [A, B], owners=(A, C), holders=[A, D])
    fold.log.add(opened)
    for peer in (B, C, D):
        fold.shepherd.leave(1.0, peer, "leave")
    assert fold.proposed == []
    fold.log.add(e.RoundAborted(opened.key, "x"))
    fold.refusing = True
    fold.shepherd.step(2.0)
    fold.refusing = False
    fold.shepherd.step(2.1)
    assert fold.commit() == [e.MemberLeft(x, "leave") for x in (B, C, D)]


def test_a_steward_hands_over_before_it_leaves() -> None:
    fold = Fold(A, B)
    fold.shepherd.leave(1.0, A, "leave")
    assert fold.proposed == []
    assert fold.voters == [(B,)]
    fold.log.add(e.StewardsChanged((B,)))
    fold.shepherd.step(2.0)
    assert fold.proposed == [e.MemberLeft(A, "leave")]


def test_the_last_member_may_leave_too() -> None:
    fold = Fold(A)
    fold.shepherd.leave(1.0, A, "leave")
    assert fold.proposed == [e.MemberLeft(A, "leave")]


def test_there_is_one_steward_or_three_never_two() -> None:
    fold = Fold(A)
    fold.log.add(joined(B))
    fold.links.append(B)
    fold.shepherd.step(1.0)
    assert fold.voters == []
    fold.log.add(joined(C, may_vote=False))
    fold.links.append(C)
    fold.shepherd.step(2.0)
    assert fold.voters == []
    fold.log.add(joined(D))
    fold.links.append(D)
    fold.shepherd.step(3.0)
    assert fold.voters == [tuple(sorted((A, B, D)))]
    fold.shepherd.step(4.0)
    assert len(fold.voters) == 1, "asked once"
    fold.log.add(e.StewardsChanged(fold.voters[0]))
    fold.log.add(joined(E))
    fold.links.append(E)
    fold.shepherd.step(5.0)
    assert len(fold.voters) == 1, "three are enough"
    fold.log.add(e.MemberLeft(D, "lost"))
    fold.links.remove(D)
    fold.shepherd.step(6.0)
    assert fold.voters[-1] == tuple(sorted((A, B, E)))


def test_a_refused_change_of_stewards_is_asked_for_again() -> None:
    fold = Fold(A, B, C)
    fold.refusing = True
    fold.shepherd.step(1.0)
    fold.refusing = False
    fold.shepherd.step(2.0)
    assert fold.voters == [tuple(sorted((A, B, C)))]


def test_who_cannot_be_dialled_does_not_vote() -> None:
    fold = Fold(A, B)
    fold.log.add(joined(C, reachable=False))
    fold.links.append(C)
    fold.shepherd.step(1.0)
    assert fold.voters == []


def test_the_run_ends_after_its_rounds_or_when_all_trainers_have_finished() -> None:
    fold = Fold(A, B, model=True, max_rounds=1)
    fold.shepherd.step(1.0)
    assert fold.proposed == []
    opened = fold.log.open([A])
    fold.log.choose(opened)
    fold.shepherd.step(1.5)
    assert fold.proposed == []
    fold.log.commit(opened, hash_of("result"))
    fold.refusing = True
    fold.shepherd.step(2.0)
    fold.refusing = False
    fold.shepherd.step(2.1)
    fold.shepherd.step(2.2)
    assert fold.commit() == [e.RunEnded("max_rounds")]
    fold.shepherd.step(3.0)
    assert fold.proposed == []

    fold = Fold(A, B, model=True)
    fold.log.add(joined(C, trains=False))
    fold.shepherd.finished(1.0, A, True)
    assert fold.proposed == []
    fold.shepherd.finished(1.0, B, True)
    assert fold.proposed == [e.RunEnded("all trainers finished")]
    assert fold.log.ledger.channels[TRAIN].round == 0


def test_a_trainer_that_takes_up_work_again_is_waited_for() -> None:
    fold = Fold(A, B, model=True)
    fold.shepherd.finished(1.0, A, True)
    fold.shepherd.finished(1.0, A, False)
    fold.shepherd.finished(1.0, B, True)
    assert fold.proposed == []


def test_what_is_remembered_about_members_goes_with_them() -> None:
    fold = Fold(A)
    for number in range(200):
        peer = PeerId(number.to_bytes(32, "big"))
        fold.join(1.0, peer, grant())
        fold.commit()
        fold.shepherd.finished(1.0, peer, True)
        fold.log.add(e.MemberLeft(peer, "leave"))
        fold.shepherd.step(2.0)
    assert len(fold.shepherd._asked_index) <= 1 and fold.shepherd._finished == {}
    assert fold.shepherd._missing == {} and fold.shepherd._leaving == {}


def test_duties_end_with_leadership() -> None:
    fold = Fold(A, B)
    fold.links.clear()
    fold.shepherd.step(1.0)
    fold.shepherd.activate(2.0, False)
    fold.shepherd.step(1e6)
    assert fold.proposed == [] and fold.shepherd.deadline() == math.inf
