"""What the parts of the log core share: term and vote, the log, the disk's view of it, effects."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

from swarmtrain_protocols.core import Effect, Emit, PeerId, Persist, Send
from swarmtrain_protocols.entries import EntryBody, encode_body
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.log.certificate import Snapshot, Trust, encode_snapshot_file
from swarmtrain_protocols.log.entrylog import Entry, EntryLog
from swarmtrain_protocols.log.events import (
    Conflict,
    ConflictProof,
    LeaderChanged,
    LogTimeouts,
    Superseded,
)
from swarmtrain_protocols.log.records import (
    EntriesRecord,
    SnapshotRecord,
    VoteRecord,
    decode_record,
    encode_record,
)
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.messages.log import Certificate, Recovery, WireEntry

FOLLOWER, CANDIDATE, LEADER = "follower", "candidate", "leader"


class LogState:
    """Shared by the parts of one ``LogCore``; only they touch it."""

    def __init__(self, trust: Trust, rng: random.Random, now: float, timeouts: LogTimeouts) -> None:
        self.trust = trust
        self.me = trust.keyring.peer_id
        self.rng = rng
        self.now = now
        self.timeouts = timeouts
        self.log = EntryLog(trust)
        self.term = 0
        self.voted_for = b""
        self.role = FOLLOWER
        self.leader: PeerId | None = None
        self.leader_term = 0
        self.leader_heard_at = -math.inf
        self.pulse = (0, 0)
        self.pulse_at = now
        self.links: dict[PeerId, bool] = {}
        self.halted = False
        self.handed_over = 0
        """How often the run was handed over, by the ledger here: earlier founders are out."""
        self.superseded: Recovery | None = None
        """Proof that the log held here is no longer the run's, until the new one is here."""
        self.out: list[Effect] = []
        self.saved = -1
        self._told: tuple[PeerId | None, int, int] = (None, 0, 0)
        self._unsaved_links: list[Certificate] = []
        self._saved_certificate = -1

    # --- effects ---------------------------------------------------------------------------------

    def send(self, peer: bytes, message: Message) -> None:
        self.out.append(Send(PeerId(peer), message))

    def emit(self, event: object) -> None:
        self.out.append(Emit(event))

    def fault(self, peer: bytes, fault: PeerFault) -> None:
        """Tell the layer above what a peer did wrong; nothing is raised out of a core."""
        fault.peer = peer
        self.emit(fault)

    def tell_superseded(self, recovery: Recovery | None) -> None:
        """Say that the founder has replaced the log held here, if it holds anything."""
        if recovery is not None and self.log.commit >= 0:
            ours = self.log.generation
            self.emit(Superseded(recovery.generation, ours, recovery.steward))

    def check_recovery(self, recovery: Recovery) -> None:
        """Whether the founder of now has begun the log again.

        Raises:
            PeerFault: ``bad_recovery`` or ``bad_deed``: nobody has, or an earlier founder.
        """
        self.trust.recovered(recovery)
        if len(recovery.deeds) < self.handed_over:
            raise PeerFault("bad_recovery", "by a founder who has handed the run over")

    # --- roles -----------------------------------------------------------------------------------

    @property
    def votes(self) -> bool:
        """True if this site votes in the newest set it knows of, or in the certified one.

        A steward that a change leaves out is needed until that change is certified: nobody else may
        hold enough of the log to be elected (Ongaro 2014, §4.2.2).
        """
        log = self.log
        if self.superseded is not None:
            return False
        view = log.view
        if view is not None and view.has_voter(self.me):
            return True
        certified = log.committed_view
        return certified is not None and certified is not view and certified.has_voter(self.me)

    @property
    def recovery(self) -> Recovery | None:
        """The newest recovery that is proven here."""
        return self.superseded or self.log.recovery

    @property
    def generation(self) -> int:
        """What messages of the log must at least be of to be listened to."""
        newest = 0 if self.superseded is None else self.superseded.generation
        return max(self.log.generation, newest)

    @property
    def alone(self) -> bool:
        view = self.log.view
        return view is not None and view.everyone() == (self.me,)

    def trusts(self, peer: bytes) -> bool:
        """True if ``peer`` may lead: by the newest view or by the certified one."""
        log = self.log
        return any(v is not None and v.trusts(peer) for v in (log.view, log.committed_view))

    def felt(self, pulse: tuple[int, int]) -> bool:
        """Remember the newest pulse of a leader, and when it was new here; True if it is new."""
        if pulse <= self.pulse:
            return False
        self.pulse, self.pulse_at = pulse, self.now
        return True

    def set_leader(self, leader: PeerId | None, term: int) -> None:
        """Remember who leads, and tell if that is news."""
        self.leader, self.leader_term = leader, max(term, self.leader_term)
        told = (leader, self.leader_term, self.log.generation)
        if told != self._told and (leader is not None or self._told[0] is not None):
            self._told = told
            self.emit(LeaderChanged(*told))

    def adopt_term(self, term: int, voted_for: bytes = b"") -> None:
        """Enter a newer term, or give the vote of this one; durable before anything after it."""
        assert term > self.term or (term == self.term and self.voted_for in (b"", voted_for))
        self.term, self.voted_for = term, voted_for
        self.persist_vote()

    def learn_term(self, term: int) -> None:
        """Something certified is of a newer term: no leader of an older one is heard any more."""
        if term > self.term:
            assert self.role != LEADER
            self.role = FOLLOWER
            self.adopt_term(term)

    def persist_vote(self) -> None:
        record = encode_record(VoteRecord(self.term, self.voted_for))
        self.out.append(Persist(record, relied=self.votes or self.voted_for != b""))

    # --- the log and its disk --------------------------------------------------------------------

    def extend(self, body: EntryBody) -> Entry:
        """Append an entry of this leader's term.

        Raises:
            PeerFault: the entry does not fit the log.
        """
        entry = self.log.follow(self.log.last, WireEntry(self.term, encode_body(body)))
        self.log.append(entry)
        return entry

    def truncate(self, index: int) -> None:
        self.log.truncate(index)
        self.saved = min(self.saved, index - 1)

    def commit_to(self, certificate: Certificate) -> None:
        """Move the certified prefix; remember which certificates the disk must not miss."""
        known = len(self.log.links)
        self.log.commit_to(certificate)
        self.learn_term(certificate.term)
        if len(self.log.links) > known:
            self._unsaved_links.append(certificate)

    def save(self) -> None:
        """Persist what is not yet on disk. Nothing after it takes place before it is durable."""
        if self.saved == self.log.last_index:
            return
        self.out.append(Persist(encode_record(self._unsaved()), relied=self.votes))
        self.saved = self.log.last_index

    def save_certificates(self) -> None:
        """Also persist the newest certificate, though no entry asks for it."""
        latest = self.log.latest
        if latest is not None and latest.index > self._saved_certificate:
            self.out.append(Persist(encode_record(self._unsaved()), relied=self.votes))
            self.saved = self.log.last_index

    @property
    def certificate_unsaved(self) -> bool:
        latest = self.log.latest
        return latest is not None and latest.index > self._saved_certificate

    def _unsaved(self) -> EntriesRecord:
        log = self.log
        start = self.saved + 1
        entries = tuple(log.entry(i).wire for i in range(start, log.last_index + 1))
        certificates = list(self._unsaved_links)
        latest = log.latest
        if latest is not None and latest.index > self._saved_certificate:
            if latest not in certificates:
                certificates.append(latest)
            self._saved_certificate = latest.index
        self._unsaved_links = []
        return EntriesRecord(start, entries, tuple(certificates))

    def save_snapshot(self, snapshot: Snapshot) -> None:
        """Replace everything on disk by vote, snapshot and the entries after it."""
        log = self.log
        start = snapshot.body.index + 1
        entries = tuple(log.entry(i).wire for i in range(start, log.last_index + 1))
        linked = [c.certificate for c in log.links if c.certificate.index >= start]
        latest = [] if log.latest is None or log.latest.index < start else [log.latest]
        certificates = linked + [c for c in latest if c not in linked]
        record = SnapshotRecord(
            VoteRecord(self.term, self.voted_for),
            encode_snapshot_file(log.snapshot_file(snapshot)),
            EntriesRecord(start, entries, tuple(certificates)),
        )
        self.out.append(Persist(encode_record(record), reset=True, relied=self.votes))
        self.saved = log.last_index
        self._unsaved_links = []
        self._saved_certificate = log.commit

    def load(self, records: Iterable[bytes]) -> None:
        """Rebuild from durable records. The own disk is trusted, so signatures are not checked.

        Raises:
            CheckpointError: a record cannot be read.
        """
        for data in records:
            record = decode_record(data)
            if isinstance(record, SnapshotRecord):
                self.log.install(self.trust.snapshot(record.file))
                self.saved = self._saved_certificate = self.log.commit
                self.term, self.voted_for = record.vote.term, record.vote.voted_for
                self._load_entries(record.tail)
            elif isinstance(record, VoteRecord):
                self.term, self.voted_for = record.term, record.voted_for
            else:
                self._load_entries(record)

    def _load_entries(self, record: EntriesRecord) -> None:
        log = self.log
        if record.start <= log.last_index:
            log.truncate(record.start)
        for item in record.entries:
            log.append(log.follow(log.last, item))
        for certificate in sorted(record.certificates, key=lambda c: c.index):
            if log.commit < certificate.index <= log.last_index:
                log.commit_to(certificate)
                self._saved_certificate = certificate.index
        self.saved = log.last_index

    # --- certificates ----------------------------------------------------------------------------

    def try_commit(self, peer: bytes, certificate: Certificate) -> bool:
        """Commit what ``certificate`` proves of the log held here; True if that was something.

        A certificate for entries that are not held, or held differently, proves nothing yet. One
        that contradicts the certified prefix and carries a majority halts this core.
        """
        log, c = self.log, certificate
        if c.index <= log.commit:
            self._check_conflict(c)
            return False
        if c.index > log.last_index or log.at(c.index).chain_hash != c.chain_hash:
            return False
        entry = log.entry(c.index)
        span = [log.entry(i) for i in range(log.commit + 1, c.index + 1)]
        if c.term != entry.term or not log.one_change_at_most(span):
            return False
        if not self.trust.certifies(entry.view, c):
            self.fault(peer, PeerFault("bad_certificate", f"index {c.index}, term {c.term}"))
            return False
        self.commit_to(c)
        return True

    def _check_conflict(self, theirs: Certificate) -> None:
        log = self.log
        if not log.first <= theirs.index <= log.commit:
            return
        held = log.entry(theirs.index)
        if held.chain_hash != theirs.chain_hash and self.trust.certifies(held.view, theirs):
            self.halt(theirs.index, theirs, theirs.chain_hash, ())

    def halt(
        self, index: int, theirs: Certificate, theirs_at: bytes, after: tuple[WireEntry, ...]
    ) -> None:
        """Stop for good: a majority signed another log than the one certified here."""
        log, ours = self.log, self.log.latest
        if ours is None or ours.index < index:
            return  # known from a snapshot alone; its certificate names no log to compare
        mine = tuple(log.entry(i).wire for i in range(index + 1, ours.index + 1))
        proof = ConflictProof(index, ours, log.at(index).chain_hash, mine, theirs, theirs_at, after)
        assert proof.adds_up()
        self.halted = True
        self.emit(Conflict(proof))
