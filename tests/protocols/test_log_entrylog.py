"""The entries held: growing, cutting, certificates, compaction."""

from __future__ import annotations

import pytest

from swarmtrain_protocols import limits
from swarmtrain_protocols.entries import EntryBody, NoOp, Paused, StewardsChanged, encode_body
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.log.certificate import (
    Snapshot,
    SnapshotBody,
    SnapshotFile,
    Trust,
    encode_snapshot_body,
    endorsed,
)
from swarmtrain_protocols.log.entrylog import EntryLog
from swarmtrain_protocols.log.view import chained
from swarmtrain_protocols.manifest import make_genesis
from swarmtrain_protocols.messages.log import Certificate, SnapshotCertificate, WireEntry
from tests.protocols.log_world import FOUNDER, RUN, KeyedHash, joined

KEYS = {name: KeyedHash(name) for name in "abc"}
A = KEYS["a"].peer_id
ABC = tuple(sorted(key.peer_id for key in KEYS.values()))


def new_log() -> EntryLog:
    """Genesis at 0, and grants for b and c at 1 and 2."""
    log = EntryLog(Trust(RUN, FOUNDER.peer_id, KEYS["a"]))
    put(log, make_genesis(FOUNDER, RUN, A), term=0)
    for name in "bc":
        put(log, joined(KEYS[name].peer_id))
    return log


def put(log: EntryLog, body: EntryBody, term: int = 1) -> int:
    log.append(log.follow(log.last, WireEntry(term, encode_body(body))))
    return log.last_index


def certified(log: EntryLog, index: int, names: str = "a") -> Certificate:
    entry = log.entry(index)
    view = entry.view
    signatures = {
        KEYS[n].peer_id: Trust(RUN, FOUNDER.peer_id, KEYS[n]).sign(
            view, entry.term, index, entry.chain_hash
        )
        for n in names
    }
    return Certificate(
        view.generation, entry.term, index, entry.chain_hash, view.digest, endorsed(signatures)
    )


def test_the_chain_starts_at_the_run() -> None:
    log = new_log()
    h = chained(RUN, 0, 0, log.genesis)
    assert log.entry(0).chain_hash == h
    assert log.entry(1).chain_hash == chained(h, 1, 1, log.entry(1).data)
    assert (log.first, log.last_index, log.commit) == (0, 2, -1)


@pytest.mark.parametrize(
    ("term", "body", "code"),
    [
        (0, encode_body(NoOp()), "malformed"),  # a term below the one before
        (1, b"\xc1", "malformed"),
        (1, encode_body(StewardsChanged((A, ABC[0]), (A,))), "bad_stewards"),
    ],
)
def test_what_does_not_follow(term: int, body: bytes, code: str) -> None:
    log = new_log()
    with pytest.raises(PeerFault) as caught:
        log.follow(log.last, WireEntry(term, body))
    assert caught.value.code == code and log.last_index == 2


def test_entry_0_must_be_the_founders() -> None:
    log = EntryLog(Trust(RUN, FOUNDER.peer_id, KEYS["a"]))
    forged = make_genesis(KEYS["b"], RUN, KEYS["b"].peer_id)
    for body in (forged, NoOp()):
        with pytest.raises(PeerFault, match="bad_genesis"):
            log.follow(log.last, WireEntry(0, encode_body(body)))


def test_truncation_brings_the_old_view_back() -> None:
    log = new_log()
    put(log, StewardsChanged(ABC, (A,)))
    assert log.view is not None and log.view.voters == ABC and log.changes_uncommitted() == [3]
    log.truncate(3)
    assert log.view.voters == (A,) and log.changes() == []


def test_certified_entries_are_never_cut_off() -> None:
    log = new_log()
    log.commit_to(certified(log, 1))
    with pytest.raises(AssertionError):
        log.truncate(1)


def _with_changes() -> tuple[EntryLog, dict[int, Certificate]]:
    """Joint at 3, final at 5, three stewards from there on; certificates at 2, 4, 5, 6."""
    log = new_log()
    put(log, StewardsChanged(ABC, (A,)))
    put(log, NoOp())
    put(log, StewardsChanged(ABC))
    put(log, NoOp())
    found = {i: certified(log, i, "ab" if i > 2 else "a") for i in (2, 4, 5, 6)}
    for certificate in found.values():
        log.commit_to(certificate)
    return log, found


def test_links_are_kept_with_the_certificate_that_committed_them() -> None:
    log, found = _with_changes()
    assert [(link.index, link.certificate) for link in log.links] == [(3, found[4]), (5, found[5])]
    assert log.latest == found[6]


@pytest.mark.parametrize(
    ("verified", "upto", "index"),
    [(-1, 1, None), (-1, 3, 2), (-1, 6, 4), (2, 6, 4), (3, 6, 6), (4, 6, 6), (6, 6, None)],
)
def test_a_certificate_commits_one_change_at_most(
    verified: int, upto: int, index: int | None
) -> None:
    log, found = _with_changes()
    assert log.certificate_for(verified, upto) == (None if index is None else found[index])


def test_messages_are_bounded_in_entries_and_bytes() -> None:
    log = new_log()
    for _ in range(100):
        put(log, NoOp())
    assert len(log.slice(0, log.last_index)) == limits.ENTRIES_PER_APPEND_MAX
    assert len(log.slice(50, 60)) == 11 and log.slice(103, 102) == ()
    big = new_log()
    for _ in range(3):
        put(big, joined(A))
        big.entries[-1] = big.entries[-1].__class__(
            big.last_index, 1, bytes(limits.ENTRY_BYTES_MAX), NoOp(), bytes(32),
            big.entries[-1].view,
        )  # fmt: skip
    assert len(big.slice(3, 5)) == 1


def _snapshot(log: EntryLog, index: int) -> Snapshot:
    at = log.entry(index)
    body = SnapshotBody(
        index, at.term, at.chain_hash, at.view.generation, tuple(sorted(at.view.capable)), b"L"
    )
    data, digest = encode_snapshot_body(body)
    certificate = SnapshotCertificate(
        at.view.generation, at.term, index, at.chain_hash, at.view.digest, digest, ()
    )
    links = tuple(link for link in log.links if link.index <= index)
    return Snapshot(SnapshotFile(log.genesis, links, data, certificate), body, at.view)


def test_compaction_keeps_positions_and_views() -> None:
    log, _ = _with_changes()
    hashes = {i: log.at(i).chain_hash for i in range(2, 7)}
    log.compact(_snapshot(log, 5), keep_from=4)
    assert (log.first, log.last_index, log.base.index) == (4, 6, 3)
    assert {i: log.at(i).chain_hash for i in range(3, 7)} == {i: hashes[i] for i in range(3, 7)}
    assert log.base.view is not None and log.base.view.joint == (A,)
    assert sorted(log.certificates) == [4, 5, 6] and len(log.links) == 2


def test_an_installed_snapshot_keeps_a_tail_that_matches_and_drops_one_that_does_not() -> None:
    full, _ = _with_changes()
    snapshot = _snapshot(full, 5)
    same = new_log()
    for index in range(3, 7):
        same.append(full.entry(index))
    same.install(snapshot)
    assert (same.commit, same.first, same.last_index) == (5, 6, 6)
    assert same.entry(6).chain_hash == full.entry(6).chain_hash
    other = new_log()
    for n in range(5):
        put(other, Paused(str(n)))
    other.install(snapshot)
    assert (other.commit, other.first, other.last_index) == (5, 6, 5)
    assert other.links == full.links and other.view == snapshot.view
