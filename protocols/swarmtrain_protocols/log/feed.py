"""Serving subscribers from the certified prefix; any site that holds one can.

Hot path: what this turn certified goes out in one message per subscriber. Those who are behind
pull: a few messages, then the sender waits for the next ``Subscribe``, so that a slow link never
has more than a window queued.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.log.snapshots import Snapshots
from swarmtrain_protocols.log.state import LogState
from swarmtrain_protocols.messages.log import (
    Certificate,
    SnapshotCertificate,
    SnapshotPiece,
    SnapshotWanted,
    Subscribe,
    Unserved,
    Update,
    WireEntry,
)


@dataclass(slots=True)
class Subscriber:
    """``next``: first index to send. ``verified``: up to where it is proven over there.

    ``told``: index of the newest snapshot certificate sent.
    """

    next: int
    verified: int
    told: int
    live: bool
    sent_at: float
    expires_at: float


Shared = dict[tuple[int, int, bool], Update | None]
"""Messages of one turn by (next, verified, last of a pull)."""


class Feed:
    """The subscribers of this site."""

    def __init__(self, state: LogState, snapshots: Snapshots) -> None:
        self._s = state
        self._snapshots = snapshots
        self.subscribers: dict[PeerId, Subscriber] = {}
        self._life_at = state.now + state.timeouts.feed_s
        self._pushed: tuple[int, int, int] | None = None
        """Commit, newest certificate and snapshot that all who keep up were told of."""

    def deadline(self) -> float:
        return self._life_at if self.subscribers else math.inf

    def tick(self) -> None:
        """Forget the silent, and give the others a sign of life."""
        s = self._s
        if not self.subscribers or s.now < self._life_at:
            return
        self._life_at = s.now + s.timeouts.feed_s
        for peer in [p for p, x in self.subscribers.items() if s.now >= x.expires_at]:
            del self.subscribers[peer]
        shared: dict[int, Update] = {}  # most stand at the same point
        for peer, item in self.subscribers.items():
            if s.now >= item.sent_at + s.timeouts.feed_s / 2:
                self._idle(peer, item, shared)

    def disconnected(self, peer: PeerId) -> None:
        self.subscribers.pop(peer, None)

    def on_subscribe(self, peer: PeerId, m: Subscribe) -> None:
        s = self._s
        full = len(self.subscribers) >= limits.LOG_SUBSCRIBERS_MAX and peer not in self.subscribers
        if s.log.commit < 0 or full:
            s.send(peer, Unserved("empty" if s.log.commit < 0 else "full"))
            return
        item = Subscriber(
            next=m.start,
            verified=min(m.verified, m.start) - 1,
            told=0,
            live=True,
            sent_at=s.now,
            expires_at=s.now + s.timeouts.lease_s,
        )
        self.subscribers[peer] = item
        if not self._push(peer, item, {}):
            self._idle(peer, item, {})
        if self._is_behind(item) or item.told < self._snapshots.index:
            self._pushed = None

    def on_unsubscribe(self, peer: PeerId) -> None:
        self.subscribers.pop(peer, None)

    def on_wanted(self, peer: PeerId, m: SnapshotWanted) -> None:
        if peer in self.subscribers:
            self._pieces(peer, m.index, m.offset)

    def push(self) -> None:
        """Send what is newly certified to all who keep up."""
        log = self._s.log
        there = (log.commit, self._newest(), self._snapshots.index)
        if there == self._pushed:
            return
        shared: Shared = {}
        life: dict[int, Update] = {}
        behind = False
        for peer, item in self.subscribers.items():
            if item.live:
                self._push(peer, item, shared)
                if item.told < self._snapshots.index:
                    self._idle(peer, item, life)
                behind = behind or self._is_behind(item)
        self._pushed = None if behind else there

    def _newest(self) -> int:
        latest = self._s.log.latest
        return -1 if latest is None else latest.index

    def _is_behind(self, item: Subscriber) -> bool:
        return item.next <= self._s.log.commit or item.verified < self._newest()

    def _push(self, peer: PeerId, item: Subscriber, shared: Shared) -> bool:
        """Send at most one pull's worth; False if there was nothing to send."""
        log = self._s.log
        if item.next <= log.commit and item.next < log.first:
            item.live = False
            self._pieces(peer, -1, 0)
            return True
        newest = self._newest()
        for sent in range(limits.LOG_MESSAGES_PER_PULL):
            if item.next > log.commit and item.verified >= newest:
                return sent > 0
            message = self._news(item, shared, last=sent + 1 == limits.LOG_MESSAGES_PER_PULL)
            if message is None:
                return sent > 0
            self._s.send(peer, message)
            item.sent_at = self._s.now
            item.next = message.start + len(message.entries)
            item.live = not message.more
            if message.certificate is not None:
                item.verified = message.certificate.index
        return True

    def _news(self, item: Subscriber, shared: Shared, *, last: bool) -> Update | None:
        """The next message for a subscriber, one object for all that stand at the same point."""
        key = (item.next, item.verified, last)
        if key not in shared:
            log = self._s.log
            batch = log.slice(item.next, log.commit)
            end = item.next + len(batch) - 1
            certificate = log.certificate_for(item.verified, min(end, log.commit))
            shared[key] = None
            if batch or certificate is not None:
                shared[key] = self._message(
                    item.next, more=last and end < log.commit, entries=batch, proof=certificate
                )
        return shared[key]

    def _message(
        self,
        start: int,
        *,
        more: bool = False,
        entries: tuple[WireEntry, ...] = (),
        proof: Certificate | None = None,
        snapshot: SnapshotCertificate | None = None,
    ) -> Update:
        s = self._s
        return Update(
            generation=s.log.generation,
            leader_term=s.leader_term,
            leader=s.leader or b"",
            pulse=s.pulse,
            start=start,
            length=s.log.commit + 1,
            more=more,
            entries=entries,
            certificate=proof,
            snapshot=snapshot,
        )

    def _idle(self, peer: PeerId, item: Subscriber, shared: dict[int, Update]) -> None:
        """A sign of life, which also carries the snapshot that others may compact to."""
        if item.next not in shared:
            message = self._message(item.next, snapshot=self._snapshots.certificate)
            shared[item.next] = message
        self._s.send(peer, shared[item.next])
        item.sent_at = self._s.now
        item.told = self._snapshots.index

    def _pieces(self, peer: PeerId, index: int, offset: int) -> None:
        """Send a window of the snapshot file; another file than asked starts from its beginning."""
        found = self._snapshots.file(index)
        if found is None:
            self._s.send(peer, Unserved("no snapshot"))
            return
        at, data = found
        start = offset if at == index else 0
        end = min(len(data), start + limits.SNAPSHOT_PIECES_PER_PULL * limits.SNAPSHOT_PIECE_BYTES)
        for where in range(start, end, limits.SNAPSHOT_PIECE_BYTES):
            piece = data[where : min(end, where + limits.SNAPSHOT_PIECE_BYTES)]
            self._s.send(peer, SnapshotPiece(at, len(data), where, piece))
