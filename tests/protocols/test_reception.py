"""What peers ask of a node about membership, by hand: who may ask, and what it leads to."""

from __future__ import annotations

import random

import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import Connect, Effect, PeerId, Send
from swarmtrain_protocols.errors import NotAuthorised
from swarmtrain_protocols.identity import Keyring
from swarmtrain_protocols.log.anchor import make_deed
from swarmtrain_protocols.manifest import RunKeys, make_manifest
from swarmtrain_protocols.membership import Joiner, Shepherd, SiteConfig
from swarmtrain_protocols.messages import member as mm
from swarmtrain_protocols.node_events import JoinFailed
from swarmtrain_protocols.orders import sign_order
from swarmtrain_protocols.reception import Reception
from swarmtrain_protocols.rounds.leader import RoundLeader
from swarmtrain_protocols.rounds.policy import RoundPolicy
from swarmtrain_protocols.testing.keyring import FakeKeyring
from swarmtrain_protocols.tickets import Capability
from tests.protocols.rounds_kit import (
    FOUNDER,
    TRAIN,
    A,
    B,
    C,
    D,
    Log,
    defined,
    events,
    faults,
    ignored,
    joined,
    of_kind,
    sent,
    take,
)

SITE = SiteConfig("a", ("127.0.0.1:1",), True, True, True, True, b"secret")


MANIFEST = make_manifest(RunKeys(), FOUNDER.peer_id, bytes(16))


def handed_over(heir: bytes, number: int = 0) -> e.FounderChanged:
    deed = make_deed(FOUNDER, MANIFEST.run_id, number, heir)
    return e.FounderChanged(heir, True, "x", deed.signature)


class Desk:
    """Peer A, which leads if ``leads``; B and C are members."""

    def __init__(self, *members: bytes, leads: bool = True, model: bool = False) -> None:
        self.log = Log(*(members or (A, B, C)), model=model)
        self.out: list[Effect] = []
        self.proposed: list[e.EntryBody] = []
        ledger = self.log.ledger

        def propose(now: float, body: e.EntryBody) -> bool:
            self.proposed.append(body)
            return True

        def check(now: float, data: bytes) -> Capability:
            raise NotAuthorised("ticket refused", "not in this test")

        self.joiner = Joiner(A, SITE, ledger, self.out)
        self.shepherd = Shepherd(
            me=A,
            ledger=ledger,
            out=self.out,
            propose=propose,
            change_voters=lambda now, voters: True,
            check_capability=check,
            linked=lambda: [B, C],
            max_rounds=0,
        )
        self.rounds = RoundLeader(
            me=A,
            rng=random.Random(1),
            ledger=ledger,
            out=self.out,
            policy=RoundPolicy(),
            propose=propose,
            connected=lambda: [B, C],
        )
        self.manifest = MANIFEST
        self.reception = Reception(
            ledger=ledger,
            manifest=self.manifest,
            out=self.out,
            joiner=self.joiner,
            shepherd=self.shepherd,
            rounds=self.rounds,
            propose=propose,
            verify=FOUNDER.verify,
        )
        self.shepherd.activate(0.0, leads)
        self.rounds.activate(0.0, leads)

    def say(self, peer: bytes, message: object) -> list[Effect]:
        self.reception.receive(1.0, PeerId(peer), message)  # type: ignore[arg-type]
        return take(self.out)

    def wants(self, peer: bytes, body: e.EntryBody) -> list[Effect]:
        return self.say(peer, mm.Propose(e.encode_body(body)))

    def orders(self, peer: bytes, body: e.EntryBody, by: Keyring = FOUNDER) -> list[Effect]:
        index = self.log.ledger.index
        return self.say(peer, sign_order(by, self.manifest.run_id, index, body))


REQUEST = mm.JoinRequest("d", (), b"", True, True, True, True)


def test_the_manifest_of_this_run_is_for_everybody() -> None:
    desk = Desk()
    wanted = mm.ManifestRequest(desk.manifest.run_id)
    assert desk.say(D, wanted) == [Send(D, mm.ManifestReply(desk.manifest.to_bytes()))]
    assert desk.say(D, mm.ManifestRequest(bytes(32))) == []


def test_whoever_does_not_lead_says_who_does() -> None:
    desk = Desk(leads=False)
    assert desk.say(D, REQUEST) == [Send(D, mm.Redirect(b"", ()))]
    desk.reception.leader = PeerId(B)
    assert desk.say(D, REQUEST) == [Send(D, mm.Redirect(B, ("127.0.0.1:1",)))]
    desk.reception.leader = PeerId(D)  # leads, and is no member any more
    assert desk.say(C, REQUEST) == [Send(C, mm.Redirect(D, ()))]


def test_the_leader_judges_requests_and_takes_those_who_return_back() -> None:
    desk = Desk()
    assert [x.code for _, x in sent(desk.say(D, REQUEST), mm.JoinRefused)] == ["not_authorised"]
    desk.say(B, mm.LeaveRequest("leave"))
    assert desk.rounds.present() == [A, C]
    desk.say(B, REQUEST)
    assert desk.rounds.present() == [A, B, C]


def test_only_members_leave_finish_and_propose_and_only_the_leader_listens() -> None:
    for desk, peer in ((Desk(), D), (Desk(leads=False), B)):
        assert desk.say(peer, mm.LeaveRequest("leave")) == []
        assert desk.say(peer, mm.Finished(0, True)) == []
        assert desk.orders(peer, e.Paused("x")) == []
        assert desk.proposed == [] and desk.shepherd._finished == {}


@pytest.mark.parametrize(
    "body", [defined(), e.CheckpointMade(TRAIN, 0, bytes(32), (A,))], ids=["model", "checkpoint"]
)
def test_members_may_propose_a_few_kinds_of_entries(body: e.EntryBody) -> None:
    desk = Desk()
    assert faults(desk.wants(A, body)) == []
    assert desk.proposed == [body]


@pytest.mark.parametrize(
    "body",
    [
        e.Paused("x"),
        e.Resumed("x"),
        e.RunEnded("x"),
        e.MemberBanned(C, "x"),
        e.TicketRevoked(bytes(8), "x"),
        e.AllowChanged(C, True),
        handed_over(C),
        e.Rewound(1, "x", (TRAIN,), (0,), (bytes(32),), True),
        e.ConfigChanged(3, "inner_steps", "7", "x"),
    ],
    ids=["pause", "resume", "end", "ban", "revoke", "allow", "found", "rewind", "config"],
)
def test_orders_are_the_founders(body: e.EntryBody) -> None:
    desk = Desk(model=True)
    assert faults(desk.orders(B, body)) == [] and desk.proposed == [body]
    assert faults(desk.wants(B, body)) == [("not_the_founder", B)], "unsigned"
    assert faults(desk.orders(B, body, by=FakeKeyring("b"))) == [("not_the_founder", B)]
    assert desk.proposed == [body]


def test_a_run_is_not_handed_over_without_a_deed() -> None:
    """Those who do not know the log would not believe the heir."""
    desk = Desk(model=True)
    for body in (e.FounderChanged(C, True, "x", bytes(64)), handed_over(C, 1)):
        assert faults(desk.orders(B, body)) == [] and desk.proposed == []
    assert desk.log.add(handed_over(FOUNDER.peer_id)) is False  # it is the founder's already


def test_a_steward_is_turned_out_once_it_votes_no_more() -> None:
    desk = Desk()
    desk.log.add(e.StewardsChanged((B,)))
    for body in (e.MemberBanned(B, "x"), e.MemberLeft(B, "evicted: x")):
        assert faults(desk.orders(C, body)) == []
        assert desk.log.ledger.voters == (B,) and desk.proposed == []
        desk.log.add(e.StewardsChanged((A,)))
        desk.shepherd.step(2.0)
        assert desk.proposed == [body]
        desk.proposed.clear()
        desk.log.add(e.StewardsChanged((B,)))


def test_eviction_is_an_order_with_its_own_reason() -> None:
    """Bad input: a founder's order that looks like a leave, or names nobody."""
    desk = Desk()
    assert faults(desk.orders(B, e.MemberLeft(C, "evicted: noisy"))) == []
    assert desk.proposed == [e.MemberLeft(C, "evicted: noisy")]
    for body in (e.MemberLeft(C, "lost"), e.MemberLeft(bytes(32), "evicted: who")):
        assert [code for code, _ in ignored(desk.orders(B, body))] == ["order is out of date"]
    assert faults(desk.wants(B, e.MemberLeft(C, "evicted: by me"))) == [("not_the_founder", B)]


def test_anything_else_is_a_fault_of_whoever_asks() -> None:
    """Bad input: entries that only the leader may write, a damaged one, models that cannot be."""
    desk = Desk()
    others = [
        e.NoOp(),
        e.StewardsChanged((B,)),
        desk.log.open([A], channel="group/x"),
    ]
    for body in others:
        assert faults(desk.wants(B, body)) == [("may_not_propose", B)], body
    assert faults(desk.say(B, mm.Propose(b"\xc1"))) == [("malformed", B)]
    assert faults(desk.wants(B, defined())) == [("bad_model", B)], "A is said to be its author"
    assert faults(desk.wants(A, defined(values=0))) == [("bad_model", A)]
    twice = (e.ChannelLayout(TRAIN, 1),) * 2
    bad = e.ModelDefined(bytes(32), twice, (bytes(32),) * 2, B)
    assert faults(desk.wants(B, bad)) == [("bad_model", B)]
    assert desk.proposed == []


def test_a_second_model_is_not_proposed() -> None:
    desk = Desk(model=True)
    assert desk.wants(A, defined()) == [] and desk.proposed == []


def test_only_whom_this_node_asked_may_turn_it_away_or_send_it_on() -> None:
    desk = Desk(B, C, leads=False)
    refused = mm.JoinRefused("banned", "go away")
    told = desk.say(C, refused)
    assert (ignored(told), faults(told)) == ([("unexpected", C)], [])
    assert desk.say(C, mm.Redirect(D, ("10.0.0.1:1",))) == []
    desk.joiner.step(1.0, [PeerId(C)])
    assert sent(take(desk.out), mm.JoinRequest) != []
    assert of_kind(desk.say(C, mm.Redirect(D, ("10.0.0.1:1",))), Connect) != []
    assert events(desk.say(C, refused), JoinFailed) == [JoinFailed("banned", "go away")]
    assert desk.joiner.refused == "banned"
    assert desk.say(C, refused) == [], "once is enough"


def test_a_member_is_not_turned_away() -> None:
    desk = Desk(B, C, leads=False)
    desk.joiner.step(1.0, [PeerId(C)])
    take(desk.out)
    desk.log.add(joined(A, name="a"))
    told = desk.say(C, mm.JoinRefused("banned", "late"))
    assert (ignored(told), faults(told)) == ([("unexpected", C)], [])
    assert desk.joiner.refused == ""
