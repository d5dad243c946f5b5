"""The DHT core: Kademlia among authenticated peers, sans-I/O (spec 03).

It finds things and never decides. The link layer proves who a peer is and calls ``connected``;
identifiers come from that key, so nobody can claim another place. Peers without an address are
clients: they are served, but nobody is sent to them and they hold nothing for others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from random import Random
from typing import TYPE_CHECKING

from swarmtrain_protocols import limits
from swarmtrain_protocols.addresses import split_address
from swarmtrain_protocols.core import Effect, Emit, PeerId, Send, earliest
from swarmtrain_protocols.dht import records as rec
from swarmtrain_protocols.dht.contacts import ContactBook
from swarmtrain_protocols.dht.density import Density
from swarmtrain_protocols.dht.events import DhtBootstrapped, DhtFailed, DhtFound
from swarmtrain_protocols.dht.healing import Healing
from swarmtrain_protocols.dht.hearsay import Hearsay
from swarmtrain_protocols.dht.ids import Contact, contact_of, id_bytes, key_id
from swarmtrain_protocols.dht.lookup import Lookup
from swarmtrain_protocols.dht.publisher import Publisher
from swarmtrain_protocols.dht.replication import Replication
from swarmtrain_protocols.dht.requests import Done, Requests
from swarmtrain_protocols.dht.routing import RoutingTable
from swarmtrain_protocols.dht.search import Search, Searches, nothing
from swarmtrain_protocols.dht.serving import Serving
from swarmtrain_protocols.dht.validators import breaks_its_rule
from swarmtrain_protocols.errors import LocalProtocolError, PeerFault
from swarmtrain_protocols.identity import Keyring
from swarmtrain_protocols.messages.dht import (
    FindNode,
    NodeInfo,
    Nodes,
    Question,
    Reply,
    SignedRecord,
    StoreRecord,
    StoreReply,
)

if TYPE_CHECKING:
    from swarmtrain_protocols.messages import Message


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
        self.density = Density(self.me.id, self.table)
        self.hearsay = Hearsay()
        self.book = ContactBook()
        self.searches = Searches(self)
        self.replication = Replication(self)
        self.healing = Healing(self, now)
        self.serving = Serving(self)
        self._handles = 0
        self._housekeeping_at = now + limits.DHT_HOUSEKEEPING_S
        self._wanted_at: float | None = None
        """The deadline; None: something has been done here since it was looked for."""
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
        if breaks_its_rule(name, self.me.peer, value):
            raise LocalProtocolError(
                "DHT value refused", f"names under {name.split(b'/')[0]!r} have a rule (spec 03)"
            )
        handle = self._handle()
        self._publisher.publish(now, handle, name, value, ttl_s, keep)
        self._settle(now)
        return handle

    def withdraw(self, now: float, key: str | bytes) -> None:
        """Stop renewing what was stored under ``key``; replicas go when it expires."""
        self._wanted_at = None
        self._publisher.withdraw(now, _name(key))

    def get(self, now: float, key: str | bytes) -> int:
        """Look for the record with the latest expiry under ``key``; ``DhtFound`` has the handle."""
        return self._find(now, _name(key), only_latest=True)

    def get_all(self, now: float, key: str | bytes) -> int:
        """Look for the records of all publishers under ``key``."""
        return self._find(now, _name(key), only_latest=False)

    def bootstrap(self, now: float, contacts: Iterable[tuple[PeerId, tuple[str, ...]]] = ()) -> int:
        """Find the nodes nearest to this one, starting from ``contacts`` and from live links."""
        seeds = tuple(Contact(peer, usable(tuple(addresses))) for peer, addresses in contacts)
        handle = self._handle()
        self.searches.start(
            now, Search(self.me.id, partial(self._bootstrapped, handle), seeds=seeds, gauge=True)
        )
        self._settle(now)
        return handle

    def connected(self, now: float, peer: PeerId, addresses: tuple[str, ...] = ()) -> None:
        """A link to ``peer`` is up; ``addresses`` are where it says it can be dialled."""
        alone = len(self.table) == 0
        self._links[peer] = usable(addresses)
        self._alive(now, contact_of(peer))
        if alone and len(self.table):
            self.searches.start(now, Search(self.me.id, nothing, gauge=True))
        self._settle(now)

    def disconnected(self, now: float, peer: PeerId) -> None:
        """The link broke."""
        was_linked = self._links.pop(peer, None) is not None
        self.serving.forget(peer)
        self.requests.lost(now, peer)
        known = self.table.get(contact_of(peer)) if was_linked else None
        if known is not None:
            self.ping(now, known, partial(self._unlinked, known))
        self._settle(now)

    def unreachable(self, now: float, peer: PeerId) -> None:
        """A link could not be made, and will not be soon: what was asked of ``peer`` has failed."""
        if peer not in self._links:
            self.requests.lost(now, peer)
            self._settle(now)

    def forget(self, now: float, peer: PeerId) -> None:
        """A peer was banned or has left: it is not asked and not named to others."""
        gone = contact_of(peer)
        known = gone in self.table
        self.table.remove(gone)
        self.disconnected(now, peer)
        self.table.remove(gone)  # an answer on its way may have brought it back
        self.book.forget(peer)
        if known:
            self.replication.left(now, gone)
        self._wanted_at = None

    def set_wall(self, now: float, wall_s: float) -> None:
        """The wall clock is another than was thought: it was set, or this machine slept."""
        self._wall_offset_s = wall_s - now
        self._wanted_at = None

    def wall(self, now: float) -> float:
        """Unix wall clock in seconds at monotonic ``now``."""
        return now + self._wall_offset_s

    # --- core.Core -------------------------------------------------------------------------------

    def receive(self, now: float, peer: PeerId, message: Message) -> None:
        """Feed one DHT message from an authenticated peer.

        Raises:
            LocalProtocolError: ``message`` does not belong to the DHT.
        """
        if isinstance(message, Reply):
            fault = self.requests.answer(peer, message, now)
            if fault is not None:
                self.blame(fault)
        elif isinstance(message, Question):
            if self.serving.admit(now, peer):
                self._alive(now, contact_of(peer))
                self._out.append(Send(peer, self.serving.answer(now, peer, message)))
        else:
            raise LocalProtocolError("not a DHT message", type(message).__name__)
        self._settle(now)

    def tick(self, now: float) -> None:
        self.requests.tick(now)
        self._settle(now)
        self.searches.tick(now)
        if now >= self._house_at():
            self._housekeeping_at = now + limits.DHT_HOUSEKEEPING_S
            self._keep_house(now)
        self._settle(now)

    def deadline(self) -> float:
        if self._wanted_at is None:
            asked_at = earliest(self.requests.deadline(), self.searches.deadline())
            self._wanted_at = earliest(asked_at, self._house_at())
        return self._wanted_at

    def _house_at(self) -> float:
        """The first beat of ``DHT_HOUSEKEEPING_S`` at which something is due."""
        expiry_s = self.held.next_expiry_s()
        expires_at = math.inf if expiry_s is None else expiry_s - self._wall_offset_s
        due_at = earliest(
            earliest(self._publisher.due_at, self.held.next_replication()),
            self.healing.next_at,
            self._refresh_at,
            expires_at,
        )
        late_s = due_at - self._housekeeping_at
        if late_s <= 0.0:
            return self._housekeeping_at
        beats = math.ceil(late_s / limits.DHT_HOUSEKEEPING_S)
        return self._housekeeping_at + beats * limits.DHT_HOUSEKEEPING_S

    def drain(self) -> list[Effect]:
        out = self._out[:]
        self._out.clear()
        return out

    # --- results ---------------------------------------------------------------------------------

    def _find(self, now: float, name: bytes, *, only_latest: bool) -> int:
        handle = self._handle()
        target = key_id(name)
        finish = partial(self._found, handle, name, only_latest)
        key, alpha = id_bytes(target), limits.DHT_AGREE
        search = Search(target, finish, key=key, guarded=True, alpha=alpha)
        if not self.searches.start(now, search):
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
        self.replication.repair(now, search, fresh)
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

    # --- records and peers ----------------------------------------------------------------------

    def accept(self, now: float, record: SignedRecord) -> str:
        """Validate and keep a record; returns ``ok`` or why not."""
        wall_s = self.wall(now)
        if not self.held.holds(record):
            why = rec.refusal(self.keyring, self.run, record, wall_s)
            if why:
                return why
        code = self.held.put(record, wall_s, self.replication.next_time(now))
        return "ok" if code in ("new", "same") else code

    def ask_to_store(
        self,
        now: float,
        contact: Contact,
        record: SignedRecord,
        token: bytes,
        done: Done,
        slow: Callable[[float], None] | None = None,
    ) -> None:
        """Give ``contact`` a copy; ``token`` comes from its recent answer for this key."""
        message = StoreRecord(self.requests.next_number(), record, token)
        self.requests.ask(now, contact, message, StoreReply, done, slow)

    def heard(self, now: float, reply: Reply | None, *, contact: Contact) -> None:
        """A request to ``contact`` was answered, or not."""
        if reply is not None:
            self.hearsay.found(contact)
            self.book.seen(self._alive(now, contact), self.wall(now))
            return
        if self.table.failed(contact):
            self.book.lost(contact.peer)
            self.replication.left(now, contact)

    def _alive(self, now: float, contact: Contact) -> Contact:
        """``contact`` has shown that it lives: routing table, and records it should hold."""
        addresses = self._links.get(contact.peer) or contact.addresses
        if not addresses or contact.peer == self.me.peer:
            return contact
        known = self.table.get(contact)
        if known is not None and known.addresses == addresses:
            contact = known
        elif addresses != contact.addresses:
            contact = contact_of(contact.peer, addresses)
        oldest = self.table.seen(contact)
        if oldest is not None:
            if oldest.peer in self._links:  # keepalive of the link has just shown that it lives
                self.table.seen(oldest)
            else:
                self.ping(now, oldest)
        if known is None and contact in self.table:
            self.replication.newcomer(now, contact)
        return contact

    def ping(self, now: float, contact: Contact, done: Done | None = None) -> None:
        """Ask ``contact`` for nodes near this one, to see whether it lives."""
        question = FindNode(self.requests.next_number(), id_bytes(self.me.id))
        heard = done or partial(self.heard, contact=contact)
        self.requests.ask(now, contact, question, Nodes, heard)

    def _unlinked(self, contact: Contact, now: float, reply: Reply | None) -> None:
        """A contact whose link broke does not answer on a new one: once more, and it is gone."""
        self.heard(now, reply, contact=contact)
        if reply is None and contact in self.table:
            self.ping(now, contact)

    # --- small things ----------------------------------------------------------------------------

    def hinted(self, infos: Iterable[NodeInfo], lookup: Lookup, by: PeerId) -> list[Contact]:
        """Contacts by hearsay: dialled in this lookup, believed only once they answer.

        Without those that the path of ``by``, who names them, knows already.
        """
        found: list[Contact] = []
        for info in infos:
            peer = PeerId(info.peer)
            if not lookup.is_news(by, peer):
                continue
            addresses = usable(info.addresses)
            if addresses or peer in self._links:
                found.append(contact_of(peer, addresses))
        return found

    def own_records(self, key: bytes) -> list[SignedRecord]:
        """What this site itself publishes under key id ``key``."""
        return list(self._publisher.own(key))

    def may_ask(self, now: float, contact: Contact) -> bool:
        """False for a contact by hearsay at a place where others that were named are not."""
        if contact.peer in self._links or contact in self.table:
            return True
        if not self.hearsay.allowed(now, contact.addresses):
            return False
        self.hearsay.tried(now, contact)
        return True

    def _keep_house(self, now: float) -> None:
        self.held.purge(self.wall(now))
        self.book.purge(self.wall(now))
        self.requests.sweep(now)
        self._publisher.tick(now)
        self.replication.tick(now)
        self.healing.tick(now)
        if now >= self._refresh_at:
            target = self.table.stalest(now, self.rng, limits.DHT_REFRESH_S)
            if target is None:
                self._refresh_at = now + limits.DHT_REFRESH_LOOK_S
            else:
                self.searches.start(now, Search(target, nothing, gauge=True))

    def _settle(self, now: float) -> None:
        self._wanted_at = None
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


@lru_cache(maxsize=4096)
@lru_cache(maxsize=1024)
def usable(addresses: tuple[str, ...]) -> tuple[str, ...]:
    """The well-formed ones among ``addresses``."""
    found: list[str] = []
    for address in addresses:
        try:
            split_address(address)
        except ValueError:
            continue
        found.append(address)
    return tuple(found[: limits.ADDRESSES_PER_PEER_MAX])


def _name(key: str | bytes) -> bytes:
    name = key.encode() if isinstance(key, str) else key
    if not 0 < len(name) <= limits.DHT_KEY_BYTES_MAX:
        raise LocalProtocolError(
            "DHT key refused", f"it must have 1 to {limits.DHT_KEY_BYTES_MAX} bytes"
        )
    return name
