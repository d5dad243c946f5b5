"""Members that cost others an attempt: how long nothing depends on them."""

from __future__ import annotations

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.ledger import load_snapshot
from swarmtrain_protocols.suspension import DOUBLED_MAX, ROUNDS, is_suspended, trusted
from tests.protocols.rounds_kit import A, B, C, Log, hash_of, joined


def commit(log: Log) -> None:
    opened = log.open([A, B])
    log.choose(opened)
    log.commit(opened, hash_of(f"result {opened.key.round}"))


def rounds_out(log: Log, member: bytes) -> int:
    """Suspend ``member`` and commit rounds until it is over."""
    assert log.add(e.MemberSuspended(member, "silent"))
    assert is_suspended(log.ledger, member)
    assert not log.add(e.MemberSuspended(member, "again")), "it is out already"
    count = 0
    while is_suspended(log.ledger, member):
        commit(log)
        count += 1
    return count


def test_it_is_over_after_some_rounds_and_lasts_twice_as_long_each_time() -> None:
    log = Log(A, B, C)
    assert [rounds_out(log, C) for _ in range(4)] == [ROUNDS, 2 * ROUNDS, 4 * ROUNDS, 8 * ROUNDS]
    assert rounds_out(log, B) == ROUNDS, "each by itself"
    known = log.ledger.suspended[C]
    known.times = 100
    assert log.add(e.MemberSuspended(C, "silent"))
    assert known is not log.ledger.suspended[C]
    assert log.ledger.suspended[C].until == log.ledger.rounds_committed + ROUNDS * 2**DOUBLED_MAX


def test_leaving_and_coming_back_does_not_help() -> None:
    log = Log(A, B, C)
    log.add(e.MemberSuspended(C, "no legal result"))
    log.add(e.MemberLeft(C, "leave"))
    log.add(joined(C))
    assert is_suspended(log.ledger, C)
    assert load_snapshot(log.ledger.snapshot()).suspended[C].reason == "no legal result"


def test_only_members_and_no_more_than_are_remembered() -> None:
    log = Log(A, B)
    assert not log.add(e.MemberSuspended(C, "a stranger"))
    for number in range(limits.SUSPENSIONS_MAX + 1):
        peer = number.to_bytes(32, "big")
        log.ledger.members[peer] = log.ledger.members[A]
        assert log.add(e.MemberSuspended(peer, "silent"))
    assert len(log.ledger.suspended) == limits.SUSPENSIONS_MAX


def test_if_all_are_suspended_nobody_is() -> None:
    log = Log(A, B)
    assert trusted(log.ledger, [A, B]) == [A, B]
    log.add(e.MemberSuspended(B, "silent"))
    assert trusted(log.ledger, [A, B]) == [A]
    assert trusted(log.ledger, [B]) == [B]
    log.add(e.MemberSuspended(A, "silent"))
    assert trusted(log.ledger, [A, B]) == [A, B]
