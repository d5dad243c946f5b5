"""The replicated log as one core: Raft with certificates that any member can check (spec 04).

Two kinds of trust meet here. Stewards replicate and vote as Raft's servers do. Everybody, stewards
included, believes only what a certificate proves: a majority of signatures under the steward set
in force at that entry, a set that is itself certified back to the founder's key.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Effect, PeerId, earliest
from swarmtrain_protocols.entries import (
    EntryBody,
    Genesis,
    NoOp,
    Rewound,
    StewardsChanged,
    encode_body,
)
from swarmtrain_protocols.errors import CheckpointError, LocalProtocolError, PeerFault
from swarmtrain_protocols.identity import Keyring
from swarmtrain_protocols.log.acceptor import Acceptor
from swarmtrain_protocols.log.certificate import Trust
from swarmtrain_protocols.log.election import Election
from swarmtrain_protocols.log.events import (
    Committed,
    LogEntry,
    LogTimeouts,
    SnapshotLoaded,
)
from swarmtrain_protocols.log.feed import Feed
from swarmtrain_protocols.log.fence import Fence
from swarmtrain_protocols.log.follower import Follower
from swarmtrain_protocols.log.leader import Leadership
from swarmtrain_protocols.log.snapshots import Snapshots
from swarmtrain_protocols.log.state import FOLLOWER, LEADER, LogState
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.messages import log as m

_NEVER = math.inf


class LogCore:
    """One site's part in the replicated log; satisfies ``core.Core``.

    ``records`` are the ``Persist`` effects of earlier incarnations, in order and from the last
    ``reset`` on. ``genesis`` is given by the founding steward, which then starts as the only voter
    and leads at once. ``snapshot_of`` returns the ledger with exactly the events of all earlier
    ``drain`` calls applied; it is called from ``receive`` and ``tick`` only, and its bytes must be
    equal at all sites with equal ledgers. Whoever drains this core applies ``Committed`` before
    calling it again.
    """

    def __init__(
        self,
        *,
        run: bytes,
        founder: bytes,
        keyring: Keyring,
        rng: random.Random,
        now: float,
        records: Iterable[bytes],
        genesis: Genesis | None,
        snapshot_of: Callable[[], bytes],
        timeouts: LogTimeouts | None = None,
        compact_every: int = limits.LOG_COMPACT_ENTRIES,
    ) -> None:
        trust = Trust(run, founder, keyring)
        self._timeouts = timeouts or LogTimeouts()
        self._s = s = LogState(trust, rng, now, self._timeouts)
        self._snapshots = Snapshots(s, snapshot_of, compact_every)
        self._election = Election(s, self._lead, self._follow)
        self._follower = Follower(s, self._snapshots)
        self._feed = Feed(s, self._snapshots)
        self._acceptor = Acceptor(s, self._election, self._snapshots, self._follow)
        self._fence = Fence(s)
        self._leadership: Leadership | None = None
        self._emitted = -1
        self._save_at = _NEVER
        try:
            s.load(records)
        except PeerFault as fault:
            raise CheckpointError("the log on disk is damaged", str(fault)) from fault
        if s.log.snapshot is not None:
            self._loaded(SnapshotLoaded(s.log.base.index, s.log.snapshot.body.ledger))
        if genesis is not None and s.log.last_index < 0:
            self._found(genesis)
        if s.alone:
            self._election.campaign(pre=False)

    def _found(self, genesis: Genesis) -> None:
        s = self._s
        if genesis.steward != s.me:
            raise LocalProtocolError("genesis refused", "it names another steward than this site")
        try:
            entry = s.log.follow(s.log.last, m.WireEntry(0, encode_body(genesis)))
        except PeerFault as fault:
            raise LocalProtocolError("genesis refused", fault.why) from None
        s.log.append(entry)
        s.save()

    # --- what the layer above reads --------------------------------------------------------------

    @property
    def is_leader(self) -> bool:
        return self._s.role == LEADER

    @property
    def leader(self) -> PeerId | None:
        """Who leads as far as this site knows; itself included."""
        return self._s.leader

    @property
    def term(self) -> int:
        """The newest term this site knows of."""
        return max(self._s.term, self._s.leader_term)

    @property
    def generation(self) -> int:
        """The generation at the newest committed entry."""
        return self._s.log.generation

    @property
    def voters(self) -> tuple[bytes, ...]:
        """The stewards at the newest committed entry, in key order; empty before genesis.

        While the set is joint, these are the ones to come; see ``changing``.
        """
        view = self._s.log.committed_view
        return () if view is None else view.voters

    @property
    def commit_index(self) -> int:
        """Index of the newest committed entry, -1 without one."""
        return self._s.log.commit

    @property
    def last_index(self) -> int:
        return self._s.log.last_index

    @property
    def ready(self) -> bool:
        """True for a leader that knows of every committed entry: its no-op is committed."""
        return self._leadership is not None and self._leadership.ready

    @property
    def changing(self) -> bool:
        """True on a leader while the steward set is on its way to another."""
        return self._leadership is not None and self._leadership.changing

    @property
    def halted(self) -> bool:
        """True after a ``Conflict``."""
        return self._s.halted

    @property
    def timeouts(self) -> LogTimeouts:
        """The patience in force."""
        return self._s.timeouts

    def silent_s(self, now: float) -> float:
        """Seconds since this site last felt a leader who has a majority, itself or another."""
        return max(0.0, now - self._s.pulse_at)

    @property
    def source(self) -> PeerId | None:
        """Whom this site is subscribed to, if it is."""
        return self._follower.source

    # --- the four calls --------------------------------------------------------------------------

    def receive(self, now: float, peer: PeerId, message: Message) -> None:
        """Feed one message of the log; other kinds are the caller's mistake."""
        s = self._s
        self._begin(now)
        if s.halted or peer == s.me or self._fence.refuses(peer, message):
            return
        if isinstance(message, m.Append):
            self._acceptor.on_append(peer, message)
            if self._acceptor.behind is not None:
                self._follower.prefer_leader()
        elif isinstance(message, m.AppendReply):
            self._on_append_reply(peer, message)
        elif isinstance(message, m.Update):
            self._follower.on_update(peer, message)
        elif isinstance(message, m.Subscribe):
            self._feed.on_subscribe(peer, message)
        elif isinstance(message, m.VoteRequest):
            self._election.on_request(peer, message)
        elif isinstance(message, m.VoteReply):
            self._election.on_reply(peer, message)
        elif isinstance(message, m.SnapshotPiece):
            self._follower.on_piece(peer, message)
        elif isinstance(message, m.SnapshotWanted):
            self._feed.on_wanted(peer, message)
        elif isinstance(message, m.HandOver):
            self._election.on_hand_over(peer, message)
        elif isinstance(message, m.Unsubscribe):
            self._feed.on_unsubscribe(peer)
        elif isinstance(message, m.Unserved):
            self._follower.on_unserved(peer)
        elif isinstance(message, m.Recovered):
            self._on_recovered(peer, message)
        else:
            raise LocalProtocolError("not a message of the log", type(message).__name__)

    def tick(self, now: float) -> None:
        """Let time pass: elections, heartbeats, subscriptions, postponed writes."""
        self._begin(now)
        if self._s.halted:
            return
        if self._leadership is not None:
            self._leadership.tick()
        self._election.tick()
        self._follower.tick(self._acceptor.behind)
        self._feed.tick()
        self._fence.tick()
        if now >= self._save_at:
            self._s.save()
            self._s.save_certificates()
            self._save_at = _NEVER

    def deadline(self) -> float:
        """Monotonic seconds at which ``tick`` is wanted next."""
        if self._s.halted:
            return _NEVER
        if self._snapshots.due >= 0:
            return self._s.now
        following_at = self._follower.deadline(self._acceptor.behind)
        serving_at = earliest(self._feed.deadline(), self._fence.deadline())
        wanted_at = earliest(self._election.deadline(), following_at, serving_at, self._save_at)
        if self._leadership is not None:
            return earliest(wanted_at, self._leadership.deadline())
        return wanted_at

    def drain(self) -> list[Effect]:
        """Effects in order. Everything proposed since the last call travels together."""
        s = self._s
        if not s.halted:
            if self._leadership is not None:
                self._leadership.flush()
            self._feed.push()
            self._emit_committed()
            self._postpone_save()
        out, s.out = s.out, []
        return out

    # --- more calls ------------------------------------------------------------------------------

    def connected(self, now: float, peer: PeerId) -> None:
        """A link to ``peer`` is up."""
        self._advance(now)
        self._s.links[peer] = True
        self._fence.connected(peer)
        self._follower.connected(peer)
        if self._leadership is not None:
            self._leadership.connected(peer)

    def disconnected(self, now: float, peer: PeerId) -> None:
        """The link to ``peer`` broke; if it led, an election starts soon."""
        s = self._s
        self._advance(now)
        s.links.pop(peer, None)
        self._fence.disconnected(peer)
        self._feed.disconnected(peer)
        self._follower.disconnected(peer)
        if peer == s.leader and s.role != LEADER:
            self._election.suspect()
            s.set_leader(None, s.leader_term)

    def propose(self, now: float, body: EntryBody) -> int:
        """Append an entry to the log of this leader; returns its index.

        Raises:
            LocalProtocolError: not the leader, too much uncommitted, or the entry is not allowed.
        """
        self._advance(now)
        s, log = self._s, self._s.log
        if s.role != LEADER or s.halted:
            raise LocalProtocolError("proposal refused", "this site does not lead")
        if log.last_index - log.commit >= limits.LOG_UNCOMMITTED_MAX:
            raise LocalProtocolError("proposal refused", "too many uncommitted entries")
        if isinstance(body, StewardsChanged | Genesis | NoOp):
            raise LocalProtocolError("proposal refused", f"{type(body).__name__} is the log's own")
        view = log.view
        assert view is not None
        if isinstance(body, Rewound) and body.generation != view.generation + 1:
            raise LocalProtocolError("proposal refused", f"generation is {view.generation}")
        if len(encode_body(body)) > limits.ENTRY_BYTES_MAX:
            raise LocalProtocolError("proposal refused", "the entry is too large")
        try:
            return s.extend(body).index
        except PeerFault as fault:
            raise LocalProtocolError("proposal refused", str(fault)) from None

    def change_voters(self, now: float, voters: tuple[PeerId, ...]) -> None:
        """Aim for another steward set: learners catch up, then a joint set, then the new one.

        Raises:
            LocalProtocolError: not the leader, a joint set in force, or a set that is not allowed:
                1, 3, 5 or 7 keys, each with the founder's grant.
        """
        self._advance(now)
        if self._leadership is None or self._s.halted:
            raise LocalProtocolError("steward set refused", "this site does not lead")
        self._leadership.change_voters(voters)

    def hand_over(self, now: float, to: PeerId | None = None) -> None:
        """Ask another steward, the best one by default, to lead at once, and step down.

        Raises:
            LocalProtocolError: not the leader, or nobody else votes.
        """
        self._advance(now)
        if self._leadership is None or self._s.alone or self._s.halted:
            raise LocalProtocolError("hand-over refused", "not the leader, or the only steward")
        self._leadership.flush()
        if self._leadership is not None:
            self._leadership.hand_over(to)

    def set_stewards_known(self, now: float, peers: Sequence[PeerId]) -> None:
        """Sites that may serve the log, for a site that knows of none."""
        self._advance(now)
        self._follower.know(peers)

    def set_handed_over(self, count: int) -> None:
        """How often the run was handed over: the log is not begun again by an earlier founder."""
        self._s.handed_over = count

    def set_patience(self, now: float, factor: float) -> None:
        """Scale all timeouts by how slow links and machines were measured to be.

        ``factor`` is kept within 1 and ``LOG_PATIENCE_FACTOR_MAX``. A timer that runs is not moved.
        """
        self._advance(now)
        bounded = min(max(factor, 1.0), limits.LOG_PATIENCE_FACTOR_MAX)
        self._s.timeouts = self._timeouts.scaled(bounded)

    # --- inside ----------------------------------------------------------------------------------

    def _advance(self, now: float) -> None:
        self._s.now = max(self._s.now, now)

    def _begin(self, now: float) -> None:
        self._advance(now)
        if self._snapshots.due >= 0 and not self._s.halted:
            self._snapshots.take()

    def _on_append_reply(self, peer: PeerId, reply: m.AppendReply) -> None:
        s = self._s
        if reply.term > s.term and s.trusts(peer):
            self._follow()
            s.adopt_term(reply.term)
        elif reply.term == s.term and self._leadership is not None:
            self._leadership.on_reply(peer, reply)

    def _on_recovered(self, peer: PeerId, message: m.Recovered) -> None:
        """The founder replaced this log: no part in it any more, and look for the new one."""
        if self._fence.proven(peer, message.recovery):
            self._follow()
            self._s.set_leader(None, self._s.leader_term)
            self._follower.reload(peer)

    def _lead(self) -> None:
        s = self._s
        s.role = LEADER
        s.set_leader(s.me, s.term)
        self._acceptor.behind = None
        self._leadership = Leadership(s, self._snapshots, self._follow)
        self._leadership.start()

    def _follow(self) -> None:
        """Stop leading or standing for election."""
        s = self._s
        if s.role == LEADER:
            self._leadership = None
            s.set_leader(None, s.term)
        if s.role != FOLLOWER:
            s.role = FOLLOWER
            self._election.rest()

    def _loaded(self, event: SnapshotLoaded) -> None:
        self._emitted = event.index
        self._s.emit(event)

    def _emit_committed(self) -> None:
        """Emit what is certified, up to where the next snapshot is to be taken."""
        s, log = self._s, self._s.log
        loaded = self._follower.take_loaded()
        if loaded is not None and loaded.index > self._emitted:
            self._loaded(loaded)
        if self._snapshots.due >= 0 or self._emitted >= log.commit:
            return
        upto = self._snapshots.stop_before(self._emitted, log.commit)
        found = (log.entry(index) for index in range(self._emitted + 1, upto + 1))
        s.emit(Committed(tuple(LogEntry(e.index, e.term, e.body) for e in found)))
        self._emitted = upto
        self._snapshots.emitted(upto)

    def _postpone_save(self) -> None:
        """Sites without a vote write behind: nobody relies on their disk, and it saves syncs."""
        s = self._s
        if s.saved < s.log.last_index or s.certificate_unsaved:
            self._save_at = min(self._save_at, s.now + s.timeouts.election_s)
