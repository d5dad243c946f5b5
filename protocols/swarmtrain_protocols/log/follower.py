"""Everybody who is not fed by the leader: find a source, verify what it sends, catch up.

A site subscribes to one source, preferably the leader, and believes none: entries count only once
a certificate covers them, snapshots only down to the founder's signature. Updates and snapshots
are accepted from anybody, because they prove themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.log.certificate import Snapshot
from swarmtrain_protocols.log.entrylog import Entry, Position
from swarmtrain_protocols.log.events import SnapshotLoaded
from swarmtrain_protocols.log.snapshots import Snapshots
from swarmtrain_protocols.log.state import LEADER, LogState
from swarmtrain_protocols.messages.log import (
    Certificate,
    Recovery,
    SnapshotPiece,
    SnapshotWanted,
    Subscribe,
    Unserved,
    Unsubscribe,
    Update,
    WireEntry,
)

_WINDOW_BYTES = limits.SNAPSHOT_PIECE_BYTES * limits.SNAPSHOT_PIECES_PER_PULL


class Follower:
    """The subscription of this site and what came over it without proof so far."""

    def __init__(self, state: LogState, snapshots: Snapshots) -> None:
        self._s = state
        self._snapshots = snapshots
        self.source: PeerId | None = None
        self._trial: PeerId | None = None
        self._heard_at = -math.inf
        self._asked_at = -math.inf
        self._chosen_at = -math.inf
        self._renew_at = math.inf
        self._known: tuple[PeerId, ...] = ()
        self._turn = 0
        self._pending: list[WireEntry] = []
        self._pending_at = 0
        self._pending_from: PeerId | None = None
        self._file = bytearray()
        self._file_index = -1
        self._file_upto = 0
        self._file_at = math.inf
        self._reviewed: PeerId | None = None
        self.loaded: Snapshot | None = None
        """An installed snapshot that the core has yet to tell the layer above."""

    # --- the source ------------------------------------------------------------------------------

    def know(self, peers: Sequence[PeerId]) -> None:
        """Where else updates may be had."""
        self._known = tuple(p for p in peers if p != self._s.me)[: limits.MEMBERS_MAX]

    def wanted(self, behind: PeerId | None) -> bool:
        """True unless this site leads or its leader feeds it."""
        s = self._s
        if s.role == LEADER or s.halted:
            return False
        fed = s.votes and s.now < s.leader_heard_at + 2 * s.timeouts.election_s
        return behind is not None or not fed

    def deadline(self, behind: PeerId | None) -> float:
        s = self._s
        if s.role == LEADER or s.halted:
            return s.now if self.source is not None else math.inf
        if not self.wanted(behind):
            fed_until = s.leader_heard_at + 2 * s.timeouts.election_s
            return s.now if self.source is not None else fed_until
        if self.source is None:
            return self._asked_at + s.timeouts.heartbeat_s if self._candidates() else math.inf
        return min(self._quiet_at(), self._renew_at, self._file_at)

    def _quiet_at(self) -> float:
        """When to give the source up: sooner if it never answered."""
        t = self._s.timeouts
        if self._heard_at < self._asked_at:
            return max(self._asked_at + t.election_s, self._heard_at + t.silence_s)
        stale_at = max(self._s.pulse_at + t.stale_s, self._chosen_at + t.election_s)
        return min(self._heard_at + t.silence_s, stale_at)

    def tick(self, behind: PeerId | None) -> None:
        s = self._s
        if not self.wanted(behind):
            if self.source is not None:
                s.send(self.source, Unsubscribe())
                self._drop()
            return
        if s.now < self.deadline(behind):
            return
        if self.source is None or s.now >= self._quiet_at():
            self._next_source(behind)
        elif s.now >= self._file_at:
            self._want_file()
        else:
            self._trial = None
            self._ask(self.source)

    def _candidates(self) -> list[PeerId]:
        """Where to subscribe, the best first, those with a link before those without.

        Who was fed begins with the stewards again when its source is gone: two followers that
        fed each other would hear nothing new until both found their source stale.
        """
        s = self._s
        view = s.log.view
        voters = () if view is None else view.everyone()
        first = s.me[0] % max(1, len(voters))  # the followers of a dead leader spread over the rest
        voters = (*voters[first:], *voters[:first])
        leader = () if s.leader is None else (s.leader,)
        if s.superseded is not None:
            leader = (PeerId(s.superseded.steward),)
        listed = [*leader, *voters, *self._known, *sorted(s.links)]
        unique = [PeerId(p) for p in dict.fromkeys(listed) if p != s.me]
        return [p for p in unique if p in s.links] + [p for p in unique if p not in s.links]

    def _next_source(self, behind: PeerId | None) -> None:
        candidates = self._candidates()
        self._drop()
        if not candidates:
            return
        if behind is not None and self._turn % 2 == 0:
            chosen = behind
        else:
            chosen = candidates[self._turn % len(candidates)]
        self._turn += 1
        self._chosen_at = self._s.now
        self._ask(chosen)

    def _drop(self) -> None:
        self.source = self._trial = None
        self._forget_pending()
        self._file, self._file_index, self._file_at = bytearray(), -1, math.inf

    def _forget_pending(self) -> None:
        self._pending, self._pending_at, self._pending_from = [], self._s.log.commit + 1, None

    def _distrust(self, peer: PeerId, fault: PeerFault) -> None:
        """Tell of a fault, and look for another source."""
        self._drop()
        self._s.fault(peer, fault)

    def _align(self) -> list[WireEntry]:
        """Entries that follow the certified ones, which may have grown by other messages."""
        start = self._s.log.commit + 1
        del self._pending[: start - self._pending_at]
        self._pending_at = start
        return self._pending

    def _ask(self, peer: PeerId) -> None:
        """Subscribe, renew, or ask for more."""
        s = self._s
        if peer != self._trial:
            self.source = peer
        if self._pending_from != peer:
            self._forget_pending()
        self._asked_at = s.now
        self._renew_at = s.now + s.timeouts.renew_s
        verified = s.log.commit + 1
        s.send(peer, Subscribe(s.log.generation, verified + len(self._align()), verified))

    def reload(self, peer: PeerId) -> None:
        """The log held here is void: have the one that replaced it from ``peer``."""
        self._drop()
        self._chosen_at = self._s.now
        self._ask(peer)

    def connected(self, peer: PeerId) -> None:
        if peer == self.source:
            self._ask(peer)

    def disconnected(self, peer: PeerId) -> None:
        """A broken link to the source is reason enough to ask another at once."""
        if peer == self._trial:
            self._trial = None
        if peer == self.source:
            self._drop()
            self._asked_at = -math.inf

    def on_unserved(self, peer: PeerId) -> None:
        if peer == self._trial:
            self._trial = None
        elif peer == self.source:
            self._drop()

    def _promote(self, peer: PeerId) -> None:
        """The source on trial answers: it is the source now."""
        if peer != self._trial:
            return
        old = self.source
        self._drop()
        self.source = peer
        if old is not None:
            self._s.send(old, Unsubscribe())

    def prefer_leader(self) -> None:
        """Entries come from the leader one hop earlier than from anybody else."""
        s = self._s
        if s.leader in (None, s.me, self.source, self._trial) or self.source is None:
            return
        assert s.leader is not None
        self._trial = s.leader
        self._ask(s.leader)

    # --- entries ---------------------------------------------------------------------------------

    def on_update(self, peer: PeerId, m: Update) -> None:
        """Entries, perhaps with the proof that they are committed, or a sign of life."""
        s = self._s
        if s.role == LEADER or m.generation < s.generation:
            return
        self._promote(peer)
        if peer != self.source:
            if m.certificate is not None:
                s.try_commit(peer, m.certificate)
            return
        self._heard_at = s.now
        self._hint(m)
        self._collect(peer, m)
        if s.halted or peer != self.source:
            return
        if s.log.commit + 1 >= m.length and s.felt(m.pulse):  # only with the news before it
            self._turn = 0
        if m.snapshot is not None:
            self._snapshots.on_certificate(peer, m.snapshot)
        have = s.log.commit + 1 + len(self._align())
        if m.more:
            self._ask(peer)
        elif m.start > have or (not m.entries and have < m.length):
            self._ask_again()
        if m.entries:
            self.prefer_leader()

    def _ask_again(self) -> None:
        """Something was lost. Ask again, at most once per heartbeat, unless a file is coming."""
        if self._file_index >= 0:
            return
        again = self._asked_at + self._s.timeouts.heartbeat_s
        self._renew_at = min(self._renew_at, again)

    def _hint(self, m: Update) -> None:
        """Believe a source about the leader as far as that one may lead."""
        s = self._s
        newer = m.leader_term > max(s.leader_term, s.term if s.votes else 0)
        told = m.leader_term == s.leader_term and s.leader is None
        if m.leader and (newer or told) and s.trusts(m.leader) and not s.votes:
            s.set_leader(PeerId(m.leader), m.leader_term)
            self.prefer_leader()

    def _collect(self, peer: PeerId, m: Update) -> None:
        if peer != self._pending_from:
            self._forget_pending()
            self._pending_from = peer
        if self._contradicts(peer, m):
            return
        pending = self._align()
        offset = m.start - self._pending_at
        if offset <= len(pending) < offset + len(m.entries):
            fresh = m.entries[max(0, -offset) :]
            del pending[max(0, offset) :]
            pending.extend(fresh)
            nbytes = sum(len(item.body) for item in pending)
            if (
                len(pending) > limits.LOG_UNVERIFIED_ENTRIES_MAX
                or nbytes > limits.LOG_UNVERIFIED_BYTES_MAX
            ):
                self._distrust(peer, PeerFault("flood", "entries without a certificate"))
                return
        if m.certificate is not None:
            self._prove(peer, m.certificate)

    def _contradicts(self, peer: PeerId, m: Update) -> bool:
        """Compare what is verified here with what comes again; a difference is somebody's lie."""
        log = self._s.log
        for offset, item in enumerate(m.entries):
            index = m.start + offset
            if not log.first <= index <= log.commit:
                continue
            held = log.entry(index)
            if (held.term, held.data) == (item.term, item.body):
                continue
            try:
                self._judge(index, m.entries[offset:], m.certificate)
            except PeerFault as fault:
                self._distrust(peer, fault)
            else:
                self._distrust(peer, PeerFault("bad_certificate", f"another entry {index}"))
            return True
        return False

    def _judge(
        self, index: int, items: tuple[WireEntry, ...], certificate: Certificate | None
    ) -> None:
        """Halt if a majority signed the log in which entry ``index`` is the first of ``items``."""
        log = self._s.log
        position: Position = log.at(index - 1)
        entries: list[Entry] = []
        for item in items:
            position = log.follow(position, item)
            entries.append(position)
        for entry in entries:
            if certificate is None or certificate.index != entry.index:
                continue
            if certificate.chain_hash == entry.chain_hash and log.trust.certifies(
                entry.view, certificate
            ):
                after = tuple(e.wire for e in entries if index < e.index <= entry.index)
                self._s.halt(index, certificate, entries[0].chain_hash, after)

    def _prove(self, peer: PeerId, certificate: Certificate) -> None:
        """Adopt the pending entries that a certificate covers."""
        s, log = self._s, self._s.log
        count = certificate.index - log.commit
        if count <= 0 or (
            log.holds(certificate.index)
            and log.at(certificate.index).chain_hash == certificate.chain_hash
        ):
            s.try_commit(peer, certificate)
            return
        if count > len(self._pending):
            return
        try:
            entries = self._verified(self._pending[:count], certificate)
        except PeerFault as fault:
            if self._review(peer, certificate):
                s.fault(peer, fault)
            else:
                self._distrust(peer, fault)
            return
        if not entries:  # the certificate of the change before was lost on the way
            self._ask_again()
            return
        for entry in entries:
            if entry.index <= log.last_index:
                if log.at(entry.index).chain_hash == entry.chain_hash:
                    continue
                s.truncate(entry.index)
            log.append(entry)
        s.commit_to(certificate)

    def _review(self, peer: PeerId, certificate: Certificate) -> bool:
        """Stewards signed a log that does not go on from the one certified here. Ask from the
        beginning, once: the first entry that differs is the proof. False if there is no more to it.
        """
        log = self._s.log
        view = log.committed_view
        signed = view is not None and log.trust.certifies(view, certificate)
        if not signed or self._reviewed == peer:
            return False
        self._reviewed = peer
        self._forget_pending()
        self._pending_from = peer
        start = max(1, log.first)
        self._s.send(peer, Subscribe(log.generation, start, start))
        return True

    def _verified(self, items: list[WireEntry], certificate: Certificate) -> list[Entry]:
        """The entries that the certificate proves; none if it cannot be judged from here."""
        log = self._s.log
        position = log.at(log.commit)
        entries: list[Entry] = []
        for item in items:
            position = log.follow(position, item)
            entries.append(position)
        last = entries[-1]
        if (last.chain_hash, last.term) != (certificate.chain_hash, certificate.term):
            raise PeerFault("bad_certificate", f"another log at {certificate.index}")
        if not log.one_change_at_most(entries):
            return []
        if not log.trust.certifies(last.view, certificate):
            raise PeerFault("bad_certificate", f"no majority at {certificate.index}")
        return entries

    # --- snapshots -------------------------------------------------------------------------------

    def on_piece(self, peer: PeerId, m: SnapshotPiece) -> None:
        """A piece of a snapshot file; the last one installs it."""
        s = self._s
        self._promote(peer)
        floor = s.log.commit if s.superseded is None else s.superseded.index - 1
        if peer != self.source or m.index <= floor or m.offset + len(m.data) > m.nbytes:
            return
        self._heard_at = s.now
        if m.index != self._file_index:
            if m.offset != 0:
                return
            self._file, self._file_index, self._file_upto = bytearray(), m.index, _WINDOW_BYTES
        if m.offset != len(self._file):
            return
        self._file += m.data
        self._file_at = s.now + 2 * s.timeouts.heartbeat_s
        if len(self._file) == m.nbytes:
            self._install(peer, bytes(self._file))
        elif len(self._file) >= self._file_upto:
            self._want_file()

    def _want_file(self) -> None:
        s = self._s
        assert self.source is not None
        self._file_at = s.now + 2 * s.timeouts.heartbeat_s
        self._file_upto = len(self._file) + _WINDOW_BYTES
        s.send(self.source, SnapshotWanted(self._file_index, len(self._file)))

    def _install(self, peer: PeerId, data: bytes) -> None:
        s = self._s
        self._file, self._file_index, self._file_at = bytearray(), -1, math.inf
        try:
            snapshot = s.trust.snapshot(data)
        except PeerFault as fault:
            self._distrust(peer, fault)
            return
        recovery = snapshot.file.recovery
        epoch = 0 if recovery is None else recovery.generation
        newest = 0 if s.recovery is None else s.recovery.generation
        if epoch < newest:
            self._distrust(peer, PeerFault("bad_recovery", "a snapshot of a log that is replaced"))
            return
        if epoch > newest and not self._begun_by_the_founder(peer, recovery):
            return
        if epoch == s.log.epoch and snapshot.body.index <= s.log.commit:
            return
        if epoch > newest:
            s.tell_superseded(recovery)
        s.log.install(snapshot)
        s.superseded = None
        s.learn_term(snapshot.body.term)
        s.save_snapshot(snapshot)
        self._snapshots.installed()
        self._forget_pending()
        self.loaded = snapshot
        self._ask(peer)

    def _begun_by_the_founder(self, peer: PeerId, recovery: Recovery | None) -> bool:
        assert recovery is not None
        try:
            self._s.check_recovery(recovery)
        except PeerFault as fault:
            self._distrust(peer, fault)
            return False
        return True

    def take_loaded(self) -> SnapshotLoaded | None:
        """The snapshot to tell the layer above about, once."""
        snapshot, self.loaded = self.loaded, None
        if snapshot is None:
            return None
        return SnapshotLoaded(snapshot.body.index, snapshot.body.ledger)

    def refused(self, peer: PeerId, m: Unserved) -> None:
        """The peer cannot serve this site."""
        self.on_unserved(peer)
