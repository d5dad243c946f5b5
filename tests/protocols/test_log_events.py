"""Patience, and proofs of conflict."""

from __future__ import annotations

from dataclasses import replace

from swarmtrain_protocols import limits
from swarmtrain_protocols.log.events import ConflictProof, LogTimeouts
from swarmtrain_protocols.log.view import chained
from swarmtrain_protocols.messages.log import Certificate, WireEntry


def test_patience_scales_and_keeps_its_order() -> None:
    usual = LogTimeouts()
    assert usual.election_s == limits.ELECTION_TIMEOUT_S
    slow = usual.scaled(10.0)
    assert (slow.election_s, slow.heartbeat_s) == (10.0, 2.0)
    for t in (usual, slow):
        order = [t.heartbeat_s, t.feed_s, t.silence_s, t.stale_s, t.lease_s]
        assert order == sorted(order) and t.silence_s > 2 * t.feed_s
    # Whoever feeds a patient subscriber may be at its usual pace: it must not forget it.
    assert slow.renew_s == usual.renew_s < usual.lease_s / 2


def _certificate(index: int, chain_hash: bytes) -> Certificate:
    return Certificate(0, 1, index, chain_hash, bytes(32), ())


def test_a_proof_adds_up_only_if_both_logs_lead_to_their_certificates() -> None:
    ours_at, theirs_at = b"o" * 32, b"t" * 32
    after = WireEntry(1, b"x")
    end = chained(ours_at, 6, 1, b"x")
    proof = ConflictProof(
        5, _certificate(6, end), ours_at, (after,), _certificate(5, theirs_at), theirs_at, ()
    )
    assert proof.adds_up()
    assert not replace(proof, ours_after=()).adds_up()
    assert not replace(proof, ours_after=(WireEntry(2, b"x"),)).adds_up()
    assert not replace(proof, theirs=_certificate(5, end)).adds_up()
    same = replace(proof, theirs=_certificate(6, end), theirs_at=ours_at, theirs_after=(after,))
    assert not same.adds_up()  # one log twice is no conflict
