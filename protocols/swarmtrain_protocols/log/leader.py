"""What only the leader does: replicate, certify, change the set of stewards, hand over.

Every proposal of one turn travels in one message per steward, sent before the leader's own disk is
done with it; the leader's own signature follows the ``Persist`` of the entry (Ongaro 2014,
§10.2.1). Nothing here waits for a timer unless a message was lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.entries import NoOp, StewardsChanged
from swarmtrain_protocols.errors import LocalProtocolError, PeerFault
from swarmtrain_protocols.log.certificate import endorsed
from swarmtrain_protocols.log.snapshots import Snapshots
from swarmtrain_protocols.log.state import LEADER, LogState
from swarmtrain_protocols.log.view import View
from swarmtrain_protocols.messages.log import Append, AppendReply, Certificate, HandOver


@dataclass(slots=True)
class Progress:
    """What the leader knows of one steward or learner.

    ``next`` is what to send next, ``match`` what surely agrees, ``told`` the newest certificate
    sent. While ``probing``, one message at a time looks for the point of agreement.
    """

    next: int
    match: int = -1
    commit: int = -1
    base: int = -1
    told: int = -1
    probing: bool = False
    due: bool = True
    heard_at: float = -math.inf


@dataclass(slots=True)
class Leadership:
    """One term of leading. Built when the election is won, dropped when stepping down."""

    state: LogState
    snapshots: Snapshots
    step_down: Callable[[], None]
    progress: dict[PeerId, Progress] = field(default_factory=dict)
    signatures: dict[int, dict[bytes, bytes]] = field(default_factory=dict)
    target: tuple[bytes, ...] | None = None
    heartbeat_at: float = 0.0
    check_at: float = 0.0
    pulse_at: float = 0.0
    noop: int = -1

    def start(self) -> None:
        """Log the no-op of this term: only entries of the own term are ever signed."""
        s = self.state
        self.heartbeat_at = s.now + s.timeouts.heartbeat_s
        self.check_at = s.now + s.timeouts.election_s
        self.noop = s.extend(NoOp()).index
        self._follow_view()

    @property
    def view(self) -> View:
        view = self.state.log.view
        assert view is not None
        return view

    @property
    def ready(self) -> bool:
        return self.state.log.commit >= self.noop

    @property
    def changing(self) -> bool:
        """True from ``change_voters`` until the new set alone decides."""
        log = self.state.log
        return bool(self.target or self.view.joint or log.changes_uncommitted())

    # --- time ------------------------------------------------------------------------------------

    def deadline(self) -> float:
        return min(self.heartbeat_at, self.check_at) if self.progress else math.inf

    def tick(self) -> None:
        s = self.state
        if s.now >= self.pulse_at:
            self.pulse_at = s.now + s.timeouts.feed_s / 2
            s.felt((s.term, s.pulse[1] + 1 if s.pulse[0] == s.term else 1))
        if s.now >= self.heartbeat_at:
            self.heartbeat_at = s.now + s.timeouts.heartbeat_s
            self._follow_view()
            for item in self.progress.values():
                item.due = True
                item.told = min(item.told, item.commit)
        if s.now >= self.check_at:
            self.check_at = s.now + s.timeouts.election_s / 2
            since = s.now - s.timeouts.election_s
            if not self.view.quorum(lambda peer: peer == s.me or self._heard(peer) >= since):
                self.step_down()

    def _heard(self, peer: bytes) -> float:
        item = self.progress.get(PeerId(peer))
        return -math.inf if item is None else item.heard_at

    def _follow_view(self) -> None:
        """Keep one ``Progress`` per steward, old or new, and per learner."""
        log = self.state.log
        certified = log.committed_view
        old = () if certified is None else certified.everyone()
        wanted = sorted({*self.view.everyone(), *old, *(self.target or ())})
        for peer in [p for p in self.progress if p not in wanted]:
            del self.progress[peer]
        for key in wanted:
            if key != self.state.me and key not in self.progress:
                item = Progress(next=max(log.last_index, log.first), heard_at=self.state.now)
                self.progress[PeerId(key)] = item

    # --- one turn --------------------------------------------------------------------------------

    def flush(self) -> None:
        """Send, persist and certify whatever this turn brought."""
        s = self.state
        while True:
            for peer, item in self.progress.items():
                self._send(peer, item)
            s.save()
            if not self._certify():
                return
            self._after_commit()
            if s.role != LEADER:
                return

    def connected(self, peer: PeerId) -> None:
        """What is there now is told by the first reply: a learner may come back with less."""
        item = self.progress.get(peer)
        if item is not None:
            item.due, item.told, item.match = True, item.commit, -1

    def _send(self, peer: PeerId, item: Progress) -> None:
        """Send entries, a certificate or a sign of life, if there is a reason to."""
        log = self.state.log
        item.next = max(item.next, log.first)
        while True:
            entries_due = item.next <= log.last_index and (item.due or not item.probing)
            if item.next - 1 - item.match > limits.LOG_IN_FLIGHT_ENTRIES_MAX:
                entries_due = item.due
            upto = self._last_sendable(item) if entries_due else item.next - 1
            batch = log.slice(item.next, upto)
            end = item.next + len(batch) - 1
            certificate = log.certificate_for(item.told, min(end, log.commit))
            if not (item.due or batch or (certificate is not None and not item.probing)):
                return
            snapshot = self.snapshots.certificate
            self.state.send(
                peer,
                Append(
                    generation=self.view.generation,
                    term=self.state.term,
                    first=log.first,
                    start=item.next,
                    prev_hash=log.at(item.next - 1).chain_hash,
                    entries=batch,
                    certificate=certificate,
                    snapshot=snapshot if snapshot and snapshot.index > item.base else None,
                    pulse=self.state.pulse,
                ),
            )
            item.due = False
            if certificate is not None:
                item.told = certificate.index
            if item.probing:
                return
            item.next = end + 1

    def _last_sendable(self, item: Progress) -> int:
        """A later change of the set travels only after the certificate of the earlier one."""
        log = self.state.log
        changes = log.changes()
        for earlier, later in pairwise(changes):
            if later >= item.next and earlier > item.told:
                return later - 1
        return log.last_index

    # --- replies ---------------------------------------------------------------------------------

    def on_reply(self, peer: PeerId, reply: AppendReply) -> None:
        """A steward of this term answered."""
        s = self.state
        item = self.progress.get(peer)
        if item is None:
            return
        item.heard_at = s.now
        item.commit, item.base = reply.commit, reply.base  # certificates may be lost in a crash
        if reply.snapshot is not None:
            self.snapshots.on_vote(peer, reply.snapshot)
        if reply.index > s.log.last_index:
            s.fault(peer, PeerFault("unexpected", f"acknowledged entry {reply.index}"))
        elif reply.ok:
            item.match = max(item.match, reply.index)
            item.next = max(item.next, item.match + 1)
            item.probing = False
            if reply.signature and reply.index > s.log.commit:
                self._on_signature(peer, reply.index, reply.signature)
            self._start_change()
        else:
            self._back_up(item, reply.index + 1)

    def _back_up(self, item: Progress, wanted: int) -> None:
        """The peer misses something before what was sent. Answer once per point of agreement."""
        wanted = max(wanted, item.match + 1, self.state.log.first)
        if item.probing and item.next == wanted:
            return
        if wanted < item.next:
            item.next, item.probing, item.due = wanted, True, True
            item.told = item.commit

    def _on_signature(self, peer: PeerId, index: int, signature: bytes) -> None:
        s = self.state
        entry = s.log.entry(index)
        known = self.signatures.setdefault(index, {})
        if peer in known:
            return
        where = (entry.view, entry.term, entry.index, entry.chain_hash)
        if entry.term != s.term or not s.trust.signed_by(peer, signature, *where):
            s.fault(peer, PeerFault("bad_signature", f"log entry {index}"))
            return
        known[peer] = signature

    def _certify(self) -> bool:
        """Make the certificate for the newest index that a majority signed."""
        s = self.state
        log = s.log
        if log.last_index == log.commit:
            return False
        candidates = {log.last_index, *(i for i in self.signatures if i > log.commit)}
        for index in sorted(candidates, reverse=True):
            entry = log.entry(index)
            signed = self.signatures.get(index, {})
            span = [log.entry(i) for i in range(log.commit + 1, index + 1)]
            if entry.term != s.term or not log.one_change_at_most(span):
                continue
            holders = {s.me, *signed}
            if not entry.view.quorum(holders.__contains__):
                continue
            self._commit(index, signed)
            return True
        return False

    def _commit(self, index: int, signed: dict[bytes, bytes]) -> None:
        s = self.state
        entry = s.log.entry(index)
        view = entry.view
        mine = {p: signature for p, signature in signed.items() if view.has_voter(p)}
        if view.has_voter(s.me):
            mine[s.me] = s.trust.sign(view, entry.term, index, entry.chain_hash)
        s.commit_to(
            Certificate(
                generation=view.generation,
                term=entry.term,
                index=index,
                chain_hash=entry.chain_hash,
                stewards=view.digest,
                endorsements=endorsed(mine),
            )
        )
        for old in [i for i in self.signatures if i <= index]:
            del self.signatures[old]

    # --- changing the set ------------------------------------------------------------------------

    def change_voters(self, voters: tuple[bytes, ...]) -> None:
        """Aim for another steward set; learners first, then a joint set, then the new one.

        Raises:
            LocalProtocolError: another change has gone too far, or the set is not allowed.
        """
        wanted = tuple(sorted(voters))
        view = self.view
        if view.joint or self.state.log.changes_uncommitted():
            raise LocalProtocolError("the steward set is being changed", "a joint set is logged")
        try:
            view.check_voters(wanted)
        except PeerFault as fault:
            raise LocalProtocolError("steward set refused", fault.why) from None
        if len(self.state.log.links) + 2 > limits.STEWARD_LINKS_MAX:
            raise LocalProtocolError("steward set refused", "it has changed too often in this run")
        self.target = None if wanted == view.voters else wanted
        self._follow_view()
        self._start_change()

    def _start_change(self) -> None:
        """Log the joint set as soon as every newcomer is near the end of the log."""
        log, view = self.state.log, self.view
        if self.target is None or view.joint or log.changes_uncommitted() or not self.ready:
            return
        near = log.commit - limits.ENTRIES_PER_APPEND_MAX
        for peer in self.target:
            if view.has_voter(peer):
                continue
            if not view.trusts(peer):  # banned or gone while it was learning
                self.target = None
                self._follow_view()
                return
            item = self.progress[PeerId(peer)]
            if item.match < max(near, 0):
                return
        target, self.target = self.target, None
        self.state.extend(StewardsChanged(voters=target, joint=view.voters))
        self._follow_view()

    def _after_commit(self) -> None:
        """Go on with a change of the set once its joint entry is certified."""
        log, view = self.state.log, self.view
        if not log.changes_uncommitted():
            if view.joint:
                self.state.extend(StewardsChanged(voters=view.voters))
                self._follow_view()
            elif not view.has_voter(self.state.me):
                self.flush_certificates()
                self.hand_over()
                return
        self._start_change()

    def flush_certificates(self) -> None:
        for peer, item in self.progress.items():
            self._send(peer, item)

    def hand_over(self, to: PeerId | None = None) -> None:
        """Ask the steward with the most of the log to take over at once, and step down."""
        s = self.state
        able = [p for p in self.progress if self.view.has_voter(p) and to in (None, p)]
        if able:
            best = max(able, key=lambda p: (self.progress[p].match, p))
            s.send(best, HandOver(s.log.generation, s.term))
        self.step_down()
