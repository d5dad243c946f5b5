"""Steward sets as a function of the log."""

from __future__ import annotations

import struct

import blake3
import pytest

from swarmtrain_protocols import limits
from swarmtrain_protocols.entries import (
    MemberBanned,
    MemberLeft,
    NoOp,
    Rewound,
    StewardsChanged,
    encode_body,
)
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.log.view import View, chained
from swarmtrain_protocols.manifest import make_genesis
from tests.protocols.log_world import FOUNDER, RUN, joined

A, B, C, D, E = (bytes([n]) * 32 for n in range(1, 6))


def view(voters: tuple[bytes, ...] = (A,), joint: tuple[bytes, ...] = ()) -> View:
    return View(0, voters, joint, bytes(32), frozenset((B, C, D)), A)


def changed(v: View, voters: tuple[bytes, ...], joint: tuple[bytes, ...] = ()) -> View:
    body = StewardsChanged(voters, joint)
    return v.after(7, 3, encode_body(body), body)


def test_chain_hash_is_blake3_over_previous_index_term_body() -> None:
    expected = blake3.blake3(b"p" * 32 + struct.pack("<QQ", 5, 9) + b"body").digest()
    assert chained(b"p" * 32, 5, 9, b"body") == expected


def test_genesis_names_the_first_steward() -> None:
    genesis = make_genesis(FOUNDER, RUN, A)
    first = View.first(genesis, encode_body(genesis))
    assert (first.voters, first.joint, first.generation) == ((A,), (), 0)
    assert first.digest == blake3.blake3(encode_body(genesis)).digest()
    assert first.trusts(A) and not first.trusts(B)


@pytest.mark.parametrize(
    ("voters", "joint", "agree", "enough"),
    [
        ((A,), (), (A,), True),
        ((A,), (), (B,), False),
        ((A, B, C), (), (A,), False),
        ((A, B, C), (), (A, C), True),
        ((A, B, C), (), (A, D, E), False),
        ((A, B, C), (A,), (B, C), False),
        ((A, B, C), (A,), (A, C), True),
        ((C, D, E), (A, B, C), (C, D), False),
        ((C, D, E), (A, B, C), (A, C, D), True),
        ((C, D, E), (A, B, C), (A, B, C), False),
        ((A, B, C, D, E), (), (A, B), False),
        ((A, B, C, D, E), (), (A, B, E), True),
    ],
)
def test_quorum(
    voters: tuple[bytes, ...], joint: tuple[bytes, ...], agree: tuple[bytes, ...], enough: bool
) -> None:
    assert view(voters, joint).quorum(agree.__contains__) is enough


def test_a_change_is_joint_first_and_then_final() -> None:
    joint = changed(view(), (A, B, C), (A,))
    assert (joint.voters, joint.joint) == ((A, B, C), (A,))
    final = changed(joint, (A, B, C))
    assert (final.voters, final.joint) == ((A, B, C), ())
    body = StewardsChanged((A, B, C), (A,))
    assert joint.digest == chained(bytes(32), 7, 3, encode_body(body))
    assert joint.everyone() == (A, B, C) and joint.has_voter(A)


@pytest.mark.parametrize(
    ("before", "voters", "joint"),
    [
        (view(), (A, B), (A,)),  # two
        (view(), (A, B, C), ()),  # not joint
        (view(), (A, B, C), (B,)),  # joint with another set
        (view(), (B, A, C), (A,)),  # not in key order
        (view(), (A, A, B), (A,)),  # twice
        (view(), (A, B, E), (A,)),  # no grant
        (view((A, B, C), (A,)), (A, B, D), ()),  # ends elsewhere
        (view((A, B, C), (A,)), (A, B, C), (A,)),  # joint twice
    ],
)
def test_a_change_that_no_rule_allows(
    before: View, voters: tuple[bytes, ...], joint: tuple[bytes, ...]
) -> None:
    with pytest.raises(PeerFault) as caught:
        changed(before, voters, joint)
    assert caught.value.code == "bad_stewards"


def test_grants_come_and_go_with_membership() -> None:
    v = view()
    assert not v.trusts(E)
    v = v.after(1, 1, b"", joined(E))
    assert v.trusts(E)
    assert not v.after(2, 1, b"", joined(E, may_vote=False)).trusts(E)
    assert not v.after(2, 1, b"", MemberLeft(E, "leave")).trusts(E)
    assert not v.after(2, 1, b"", MemberBanned(E, "lied")).trusts(E)
    assert v.after(2, 1, b"", MemberLeft(A, "leave")).trusts(A)  # the founding steward always may
    assert v.after(2, 1, b"", NoOp()) is v


def test_grants_are_bounded() -> None:
    many = frozenset(n.to_bytes(32, "big") for n in range(limits.MEMBERS_MAX))
    full = View(0, (A,), (), bytes(32), many, A)
    assert full.after(1, 1, b"", joined(E)).capable == many


def test_a_generation_follows_the_one_before() -> None:
    v = view().after(1, 1, b"", Rewound(1, "", (), (), ()))
    assert v.generation == 1
    assert v.after(2, 1, b"", Rewound(3, "", (), (), ())).generation == 1  # as the ledger does


def test_a_second_genesis_is_refused() -> None:
    genesis = make_genesis(FOUNDER, RUN, A)
    with pytest.raises(PeerFault, match="second genesis"):
        view().after(1, 1, encode_body(genesis), genesis)
