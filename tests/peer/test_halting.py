"""What ends a site: proof of a lie in the log, a ledger that is wrong; never what a peer did."""

from __future__ import annotations

import json
from pathlib import Path

from swarmtrain_peer.halting import PROOF_FILE, halting
from swarmtrain_protocols.errors import CheckpointError, Diverged, PeerFault
from swarmtrain_protocols.log.events import Conflict, ConflictProof, LeaderChanged, LedgerDiverged
from swarmtrain_protocols.messages.log import Certificate


def certificate(chain_hash: bytes) -> Certificate:
    return Certificate(0, 1, 7, chain_hash, bytes(32), ())


def proof() -> ConflictProof:
    ours, theirs = bytes([1]) * 32, bytes([2]) * 32
    return ConflictProof(7, certificate(ours), ours, (), certificate(theirs), theirs, ())


def test_a_conflict_ends_the_site_and_the_proof_is_kept(tmp_path: Path) -> None:
    error = halting(Conflict(proof()), tmp_path / "log")
    assert isinstance(error, Diverged) and error.exit_code == 13
    assert "entry 7" in error.why and str(tmp_path / PROOF_FILE) in error.why
    kept = json.loads((tmp_path / PROOF_FILE).read_text())
    assert kept["index"] == 7 and kept["ours_at"] != kept["theirs_at"]
    assert isinstance(halting(Conflict(proof()), None), Diverged)


def test_a_wrong_ledger_ends_the_site() -> None:
    error = halting(LedgerDiverged(12, bytes([1]) * 32, bytes([2]) * 32), None)
    assert isinstance(error, Diverged) and error.exit_code == 13
    assert "0202020202020202" in error.why and "entry 12" in error.why


def test_own_failures_end_it_and_faults_of_others_do_not() -> None:
    broken = CheckpointError("disk", "broken")
    assert halting(broken, None) is broken
    assert halting(PeerFault("bad_signature", "x", bytes(32)), None) is None
    assert halting(LeaderChanged(None, 3, 0), None) is None
