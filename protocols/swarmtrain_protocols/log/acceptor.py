"""A steward that does not lead: take the leader's entries, make them durable, sign for them.

Learners do the same before they vote, which is how the leader knows that they have caught up.
"""

from __future__ import annotations

from collections.abc import Callable

from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.entries import StewardsChanged
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.log.election import Election
from swarmtrain_protocols.log.snapshots import Snapshots
from swarmtrain_protocols.log.state import FOLLOWER, LEADER, LogState
from swarmtrain_protocols.messages.log import Append, AppendReply, WireEntry


class Acceptor:
    """Answers ``Append``."""

    def __init__(
        self,
        state: LogState,
        election: Election,
        snapshots: Snapshots,
        follow: Callable[[], None],
    ) -> None:
        self._s = state
        self._election = election
        self._snapshots = snapshots
        self._follow = follow
        self.behind: PeerId | None = None
        """The leader, while it has compacted what is missing here."""
        self._own: tuple[int, int, bytes, bytes] = (-1, -1, b"", b"")

    def on_append(self, peer: PeerId, m: Append) -> None:
        s = self._s
        if not s.trusts(peer):
            return  # the subscription brings what is needed to know this leader
        if m.term < s.term or m.generation < s.generation:
            self._reply(peer, ok=False, index=s.log.last_index)
            return
        if s.role == LEADER and m.term == s.term:
            s.fault(peer, PeerFault("unexpected", f"a second leader in term {m.term}"))
            return
        self._follow()
        if m.term > s.term:
            s.adopt_term(m.term)
        s.role = FOLLOWER
        s.set_leader(peer, m.term)
        self._election.heard_leader()
        matched = self._match(peer, m)
        if m.snapshot is not None:
            self._snapshots.on_certificate(peer, m.snapshot)
        s.save()
        hint = self._hint(m) if matched is None else s.log.last_index
        self.behind = peer if hint + 1 < m.first else None
        if matched is None:
            self._reply(peer, ok=False, index=hint)
        else:
            s.felt(m.pulse)
            self._reply(peer, ok=True, index=matched)

    def _match(self, peer: PeerId, m: Append) -> int | None:
        """Take over the entries; the index up to which the logs agree, None if they do not meet."""
        s, log = self._s, self._s.log
        before = m.start - 1
        if before > log.last_index or before < 0:
            return None
        if log.holds(before) and log.at(before).chain_hash != m.prev_hash:
            return None
        index = before
        if m.certificate is not None:
            s.try_commit(peer, m.certificate)
        for item in m.entries:
            index += 1
            if self._same(index, item):
                continue
            if index <= log.commit:
                return None  # never from a leader of this term: it holds all that is certified
            if not self._take(peer, index, item):
                index -= 1
                break
        if m.certificate is not None:
            s.try_commit(peer, m.certificate)
        return max(index, log.commit)

    def _same(self, index: int, item: WireEntry) -> bool:
        log = self._s.log
        if index > log.last_index:
            return False
        if index <= log.base.index:
            return True
        held = log.entry(index)
        return held.term == item.term and held.data == item.body

    def _take(self, peer: PeerId, index: int, item: WireEntry) -> bool:
        """Append one entry in place of whatever uncertified entry is there."""
        s, log = self._s, self._s.log
        try:
            entry = log.follow(log.at(index - 1), item)
        except PeerFault as fault:
            s.fault(peer, fault)
            return False
        if isinstance(entry.body, StewardsChanged) and any(
            i < index for i in log.changes_uncommitted()
        ):
            return False  # first the certificate of the earlier change
        if index <= log.last_index:
            s.truncate(index)
        log.append(entry)
        return True

    def _hint(self, m: Append) -> int:
        """Where the leader should try after: the end, or before the whole term that differs."""
        log = self._s.log
        index = m.start - 1
        if index > log.last_index or not log.holds(index):
            return log.last_index
        term = log.at(index).term
        while index > max(log.commit, log.base.index) and log.at(index).term == term:
            index -= 1
        return index

    def _reply(self, peer: PeerId, *, ok: bool, index: int) -> None:
        s = self._s
        s.send(
            peer,
            AppendReply(
                generation=s.log.generation,
                term=s.term,
                ok=ok,
                index=max(index, 0),
                commit=max(s.log.commit, 0),
                base=self._snapshots.index,
                signature=self._signature(index) if ok else b"",
                snapshot=self._snapshots.vote if ok else None,
            ),
        )

    def _signature(self, index: int) -> bytes:
        """Sign for an entry of the current term only; an older one may still be replaced."""
        s = self._s
        if not s.log.holds(index):
            return b""
        at = s.log.at(index)
        if at.term != s.term or at.view is None or not at.view.has_voter(s.me):
            return b""
        key = (at.term, index, at.chain_hash)
        if self._own[:3] != key:
            self._own = (*key, s.trust.sign(at.view, at.term, index, at.chain_hash))
        return self._own[3]
