"""Owners of parts that are silent or lie: what the leader does, and what it costs the others."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from swarmtrain_protocols import dataplane
from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.messages import rounds as m
from swarmtrain_protocols.rounds import leader
from swarmtrain_protocols.rounds.attempt import PART_DOMAIN, part_statement
from swarmtrain_protocols.rounds.owners import SILENT_ALONE_S, SILENT_S_MIN, TIMES_SLOWER
from swarmtrain_protocols.rounds.policy import RoundPolicy
from swarmtrain_protocols.suspension import is_suspended
from swarmtrain_protocols.testing.keyring import FakeKeyring
from tests.protocols.leader_kit import Chair, held
from tests.protocols.rounds_kit import (
    CHUNK,
    GROUP,
    IDS,
    RINGS,
    TRAIN,
    VALUES,
    A,
    B,
    C,
    D,
    Net,
    faults,
    full,
    hash_of,
    sent,
)

PATIENT = RoundPolicy("fp32", "fp32", grace_s=1.0, chunk_values=CHUNK)
"""Attempts may take forty seconds."""
RING = dict(zip(IDS, RINGS, strict=True))


def chair_of(*members: bytes) -> Chair:
    chair = Chair(*members, policy=PATIENT)
    chair.leader._owners._verify = FakeKeyring("anybody").verify
    return chair


def owned(opened: e.RoundOpened, owner: bytes) -> list[int]:
    return [i for i, part in enumerate(opened.parts) if part.owner == owner]


def deliver(chair: Chair, opened: e.RoundOpened, *but: bytes, now: float = 1.1) -> None:
    everybody = tuple(range(len(opened.contributors)))
    for index, part in enumerate(opened.parts):
        if part.owner not in but:
            chair.say(now, part.owner, held(opened.key, index, everybody))


def suspensions(bodies: list[e.EntryBody]) -> list[tuple[bytes, str]]:
    return [(b.member, b.reason) for b in bodies if isinstance(b, e.MemberSuspended)]


# --- silence -------------------------------------------------------------------------------------


def test_an_owner_that_says_nothing_is_replaced_when_others_have_long_spoken() -> None:
    chair = chair_of(A, B, C)
    opened = chair.open(A, B, C)
    deliver(chair, opened, C, now=1.5)
    assert chair.leader.deadline() == pytest.approx(1.0 + SILENT_S_MIN)
    chair.leader.step(1.0 + SILENT_S_MIN - 0.01)
    assert chair.proposed == []
    chair.leader.step(1.0 + SILENT_S_MIN)
    told = {(x.part, x.deputy) for _, x in sent(chair.take(), m.TakeOver)}
    assert told == {(i, opened.parts[i].deputy) for i in owned(opened, C)}
    assert suspensions(chair.commit(6.1)) == [(C, f"silent as an owner in {opened.key}")]
    for part, deputy in sorted(told):
        chair.say(6.2, deputy, held(opened.key, part, (0, 1, 2)))
    (chosen,) = chair.commit(6.2)
    assert isinstance(chosen, e.RoundSet), "the attempt itself goes on"


def test_the_measure_is_what_others_take() -> None:
    chair = chair_of(A, B, C)
    opened = chair.open(A, B, C)
    deliver(chair, opened, C, now=4.0)
    assert chair.leader.deadline() == pytest.approx(1.0 + TIMES_SLOWER * 3.0)
    chair.leader.step(12.9)
    assert chair.proposed == []


def test_alone_an_owner_has_longer_and_the_leader_suspects_itself_of_nothing() -> None:
    chair = chair_of(A, B, C)
    chair.open(A, B, C)
    assert chair.leader.deadline() == pytest.approx(1.0 + SILENT_ALONE_S)
    chair.leader.step(1.0 + SILENT_ALONE_S)
    assert {member for member, _ in suspensions(chair.proposed)} == {B, C}


def test_an_owner_that_lacks_what_others_have_is_replaced() -> None:
    chair = chair_of(A, B, C)
    opened = chair.open(A, B, C)
    deliver(chair, opened, C)
    for index in owned(opened, C):
        chair.say(1.1, C, held(opened.key, index, (2,)))
    chair.leader.step(1.0 + SILENT_ALONE_S - 0.01)
    assert chair.proposed == []
    chair.leader.step(1.0 + SILENT_ALONE_S)
    assert suspensions(chair.proposed) == [(C, f"stalled as an owner in {opened.key}")]


def test_a_contributor_that_is_slow_is_not_its_owners_fault() -> None:
    chair = chair_of(A, B, C)
    opened = chair.open(A, B, C)
    for index, part in enumerate(opened.parts):  # nobody has what C should send
        chair.say(1.1, part.owner, held(opened.key, index, (0, 1)))
    chair.leader.step(39.0)
    assert chair.proposed == [] and chair.leader.deadline() == pytest.approx(41.0, abs=0.01)


def one_of_four_lacks_a_result() -> tuple[Chair, e.RoundOpened, int, float]:
    """A has no result of a part of C's; when others will be heard."""
    chair = chair_of(A, B, C, D)
    opened = chair.open(A, B, C, D)
    deliver(chair, opened)
    chair.commit(1.1)
    (index, *_) = owned(opened, C)
    by = 1.1 + SILENT_S_MIN
    chair.say(2.0, A, m.Complaint(opened.key, (index,)))
    return chair, opened, index, by


def test_no_result_in_time_is_what_most_receivers_say() -> None:
    chair, opened, index, by = one_of_four_lacks_a_result()
    chair.leader.step(by)
    assert chair.proposed == [], "one says so"
    chair.say(by, D, m.Complaint(opened.key, (index,)))
    assert suspensions(chair.commit(by)) == [(C, f"no result as an owner in {opened.key}")]
    chair.leader.step(by + 0.1)
    assert {x.deputy for _, x in sent(chair.take(), m.TakeOver)} == {opened.parts[index].deputy}


def test_receivers_that_are_gone_are_not_asked_whether_they_lack_a_result() -> None:
    chair, opened, _, by = one_of_four_lacks_a_result()
    chair.gone(2.5, B)
    chair.leader.step(by)
    assert suspensions(chair.proposed) == [], "one of two says so"
    chair.gone(by, D)
    assert suspensions(chair.proposed) == [(C, f"no result as an owner in {opened.key}")]


# --- lies ----------------------------------------------------------------------------------------


def bad(opened: e.RoundOpened, part: int, signer: bytes) -> m.PartResult:
    root, run = hash_of("not a number"), b"r" * 32
    signature = RING[PeerId(signer)].sign(PART_DOMAIN, part_statement(run, opened.key, part, root))
    return m.PartResult(opened.key, part, root, signer, signature)


def test_a_result_that_is_not_legal_ends_the_attempt_at_once_and_suspends_its_signer() -> None:
    chair = chair_of(A, B, C)
    opened = chair.open(A, B, C)
    deliver(chair, opened)
    chair.commit(1.1)
    part = owned(opened, C)[0]
    chair.say(1.3, B, m.Complaint(opened.key, (part,), (bad(opened, part, C),)))
    assert chair.proposed == [], "one of two others says so, and it is not the leader"
    chair.say(1.4, A, m.Complaint(opened.key, (part,), (bad(opened, part, C),)))
    suspended, aborted = chair.commit(1.4)
    assert suspended == e.MemberSuspended(C, f"part {part} of {opened.key} is no legal result")
    assert isinstance(aborted, e.RoundAborted)
    for peer in (A, B, C):
        chair.ready(2.0, peer)
    (again,) = chair.commit(2.0)
    assert isinstance(again, e.RoundOpened)
    assert [c.member for c in again.contributors] == [A, B]
    assert C not in {p.owner for p in again.parts} | {p.deputy for p in again.parts}


def not_appointed(opened: e.RoundOpened) -> bytes:
    """Who has nothing to do with part 0."""
    part = opened.parts[0]
    return next(k for k in (A, B, C) if k not in (part.owner, part.deputy))


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (lambda o: m.Complaint(o.key, (), (bad(o, 0, not_appointed(o)),)), ""),
        (
            lambda o: m.Complaint(
                o.key, (0,), (m.PartResult(o.key, 0, bytes(32), o.parts[0].owner, bytes(64)),)
            ),
            "bad_signature",
        ),
        (
            lambda o: m.Complaint(
                o.key, (0,), (m.PartResult(o.key, 99, bytes(32), o.parts[0].owner, bytes(64)),)
            ),
            "bad_part",
        ),
        (lambda o: m.Complaint(o.key, (99,)), ""),
    ],
)
def test_complaints_that_prove_nothing_change_nothing(said: object, code: str) -> None:
    """Bad input: nobody can be accused of what it has not signed."""
    chair = chair_of(A, B, C)
    opened = chair.open(A, B, C)
    deliver(chair, opened)
    chair.commit(1.1)
    chair.take()
    chair.say(1.2, A, said(opened))  # type: ignore[operator]
    assert faults(chair.take()) == ([(code, A)] if code else [])
    assert suspensions(chair.proposed) == []


def test_a_stranger_to_the_attempt_complains_in_vain() -> None:
    chair = chair_of(A, B, C)
    opened = chair.open(A, B, C)
    deliver(chair, opened)
    chair.commit(1.1)
    chair.take()
    chair.say(1.2, b"x" * 32, m.Complaint(opened.key, (0,)))
    assert faults(chair.take()) == [("not_a_receiver", b"x" * 32)]


# --- whole nodes ---------------------------------------------------------------------------------


def only_owner(patch: pytest.MonkeyPatch, index: int) -> None:
    """Peer ``index`` owns all parts as long as it may own any."""
    plan = leader.plan_parts

    def unfair(values: int, owners: list[bytes], *others: Any) -> tuple[e.Part, ...]:
        chosen = [IDS[index]] if IDS[index] in owners else owners
        spare = next((k for k in owners if k != IDS[index]), IDS[index])
        parts = plan(values, chosen, *others)
        return tuple(e.Part(p.first, p.count, p.owner, spare) for p in parts)

    patch.setattr(leader, "plan_parts", unfair)


def test_the_only_owner_whose_own_values_are_not_numbers_costs_one_attempt_and_is_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody else sees its values before they are in the sum."""
    net = Net(4)
    net.model()
    chief = net.leader()
    index = next(i for i in range(4) if net[i] is not chief)
    only_owner(monkeypatch, index)
    monkeypatch.setattr(dataplane, "check_finite", lambda x: None)
    monkeypatch.setattr(dataplane, "square_of", lambda *args: 4.0)  # or it would notice itself
    nan = np.full(VALUES, np.nan, np.float32)
    for i in range(4):
        net.contribute(i, nan if i == index else full(1.0))
    began, channel = net.now, chief.node.ledger.channels[TRAIN]
    while not channel.aborted:
        net.run(0.5)
        assert net.now < began + 15.0, "seconds, not forty"
    assert is_suspended(chief.node.ledger, IDS[index])
    for i in range(4):
        if net[i].node.member._offers.get(TRAIN) is None:
            net.contribute(i, full(1.0))
    net.run(8.0)
    assert channel.round >= 1 and channel.aborted == 1
    assert IDS[index] not in {member for member, _, _ in channel.history[-1].contributors}


def test_an_owner_whose_own_values_are_not_numbers_does_without_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It measures them like all others', and what cannot be measured is refused."""
    net = Net(4)
    net.model()
    chief = net.leader()
    index = next(i for i in range(4) if net[i] is not chief)
    only_owner(monkeypatch, index)
    monkeypatch.setattr(dataplane, "check_finite", lambda x: None)
    nan = np.full(VALUES, np.nan, np.float32)
    for i in range(4):
        net.contribute(i, nan if i == index else full(1.0))
    net.run(8.0)
    channel = chief.node.ledger.channels[TRAIN]
    assert (channel.round, channel.aborted) == (1, 0)
    assert IDS[index] not in {member for member, _, _ in channel.history[0].contributors}


def test_a_silent_owner_costs_seconds_once() -> None:
    net = Net(4)
    net.model()
    chief = net.leader()
    index = next(i for i in range(4) if net[i] is not chief)
    victim = IDS[index]
    net.lose = lambda sender, to, message: (
        sender == victim and isinstance(message, m.PartsHeld | m.PartResult)
    )
    for _ in range(3):
        for i in range(4):
            if net[i].node.member._offers.get(TRAIN) is None:
                net.contribute(i, full(1.0))
        net.run(15.0)
    channel = chief.node.ledger.channels[TRAIN]
    assert channel.round >= 2 and channel.aborted == 0
    assert is_suspended(chief.node.ledger, victim)
    last = channel.history[-1]
    assert victim not in {member for member, _, _ in last.contributors}


def test_a_group_call_of_a_suspended_member_is_still_answered() -> None:
    chair = chair_of(A, B)
    chair.log.add(e.MemberSuspended(B, "silent"))
    for peer in (A, B):
        chair.ready(1.0, peer, GROUP, expect=2)
    (opened,) = chair.commit(1.0)
    assert isinstance(opened, e.RoundOpened)
    assert [c.member for c in opened.contributors] == [A, B]
    assert {p.owner for p in opened.parts} == {A}
    assert chair.leader.deadline() < math.inf
