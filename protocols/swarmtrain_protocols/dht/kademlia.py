"""The DHT core: Kademlia among authenticated peers, sans-I/O (spec 03).

It finds things and never decides. The link layer proves who a peer is and calls ``connected``;
identifiers come from that key, so nobody can claim another place. Peers without an address are
clients: they are served, but nobody is sent to them and they hold nothing for others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from swarmtrain_protocols import limits
from swarmtrain_protocols.addresses import split_address
from swarmtrain_protocols.core import Effect, Emit, PeerId, Send
from swarmtrain_protocols.dht import records as rec
from swarmtrain_protocols.dht.events import DhtBootstrapped, DhtFailed, DhtFound, DhtRefused
from swarmtrain_protocols.dht.ids import Contact, id_bytes, id_from_bytes, key_id
from swarmtrain_protocols.dht.lookup import Lookup
from swarmtrain_protocols.dht.publisher import Publisher
from swarmtrain_protocols.dht.requests import Meter, Reply, Requests
from swarmtrain_protocols.dht.routing import RoutingTable
from swarmtrain_protocols.dht.search import Search, Searches
from swarmtrain_protocols.errors import LocalProtocolError, PeerFault
from swarmtrain_protocols.identity import Keyring
from swarmtrain_protocols.messages.dht import (
    FindNode,
    FindValue,
    NodeInfo,
    Nodes,
    SignedRecord,
    StoreRecord,
    StoreReply,
    Values,
)

if TYPE_CHECKING:
    from swarmtrain_protocols.messages import Message

_RECORD_FRAME_BYTES = 160
"""Bytes of a record on the wire besides its value, rounded up."""


class DhtCore:
    """One node. Satisfies ``core.Core``; results come as ``Emit`` of the classes in ``events``.

    Args:
        keyring: identity of this site; its records are signed with it.
        rng: choices (refresh targets, jitter); never keys.
        now: monotonic seconds; ``wall_s``: Unix wall clock at the same moment.
        addresses: where this node can be dialled; empty: it cannot.
        run: 32 bytes that are under every signature, so that records stay in their run.
    """

    def __init__(
        self,
        *,
        keyring: Keyring,
        rng: Random,
        now: float,
        wall_s: float,
        addresses: tuple[str, ...],
        run: bytes = bytes(32),
    ) -> None:
        self.me = Contact(keyring.peer_id, usable(addresses))
        self.counters: dict[str, int] = {}
        self.run = run
        self.keyring = keyring
        self.rng = rng
        self.table = RoutingTable(self.me.id)
        self.held = rec.RecordStore()
        self._wall_offset_s = wall_s - now
        self._out: list[Effect] = []
        self._links: dict[PeerId, tuple[str, ...]] = {}
        self.requests = Requests(self._out, self._links.__contains__, now)
        self._served: dict[PeerId, Meter] = {}
        self.searches = Searches(self)
        self._handles = 0
        self._housekeeping_at = now + limits.DHT_HOUSEKEEPING_S
        self._refresh_at = now
        self._publisher = Publisher(self)

    # --- calls of the layer above ----------------------------------------------------------------

    def store(
        self, now: float, key: str | bytes, value: bytes, ttl_s: float, *, keep: bool = False
    ) -> int:
        """Publish ``value`` (MessagePack, at most 1 kB) under ``key`` for ``ttl_s`` seconds.

        The record replaces this site's earlier one under the key. With ``keep`` it is renewed
        before it expires until ``withdraw``; without, it is only kept replicated.

        Returns:
            A handle; ``DhtStored`` or ``DhtFailed`` will carry it.

        Raises:
            LocalProtocolError: value, key, time to live or number of keys out of bounds.
        """
        name = _name(key)
        if len(value) > limits.DHT_VALUE_BYTES_MAX or not rec.is_messagepack(value):
            raise LocalProtocolError("DHT value refused", "it must be MessagePack of at most 1 kB")
        if not 1.0 <= ttl_s <= limits.DHT_TTL_S_MAX:
            raise LocalProtocolError(
                "DHT time to live refused", f"1 to {limits.DHT_TTL_S_MAX:.0f} seconds"
            )
        handle = self._handle()
        self._publisher.publish(now, handle, name, value, ttl_s, keep)
        self._settle(now)
        return handle

    def withdraw(self, now: float, key: str | bytes) -> None:
        """Stop renewing what was stored under ``key``; replicas go when it expires."""
        self._publisher.withdraw(now, _name(key))

    def get(self, now: float, key: str | bytes) -> int:
        """Look for the record with the latest expiry under ``key``; ``DhtFound`` has the handle."""
        return self._find(now, _name(key), only_latest=True)

    def get_all(self, now: float, key: str | bytes) -> int:
        """Look for the records of all publishers under ``key``."""
        return self._find(now, _name(key), only_latest=False)

    def bootstrap(self, now: float, contacts: Iterable[tuple[PeerId, tuple[str, ...]]] = ()) -> int:
        """Find the nodes nearest to this one, starting from ``contacts`` and from live links."""
        seeds = tuple(Contact(peer, usable(addresses)) for peer, addresses in contacts)
        handle = self._handle()
        self.searches.start(
            now, Search(self.me.id, partial(self._bootstrapped, handle), seeds=seeds)
        )
        self._settle(now)
        return handle

    def connected(self, now: float, peer: PeerId, addresses: tuple[str, ...] = ()) -> None:
        """A link to ``peer`` is up; ``addresses`` are where it says it can be dialled."""
        alone = len(self.table) == 0
        self._links[peer] = usable(addresses)
        self._alive(now, Contact(peer))
        if alone and len(self.table):
            self.searches.start(now, Search(self.me.id, _nothing))
        self._settle(now)

    def disconnected(self, now: float, peer: PeerId) -> None:
        """The link broke, or could not be made."""
        self._links.pop(peer, None)
        self._served.pop(peer, None)
        self.requests.lost(now, peer)
        self._settle(now)

    def forget(self, now: float, peer: PeerId) -> None:
        """A peer was banned or has left: it is not asked and not named to others."""
        self.table.remove(Contact(peer))
        self.disconnected(now, peer)
        self.table.remove(Contact(peer))

    def wall(self, now: float) -> float:
        """Unix wall clock in seconds at monotonic ``now``."""
        return now + self._wall_offset_s

    # --- core.Core -------------------------------------------------------------------------------

    def receive(self, now: float, peer: PeerId, message: Message) -> None:
        """Feed one DHT message from an authenticated peer.

        Raises:
            LocalProtocolError: ``message`` does not belong to the DHT.
        """
        if isinstance(message, (Nodes, Values, StoreReply)):
            fault = self.requests.answer(peer, message, now)
            if fault is not None:
                self.blame(fault)
        elif isinstance(message, (FindNode, FindValue, StoreRecord)):
            if self._admit(now, peer):
                self._alive(now, Contact(peer))
                self._serve(now, peer, message)
        else:
            raise LocalProtocolError("not a DHT message", type(message).__name__)
        self._settle(now)

    def tick(self, now: float) -> None:
        self.requests.tick(now)
        self._settle(now)
        self.searches.tick(now)
        if now >= self._housekeeping_at:
            self._housekeeping_at = now + limits.DHT_HOUSEKEEPING_S
            self._keep_house(now)
        self._settle(now)

    def deadline(self) -> float:
        return min(self.requests.deadline(), self.searches.deadline(), self._housekeeping_at)

    def drain(self) -> list[Effect]:
        out = self._out[:]
        self._out.clear()
        return out

    # --- results ---------------------------------------------------------------------------------

    def _find(self, now: float, name: bytes, *, only_latest: bool) -> int:
        handle = self._handle()
        target = key_id(name)
        finish = partial(self._found, handle, name, only_latest)
        if not self.searches.start(now, Search(target, finish, key=id_bytes(target))):
            self.emit(DhtFailed(handle, name, "busy"))
        self._settle(now)
        return handle

    def _found(
        self, handle: int, name: bytes, only_latest: bool, now: float, search: Search
    ) -> None:
        wall_s = self.wall(now)
        for record in [*self.held.under(search.key, wall_s), *self._publisher.own(search.key)]:
            other = search.found.get(record.publisher)
            if other is None or rec.rank(record) > rec.rank(other):
                search.found[record.publisher] = record
        fresh: list[SignedRecord] = []
        for publisher in sorted(search.found):
            record = search.found[publisher]
            slot = (record.key, record.publisher)
            if record.expires_s > wall_s and record.sequence >= self.held.marks.sequence(slot):
                self.held.marks.see(record, wall_s)
                fresh.append(record)
        lookup = search.lookup
        assert lookup is not None
        if not fresh and not lookup.answers and lookup.failures:
            self.emit(DhtFailed(handle, name, "unreachable"))
            return
        best = rec.latest(fresh)
        if only_latest and best is not None:
            fresh = [best]
        self.emit(DhtFound(handle, name, tuple(fresh)))

    def _bootstrapped(self, handle: int, _now: float, search: Search) -> None:
        assert search.lookup is not None
        if search.lookup.failures and not search.lookup.answers:
            self.emit(DhtFailed(handle, b"", "unreachable"))
        else:
            self.emit(DhtBootstrapped(handle, len(self.table)))

    # --- serving others --------------------------------------------------------------------------

    def _admit(self, now: float, peer: PeerId) -> bool:
        meter = self._served.get(peer)
        if meter is None:
            if len(self._served) >= limits.DHT_METERS_MAX:
                del self._served[next(iter(self._served))]
            meter = Meter(limits.DHT_RATE_SERVED_PER_S, limits.DHT_BURST_SERVED)
            self._served[peer] = meter
        if meter.take(now):
            meter.reported = meter.reported and meter.tokens < meter.burst / 2
            return True
        self.count("dht_rate")
        if not meter.reported:  # a flood is reported once, its messages are counted
            meter.reported = True
            self.emit(DhtRefused(peer, "rate"))
        return False

    def _serve(self, now: float, peer: PeerId, message: FindNode | FindValue | StoreRecord) -> None:
        answer: Reply
        if isinstance(message, FindNode):
            near = self.table.closest(id_from_bytes(message.target), limits.DHT_K, peer)
            answer = Nodes(message.request, _infos(near))
        elif isinstance(message, FindValue):
            answer = self._page(now, peer, message)
        else:
            code = self.accept(now, message.record)
            slot = (message.record.key, message.record.publisher)
            answer = StoreReply(message.request, code, max(0, self.held.marks.sequence(slot)))
            if code in rec.FAULTS:
                self.blame(PeerFault(rec.FAULTS[code], "a DHT record that does not verify", peer))
            elif code != "ok":
                self.count(f"dht_{code}")
                self.emit(DhtRefused(peer, code))
        self._out.append(Send(peer, answer))

    def _page(self, now: float, peer: PeerId, message: FindValue) -> Values:
        page: list[SignedRecord] = []
        nbytes = 0
        more = False
        for record in self.held.under(message.key, self.wall(now)):
            if record.publisher <= message.after:
                continue
            nbytes += len(record.value) + _RECORD_FRAME_BYTES
            if nbytes > limits.DHT_PAGE_BYTES:
                more = True
                break
            page.append(record)
        near: list[Contact] = []
        if not message.after:
            near = self.table.closest(id_from_bytes(message.key), limits.DHT_K, peer)
        return Values(message.request, tuple(page), _infos(near), more)

    def accept(self, now: float, record: SignedRecord) -> str:
        """Validate and keep a record; returns ``ok`` or why not."""
        wall_s = self.wall(now)
        if not self.held.holds(record):
            why = rec.refusal(self.keyring, self.run, record, wall_s)
            if why:
                return why
        code = self.held.put(record, wall_s, self.next_replication(now))
        return "ok" if code in ("new", "same") else code

    # --- upkeep ----------------------------------------------------------------------------------

    def _keep_house(self, now: float) -> None:
        self.held.purge(self.wall(now))
        self.requests.sweep(now)
        self._publisher.tick(now)
        for record in self.held.due(now, limits.DHT_REPLICATE_BATCH_MAX):
            self.held.schedule(record, self.next_replication(now))
            for contact in self.table.closest(id_from_bytes(record.key), limits.DHT_K):
                self.push(now, contact, record)
        if now >= self._refresh_at:
            target = self.table.stalest(now, self.rng, limits.DHT_REFRESH_S)
            if target is None:
                self._refresh_at = now + limits.DHT_REFRESH_S / 30
            else:
                self.searches.start(now, Search(target, _nothing))

    def next_replication(self, now: float) -> float:
        """Jittered, so that one holder is first and its copies put the others off."""
        return now + limits.DHT_REPLICATE_S * (1.0 + self.rng.random())

    def push(self, now: float, contact: Contact, record: SignedRecord) -> None:
        """Give a copy of ``record`` to ``contact``; nobody waits for the outcome."""
        self.ask_to_store(now, contact, record, partial(self.heard_store, contact))

    def ask_to_store(
        self,
        now: float,
        contact: Contact,
        record: SignedRecord,
        done: Callable[[float, Reply | None], None],
    ) -> None:
        message = StoreRecord(self.requests.next_number(), record)
        self.requests.ask(now, contact, message, StoreReply, done)

    def heard_store(self, contact: Contact, now: float, reply: Reply | None) -> None:
        self.heard(now, contact, reply)

    def heard(self, now: float, contact: Contact, reply: Reply | None) -> None:
        """A request to ``contact`` was answered, or not."""
        if reply is None:
            self.table.failed(contact)
        else:
            self._alive(now, contact)

    def _alive(self, now: float, contact: Contact) -> None:
        """``contact`` has shown that it lives: routing table, and records it should hold."""
        addresses = self._links.get(contact.peer) or contact.addresses
        if not addresses or contact.peer == self.me.peer:
            return
        known = self.table.get(contact)
        if known is not None and known.addresses == addresses:
            contact = known
        elif addresses != contact.addresses:
            contact = Contact(contact.peer, addresses, contact.id)
        oldest = self.table.seen(contact)
        if oldest is not None:
            if oldest.peer in self._links:  # keepalive of the link has just shown that it lives
                self.table.seen(Contact(oldest.peer, oldest.addresses, oldest.id))
            else:
                number = self.requests.next_number()
                ping = FindNode(number, id_bytes(self.me.id))
                done = partial(self.heard_store, oldest)
                self.requests.ask(now, oldest, ping, Nodes, done)
        if known is None and contact in self.table:
            self._hand_off(now, contact)

    def _hand_off(self, now: float, newcomer: Contact) -> None:
        """Give a new contact the records that it is among the k nearest for.

        Only the nearest holder does, so that the newcomer gets one copy of each.
        """
        for key in self.held.keys()[: limits.DHT_HANDOFF_KEYS_MAX]:
            target = id_from_bytes(key)
            nearest = self.table.closest(target, 1, newcomer.peer)
            if nearest and nearest[0].id ^ target < self.me.id ^ target:
                continue
            if newcomer in self.table.closest(target, limits.DHT_K):
                for record in self.held.under(key, self.wall(now)):
                    self.push(now, newcomer, record)

    # --- small things ----------------------------------------------------------------------------

    def hinted(self, infos: Iterable[NodeInfo], lookup: Lookup) -> list[Contact]:
        """New contacts by hearsay: dialled in this lookup, believed only once they answer."""
        return [
            Contact(PeerId(info.peer), addresses)
            for info in infos
            if not lookup.knows(PeerId(info.peer))
            and ((addresses := usable(info.addresses)) or info.peer in self._links)
        ]

    def _settle(self, now: float) -> None:
        while self.requests.settle(now):
            pass

    def _handle(self) -> int:
        self._handles += 1
        return self._handles

    def emit(self, event: object) -> None:
        self._out.append(Emit(event))

    def count(self, code: str) -> None:
        self.counters[code] = self.counters.get(code, 0) + 1

    def blame(self, fault: PeerFault) -> None:
        self.count(fault.code)
        self.emit(fault)


def usable(addresses: Iterable[str]) -> tuple[str, ...]:
    """The well-formed ones among ``addresses``."""
    found: list[str] = []
    for address in addresses:
        try:
            split_address(address)
        except ValueError:
            continue
        found.append(address)
    return tuple(found[: limits.ADDRESSES_PER_PEER_MAX])


def _infos(contacts: Iterable[Contact]) -> tuple[NodeInfo, ...]:
    return tuple(NodeInfo(contact.peer, contact.addresses) for contact in contacts)


def _name(key: str | bytes) -> bytes:
    name = key.encode() if isinstance(key, str) else key
    if not 0 < len(name) <= limits.DHT_KEY_BYTES_MAX:
        raise LocalProtocolError(
            "DHT key refused", f"it must have 1 to {limits.DHT_KEY_BYTES_MAX} bytes"
        )
    return name


def _nothing(_now: float, _search: Search) -> None:
    """A lookup whose only purpose is what it leaves in the routing table."""
