"""Compaction: stewards agree on a snapshot's hash, then everybody may forget the entries before it.

Every site takes its own snapshot of the ledger at the same indices. Stewards send a signature over
its hash to the leader, a majority of signatures makes the certificate, and the certificate travels
with the log. A site whose ledger came out differently notices here and says so.
"""

from __future__ import annotations

from collections.abc import Callable

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.errors import LocalProtocolError, PeerFault
from swarmtrain_protocols.log.certificate import (
    Snapshot,
    SnapshotBody,
    SnapshotFile,
    encode_snapshot_body,
    encode_snapshot_file,
    endorsed,
)
from swarmtrain_protocols.log.events import LedgerDiverged
from swarmtrain_protocols.log.state import LogState
from swarmtrain_protocols.log.view import View
from swarmtrain_protocols.messages.log import SnapshotCertificate, SnapshotVote

_FILES_KEPT = 2


class Snapshots:
    """The own snapshot that waits for its certificate, the votes for it, and files to serve."""

    def __init__(self, state: LogState, take: Callable[[], bytes], every: int) -> None:
        self._s = state
        self._take = take
        self.every = every
        self.due = -1
        self._body: SnapshotBody | None = None
        self._data = b""
        self._hash = b""
        self._view: View | None = None
        self._votes: dict[bytes, bytes] = {}
        self._files: dict[int, bytes] = {}

    @property
    def certificate(self) -> SnapshotCertificate | None:
        """The certificate of the snapshot that this log stands on."""
        snapshot = self._s.log.snapshot
        return None if snapshot is None else snapshot.file.certificate

    @property
    def index(self) -> int:
        """Index of the certified snapshot, 0 without one (entry 0 alone is never a snapshot)."""
        certificate = self.certificate
        return 0 if certificate is None else certificate.index

    def stop_before(self, emitted: int, upto: int) -> int:
        """How far entries may be emitted before a snapshot must be taken."""
        boundary = (emitted // self.every + 1) * self.every
        return min(upto, max(boundary, self.every))

    def emitted(self, index: int) -> None:
        if index > 0 and index % self.every == 0 and index > self.index:
            self.due = index

    def take(self) -> None:
        """Take the snapshot at ``due``; the layer above has applied exactly that much."""
        s = self._s
        index, self.due = self.due, -1
        if not s.log.holds(index) or index <= self.index:
            return
        at = s.log.at(index)
        assert at.view is not None
        self._body = SnapshotBody(
            index=index,
            term=at.term,
            chain_hash=at.chain_hash,
            generation=at.view.generation,
            capable=tuple(sorted(at.view.capable)),
            ledger=self._take(),
        )
        self._view = at.view
        self._data, self._hash = encode_snapshot_body(self._body)
        if len(self._data) > limits.SNAPSHOT_BYTES_MAX // 2:
            raise LocalProtocolError("snapshot refused", f"{len(self._data)} bytes of ledger")
        self._votes = {}
        vote = self.vote
        if vote is not None:
            self._count(s.me, vote.signature)

    @property
    def vote(self) -> SnapshotVote | None:
        """What a steward tells the leader, as long as there is no certificate."""
        s, body, view = self._s, self._body, self._view
        if body is None or view is None or not view.has_voter(s.me):
            return None
        where = (view, body.term, body.index, body.chain_hash)
        own = self._votes.get(s.me)
        signature = s.trust.sign_snapshot(*where, self._hash) if own is None else own
        return SnapshotVote(body.index, self._hash, signature)

    def on_vote(self, peer: PeerId, vote: SnapshotVote) -> None:
        """Leader: a steward's signature over its snapshot."""
        s, body, view = self._s, self._body, self._view
        if body is None or view is None or vote.index != body.index or peer in self._votes:
            return
        payload_ok = vote.snapshot_hash == self._hash and s.trust.snapshot_signed_by(
            peer, vote.signature, view, body.term, body.index, body.chain_hash, self._hash
        )
        if not payload_ok:
            s.fault(peer, PeerFault("bad_signature", f"snapshot at {body.index} differs"))
            return
        self._count(peer, vote.signature)

    def _count(self, peer: bytes, signature: bytes) -> None:
        body, view = self._body, self._view
        assert body is not None and view is not None
        self._votes[peer] = signature
        mine = {p: v for p, v in self._votes.items() if view.has_voter(p)}
        if view.quorum(mine.__contains__):
            certificate = SnapshotCertificate(
                generation=view.generation,
                term=body.term,
                index=body.index,
                chain_hash=body.chain_hash,
                stewards=view.digest,
                snapshot_hash=self._hash,
                endorsements=endorsed(mine),
            )
            self._compact(certificate)

    def on_certificate(self, peer: PeerId, certificate: SnapshotCertificate) -> None:
        """Anybody: a majority agreed on a snapshot. Compact if it is the one taken here."""
        s, body, view = self._s, self._body, self._view
        if body is None or view is None or certificate.index != body.index:
            return
        if certificate.chain_hash != body.chain_hash or certificate.term != body.term:
            return
        if not s.trust.certifies_snapshot(view, certificate):
            s.fault(peer, PeerFault("bad_certificate", f"snapshot at {body.index}"))
        elif certificate.snapshot_hash != self._hash:
            s.emit(LedgerDiverged(body.index, self._hash, certificate.snapshot_hash))
            self._body = None
        else:
            self._compact(certificate)

    def _compact(self, certificate: SnapshotCertificate) -> None:
        """Forget entries, but keep one more interval of them for those a little behind."""
        s, body, view = self._s, self._body, self._view
        assert body is not None and view is not None
        file = SnapshotFile(s.log.genesis, (), self._data, certificate)
        snapshot = Snapshot(file, body, view)
        s.log.compact(snapshot, keep_from=max(body.index - self.every + 1, s.log.first))
        s.save_snapshot(snapshot)
        self._body = None

    def installed(self) -> None:
        """A snapshot came from elsewhere: whatever was pending here is older."""
        self._body = None
        self.due = -1

    def file(self, index: int = -1) -> tuple[int, bytes] | None:
        """The snapshot file to serve: the newest, or one served lately. (index, bytes)."""
        if index >= 0 and index in self._files:
            return index, self._files[index]
        snapshot = self._s.log.snapshot
        if snapshot is None:
            return None
        newest = snapshot.body.index
        if newest not in self._files:
            data = encode_snapshot_file(self._s.log.snapshot_file(snapshot))
            for old in sorted(self._files)[: max(0, len(self._files) + 1 - _FILES_KEPT)]:
                del self._files[old]
            self._files[newest] = data
        return newest, self._files[newest]
