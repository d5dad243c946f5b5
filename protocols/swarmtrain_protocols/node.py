"""One peer: log, ledger, rounds, membership and DHT as one core. Spec 00.

Everything that happens inside a call is settled before the call returns: committed entries reach
the ledger and the round cores at their place in the order of effects, so that whatever follows
from them stands behind the ``Persist`` that made them durable.
"""

from __future__ import annotations

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import Connect, Effect, Emit, Learn, PeerId, Send, earliest
from swarmtrain_protocols.dht.events import DhtFailed, DhtFound
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.leadership import FOR_ROUND_LEADER
from swarmtrain_protocols.ledger import Ledger, load_snapshot
from swarmtrain_protocols.log.events import Committed, SnapshotLoaded
from swarmtrain_protocols.messages import Message, RoundKey
from swarmtrain_protocols.messages import dht as dm
from swarmtrain_protocols.messages import log as lm
from swarmtrain_protocols.messages import member as mm
from swarmtrain_protocols.messages import pipeline as pm
from swarmtrain_protocols.messages import rounds as rm
from swarmtrain_protocols.node_events import LedgerChanged
from swarmtrain_protocols.node_parts import NodeParts
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.member import Offer

PUMP_MAX = 10_000


class NodeCore(NodeParts):
    """A whole peer without its operating system. Satisfies ``core.Core``."""

    # -- what the shell calls --------------------------------------------------------------

    def receive(self, now: float, peer: PeerId, message: Message) -> None:
        """Feed a message from an authenticated peer."""
        if type(message).__module__ == dm.__name__:
            self.receive_dht(now, peer, message)
            return
        if self.detector.heard(now, peer):
            self.leader.step(now)
        self._dispatch(now, peer, message)
        self._pump(now)

    def receive_dht(self, now: float, peer: PeerId, message: Message) -> bool:
        """As ``receive``, for a message of the DHT; False if it has moved any other core too.

        Most only make the DHT say something: then nothing has to be carried between the cores, and
        no deadline but that of the DHT is another than before, so the others are not asked again.
        """
        self.dht.receive(now, peer, message)
        effects = self.dht.drain()
        if all(isinstance(effect, Send) and effect.peer != self.me for effect in effects):
            self._ready += effects
            return True
        self._raw += effects
        self._pump(now)
        return False

    def connected(self, now: float, peer: PeerId, addresses: tuple[str, ...] = ()) -> None:
        """A link to ``peer`` is up; ``addresses`` are where it says it listens."""
        self._linked[peer] = None
        self.log.connected(now, peer)
        self.dht.connected(now, peer, addresses)
        self.member.connected(peer)
        self.leader.connected(peer)
        self.joiner.linked(now)
        self.pipeline.connected(now, peer)
        if peer == self.leadership.leader:
            self.leadership.announce(now)
        self._pump(now)

    def heard(self, now: float, peer: PeerId) -> None:
        """Bytes came from ``peer`` that are no message: it lives."""
        if self.detector.heard(now, peer):
            self.leader.step(now)
            self._pump(now)

    def answered(self, now: float, peer: PeerId, rtt_s: float) -> bool:
        """``peer`` answered a question of the link after ``rtt_s``; False: nothing follows."""
        if not self.detector.answered(now, peer, rtt_s):
            return False
        self.leader.step(now)
        self._pump(now)
        return True

    def disconnected(self, now: float, peer: PeerId) -> None:
        self._linked.pop(peer, None)
        self.detector.disconnected(peer)
        self.log.disconnected(now, peer)
        self.dht.disconnected(now, peer)
        self.fetches.disconnected(now, peer)
        self.leader.disconnected(now, peer)
        self.pipeline.disconnected(now, peer)
        self._pump(now)

    def unreachable(self, now: float, peer: PeerId) -> None:
        """A link to ``peer`` could not be made: whoever waits for it need not."""
        self.dht.unreachable(now, peer)
        self._pump(now)

    def tick(self, now: float) -> None:
        self.log.tick(now)
        self.dht.tick(now)
        self.fetches.tick(now)
        self.member.tick(now)
        if self.member.announcement_due(now):
            self.leadership.announce(now)
        self.catchup.tick(now)
        if now >= self.detector.deadline():
            self._look(now)
        self.leader.step(now)
        self.shepherd.step(now)
        self.joiner.step(now, self._linked)
        self.pipeline.tick(now)
        self._pump(now)

    def deadline(self) -> float:
        if self._others_at is None or self._raw:  # a core was called past this one
            data_at = earliest(self.fetches.deadline(), self.catchup.deadline())
            rounds_at = earliest(self.member.deadline(), self.leader.deadline())
            people_at = earliest(self.shepherd.deadline(), self.joiner.deadline())
            self._others_at = earliest(self.log.deadline(), data_at, rounds_at, people_at)
        rest_at = earliest(self.detector.deadline(), self.pipeline.deadline())
        return earliest(self._others_at, self.dht.deadline(), rest_at)

    def drain(self) -> list[Effect]:
        effects, self._ready = self._ready, []
        return effects

    # -- requests of the layer above -------------------------------------------------------

    def contribute(self, now: float, offer: Offer) -> None:
        """Announce an encoded contribution; the outcome comes as ``ContributionDecided``.

        Raises:
            LocalProtocolError: the channel has an undecided contribution.
        """
        self.member.offer(now, offer)
        self._pump(now)

    def withdraw(self, now: float, channel: str) -> bool:
        taken = self.member.withdraw(now, channel)
        self._pump(now)
        return taken

    def propose(self, now: float, request: mm.Propose) -> None:
        """Ask the leader to log an entry, of one of the kinds that members may ask for."""
        leader = self.leadership.leader
        if leader is None:
            raise LocalProtocolError("no leader is known", "", "try again when there is one")
        self._raw.append(Send(leader, request))
        self._pump(now)

    def restore(self, now: float, channel: str, round_number: int, state_hash: bytes) -> None:
        """The shell has a state of ``channel``: the one before ``round_number``."""
        self.catchup.restore(channel, round_number, state_hash)
        self.catchup.reconcile(now)
        self.catchup.announce()
        self.pipeline.reconcile(now)
        self._pump(now)

    def stored_earlier(self, channel: str, round_number: int, root: bytes) -> None:
        """A result from an earlier life lies on disk; it counts if the log says it was committed.

        Comes before the ``restore`` of its channel.
        """
        self.member.in_place[channel, round_number] = root

    def set_training(self, now: float, training: bool) -> None:
        """A trainer is at work here (or no more): its contributions are worth waiting for."""
        if training != self.catchup.training:
            self.catchup.training = training
            self.catchup.announce()
            self._pump(now)

    def set_worker(self, now: float, values_max: int) -> None:
        """A trainer with room for so many parameters computes stages here; 0: none (any more)."""
        self.pipeline.set_worker(now, values_max)

    def finished(self, now: float, done: bool) -> None:
        """The trainer of this site has done its planned steps (or has taken up work again)."""
        self.leadership.finished = done
        self.leadership.say_finished()
        self._pump(now)

    def dht_store(self, now: float, key: bytes, value: bytes, ttl_s: float) -> int:
        """Publish MessagePack bytes; ``DhtStored`` or ``DhtFailed`` carry the handle."""
        handle = self.dht.store(now, key, value, ttl_s, keep=True)
        self._pump(now)
        return handle

    def dht_get(self, now: float, key: bytes) -> int:
        """Look for all publishers' records; ``DhtFound`` carries the handle."""
        handle = self.dht.get_all(now, key)
        self._pump(now)
        return handle

    def leave(self, now: float, reason: str, at_once: bool = False) -> None:
        """Ask to be let go; the ledger no longer lists this node when it may stop."""
        self.joiner.leave(now, reason, at_once)
        self.joiner.step(now, self._linked)
        self._pump(now)

    # -- answers of the data plane ---------------------------------------------------------

    def fetched(self, now: float, ticket: int) -> None:
        self.fetches.finished(now, ticket, None)
        self._pump(now)

    def fetch_failed(self, now: float, ticket: int, reason: str) -> None:
        self.fetches.finished(now, ticket, reason)
        self._pump(now)

    def measured(self, now: float, effect: fx.MeasurePart, square: float) -> None:
        self.member.measured(now, effect, square)
        self._pump(now)

    def reduced(self, now: float, key: RoundKey, part: int, root: bytes) -> None:
        self.member.reduced(now, key, part, root)
        self._pump(now)

    def stored(
        self, now: float, key: RoundKey, root: bytes, durable: bool, square_norm: float = 0.0
    ) -> None:
        """``square_norm``: of the decoded result, where its rounds are steps of a stage."""
        self.member.stored(now, key, root, durable, square_norm)
        self.catchup.reconcile(now)
        self._pump(now)

    def applied(self, now: float, channel: str, round_number: int, state_hash: bytes) -> None:
        self.catchup.applied(now, channel, round_number, state_hash)
        self.pipeline.reconcile(now)
        self._pump(now)

    def completed(self, now: float, result: fx.WholeResult) -> None:
        self.catchup.completed(now, result)
        self._pump(now)

    def prepared(
        self, now: float, channel: str, root: bytes, have: tuple[int, ...], compare: bool
    ) -> None:
        """See ``CatchUp.prepared``."""
        self.catchup.prepared(now, channel, root, have, compare)
        self._pump(now)

    def install_failed(self, now: float, channel: str, reason: str, spoilt: bool = False) -> None:
        """``spoilt``: it is the own state that is of no use (``StateSpoilt``)."""
        self.catchup.install_failed(now, channel, reason, spoilt)
        self._pump(now)

    # -- inside ----------------------------------------------------------------------------

    def _dispatch(self, now: float, peer: PeerId, message: Message) -> None:
        kind = type(message).__module__
        if kind == lm.__name__:
            self.log.receive(now, peer, message)
        elif kind == dm.__name__:
            self.dht.receive(now, peer, message)
        elif self.leadership.too_early(peer, message):
            return
        elif isinstance(message, FOR_ROUND_LEADER):
            self.leader.receive(now, peer, message)
        elif kind == pm.__name__:
            self.pipeline.receive(now, peer, message)
        elif kind == rm.__name__:
            self.member.receive(now, peer, message)
        elif isinstance(message, mm.SnapshotQuery):
            self.catchup.queried(peer, message)
        elif isinstance(message, mm.SnapshotOffer):
            self.catchup.offered(now, peer, message)
            self.pipeline.healing.offered(now, peer, message)
        else:
            self.reception.receive(now, peer, message)

    # -- the pump --------------------------------------------------------------------------

    def _pump(self, now: float) -> None:
        """Carry effects between the cores until none is left inside."""
        self._others_at = None
        for _ in range(PUMP_MAX):
            self.member.flush_reports()
            batch = [*self.log.drain(), *self.dht.drain(), *self._raw]
            self._raw.clear()
            for effect in batch:
                self._take(now, effect)
            if self._changed:
                self._changed = False
                self._reconcile(now)
            while self._loopback:
                self._dispatch(now, self.me, self._loopback.pop(0))
            self.leadership.follow(now)
            self.detector.wake(now, self.leader.waits or self.fetches.waits)
            if not batch and not self._raw:
                return
        raise AssertionError("the cores keep each other busy for ever")

    def _look(self, now: float) -> None:
        """Who of those that are waited for is frozen?"""
        waited = [*self.leader.waited(now), *self.fetches.waited(now)]
        for peer in self.detector.look(now, (p for p in waited if p in self._linked)):
            self.fetches.silent(now, peer)

    def _take(self, now: float, effect: Effect) -> None:
        if isinstance(effect, Send) and effect.peer == self.me:
            self._loopback.append(effect.message)
        elif isinstance(effect, Connect) and effect.peer == self.me:
            return
        elif isinstance(effect, Connect) and self._is_unknown(effect):
            self.finder.look_up(now, effect.peer)
        elif isinstance(effect, Emit) and isinstance(effect.event, DhtFound | DhtFailed):
            if not self.finder.answered(effect.event):
                self._ready.append(effect)
        elif isinstance(effect, Emit) and isinstance(effect.event, Committed):
            self._committed(now, effect.event)
        elif isinstance(effect, Emit) and isinstance(effect.event, SnapshotLoaded):
            self._adopt(now, load_snapshot(effect.event.data))
        else:
            self._ready.append(effect)

    def _adopt(self, now: float, ledger: Ledger) -> None:
        """A snapshot replaces the ledger; every core looks at the new one from now on."""
        before, self.ledger = self.ledger.generation, ledger
        membership = (self.joiner, self.shepherd, self.reception, self.leadership)
        for core in (self.member, self.catchup, self.leader, *membership, self.pipeline):
            core.ledger = ledger
        self.member.jumped()
        if ledger.generation != before:
            self._rewound(now)
        others = [m for m in ledger.ordered_members() if m.id != self.me]
        self._ready += [Learn(PeerId(m.id), m.addresses) for m in others]
        self._changed = True

    def _committed(self, now: float, event: Committed) -> None:
        applied: list[tuple[int, e.EntryBody, bool]] = []
        for entry in event.entries:
            body = entry.body
            accepted = self.ledger.apply(entry.index, body)
            applied.append((entry.index, body, accepted))
            if isinstance(body, e.MemberJoined) and accepted and body.member != self.me:
                self._ready.append(Learn(PeerId(body.member), body.addresses))
            elif isinstance(body, e.MemberLeft | e.MemberBanned) and accepted:
                self.dht.forget(now, PeerId(body.member))
                self.joiner.turned_out(body)
            elif isinstance(body, e.Rewound) and accepted:
                self._rewound(now)
            elif accepted:
                self.member.logged(body)
                self.pipeline.logged(body)
        self._ready.append(Emit(LedgerChanged(tuple(applied))))
        self._changed = True

    def _rewound(self, now: float) -> None:
        self.member.rewound(now)
        self.catchup.rewound()
        self.catchup.announce()

    def _is_unknown(self, effect: Connect) -> bool:
        """Neither the log nor the caller says where that peer is."""
        return (
            not effect.addresses
            and effect.peer not in self._linked
            and effect.peer not in self.ledger.members
        )

    def _reconcile(self, now: float) -> None:
        self.member.reconcile(now)
        self.catchup.reconcile(now)
        self.leader.reconcile(now)
        self.pipeline.reconcile(now)
        self.shepherd.step(now)
        self.joiner.step(now, self._linked)
        if self.joiner.is_member:
            self.finder.publish(now)
        stewards = [PeerId(v) for v in self.ledger.voters if v != self.me]
        self.log.set_stewards_known(now, stewards)
        self.log.set_handed_over(len(self.ledger.access.deeds))
        self._raw += [Connect(s) for s in stewards if s not in self._linked]

    def _leader_changed(self, now: float, leader: PeerId | None) -> None:
        self.member.leader = self.catchup.leader = self.reception.leader = leader
        silent = self.log.silent_s(now) >= self.log.timeouts.election_s
        if leader == self.me and self._led in self._linked and silent:
            self.detector.doubt(now, self._led)
        self._led = leader or self._led
        self.joiner.leader_changed(now, leader)
        self.pipeline.leader_changed(now, leader)

    def _announce(self, now: float) -> None:
        self.member.announce(now)
        self.catchup.announce()
        self.pipeline.announce(now)
        if self.leadership.leading:
            self.joiner.step(now, self._linked)
