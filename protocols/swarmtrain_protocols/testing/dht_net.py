"""A network of many DHT cores in virtual time: public addresses, links that break, liars.

Leaner than ``world.py`` (no disk, no clock drift, no partial writes), so that a thousand nodes can
be run for minutes. Links are connections: a message to a peer without one waits for the dial; a
process that dies breaks its links at once, a machine that vanishes only when keepalive notices.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any, Protocol

from swarmtrain_protocols import limits, messages
from swarmtrain_protocols.addresses import is_private
from swarmtrain_protocols.core import Connect, Effect, Emit, PeerId, Send
from swarmtrain_protocols.dht.ids import Contact, id_from_bytes, node_id
from swarmtrain_protocols.dht.kademlia import DhtCore
from swarmtrain_protocols.errors import PeerFault
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
from swarmtrain_protocols.testing.keyring import FakeKeyring, peer_id_of

WALL_S = 1_700_000_000.0
RUN = bytes(range(32))
LATENCY_S = (0.01, 0.08)
FORGED = b"\xa6forged"
"""The value, a MessagePack text, that some liars put into records of others."""
LIES = ("silent", "drop", "forge", "half", "half")
"""What liars do, in turn: answer nothing; answer with accomplices only; forge the records they were
given; tell of one publisher, all of the same, and hide the others."""


class Speaker(Protocol):
    """What the network needs of a node."""

    def receive(self, now: float, peer: PeerId, message: messages.Message) -> None: ...

    def connected(self, now: float, peer: PeerId, addresses: tuple[str, ...] = ()) -> None: ...

    def disconnected(self, now: float, peer: PeerId) -> None: ...

    def unreachable(self, now: float, peer: PeerId) -> None: ...

    def tick(self, now: float) -> None: ...

    def deadline(self) -> float: ...

    def drain(self) -> list[Effect]: ...


class Liar:
    """Answers every question with accomplices near the target, and keeps nothing it is given.

    ``way`` as in ``LIES``.
    """

    def __init__(self, peer: PeerId, ring: list[Contact], way: str) -> None:
        self._peer = peer
        self._ring = ring
        self._way = way
        self._given: dict[bytes, dict[bytes, SignedRecord]] = {}
        self._out: list[Effect] = []

    def receive(self, now: float, peer: PeerId, message: messages.Message) -> None:
        if self._way == "silent":
            return
        answer: messages.Message
        if isinstance(message, FindNode):
            answer = Nodes(message.request, self._accomplices(message.target), b"token")
        elif isinstance(message, FindValue):
            near = self._accomplices(message.key)
            answer = Values(message.request, self._lies(message), near, False, b"token")
        elif isinstance(message, StoreRecord):
            record = message.record
            self._given.setdefault(record.key, {}).setdefault(record.publisher, record)
            answer = StoreReply(message.request, "ok", record.sequence)
        else:
            return
        self._out.append(Send(peer, answer))

    def _lies(self, message: FindValue) -> tuple[SignedRecord, ...]:
        given = self._given.get(message.key)
        if given is None or message.after or self._way == "drop":
            return ()
        first = given[min(given)]
        if self._way == "half":
            return (first,)
        rank = (first.sequence + 1, first.expires_s, FORGED)
        return (SignedRecord(first.name, first.publisher, *rank, first.signature),)

    def _accomplices(self, target: bytes) -> tuple[NodeInfo, ...]:
        place = id_from_bytes(target)
        near = heapq.nsmallest(limits.DHT_K, self._ring, key=lambda c: c.id ^ place)
        return tuple(NodeInfo(c.peer, c.addresses) for c in near if c.peer != self._peer)

    def introduce(self, peer: PeerId, request: int) -> None:
        """Ask ``peer`` something, so that it takes this node for a contact."""
        target = node_id(self._peer).to_bytes(limits.DHT_ID_BYTES, "big")
        self._out.append(Send(peer, FindNode(request, target)))

    def connected(self, now: float, peer: PeerId, addresses: tuple[str, ...] = ()) -> None:
        pass

    def disconnected(self, now: float, peer: PeerId) -> None:
        pass

    def unreachable(self, now: float, peer: PeerId) -> None:
        pass

    def tick(self, now: float) -> None:
        pass

    def deadline(self) -> float:
        return float("inf")

    def drain(self) -> list[Effect]:
        out, self._out = self._out, []
        return out


class Net:
    """Nodes by peer id, deliveries and ticks in a heap, and what each node emitted."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(f"dht net {seed}")
        self.now = 0.0
        self.nodes: dict[PeerId, Speaker] = {}
        self.addresses: dict[PeerId, tuple[str, ...]] = {}
        self.outcomes: dict[tuple[PeerId, int], tuple[object, float]] = {}
        """By node and handle: the event, and when it came."""
        self.faults: list[PeerFault] = []
        self.counts: dict[str, int] = {}
        self.reachable: Callable[[PeerId, PeerId], bool] | None = None
        self.proven: set[PeerId] = set()
        """Everybody who ever had a link: nobody else may stand in a routing table."""
        self._listeners: dict[str, PeerId] = {}
        self._links: dict[PeerId, dict[PeerId, None]] = {}
        self._dialling: dict[tuple[PeerId, PeerId], list[messages.Message]] = {}
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0
        self._tick_at: dict[PeerId, float] = {}

    # -- who is there --------------------------------------------------------------------------

    def public_address(self, block: str = "") -> str:
        """``host:port`` in a /24 of its own, or in ``block`` (its first three bytes as text)."""
        while True:
            rng = self.rng
            prefix = block or f"{rng.randint(11, 99)}.{rng.randrange(256)}.{rng.randrange(256)}"
            address = f"{prefix}.{rng.randint(1, 254)}:{rng.randint(1024, 65535)}"
            if not is_private(address) and address not in self._listeners:
                return address

    def add(self, name: str, *, address: str = "") -> DhtCore:
        """An honest node."""
        at = (address or self.public_address(),)
        core = DhtCore(
            keyring=FakeKeyring(name),
            rng=Random(f"{name} {self.now}"),
            now=self.now,
            wall_s=WALL_S + self.now,
            addresses=at,
            run=RUN,
        )
        self.enter(core.me.peer, at, core)
        return core

    def enter(self, peer: PeerId, addresses: tuple[str, ...], node: Speaker) -> None:
        self.nodes[peer] = node
        self.addresses[peer] = addresses
        for address in addresses:
            self._listeners[address] = peer
        self._links[peer] = {}
        self.settle(peer)

    def kill(self, peer: PeerId, *, machine: bool) -> None:
        """The process dies, or its whole ``machine`` falls silent."""
        node = self.nodes.pop(peer)
        assert node is not None
        for address in self.addresses.pop(peer):
            if not machine:
                del self._listeners[address]
        for other in self._links.pop(peer):
            wait_s = limits.IDLE_TIMEOUT_S if machine else self._latency_s()
            self.after(wait_s, self._broken, other, peer)

    def honest(self) -> list[DhtCore]:
        """Living honest nodes in order of entry."""
        return [node for node in self.nodes.values() if isinstance(node, DhtCore)]

    # -- links ---------------------------------------------------------------------------------

    def link(self, one: PeerId, two: PeerId) -> bool:
        """A connection, whoever dialled; False if one of them is gone or cannot be reached."""
        if one not in self.nodes or two not in self.nodes or not self._can_reach(one, two):
            return False
        if two not in self._links[one]:
            self._links[one][two] = self._links[two][one] = None
            self.proven.update((one, two))
            for here, there in ((one, two), (two, one)):
                self.nodes[here].connected(self.now, there, self.addresses[there])
                self.settle(here)
        return True

    def cut(self, one: PeerId, two: PeerId) -> None:
        """Break the connection of two nodes; both notice."""
        if self._links.get(one, {}).pop(two, 0) is None:
            self._broken(two, one)
            self.nodes[one].disconnected(self.now, two)
            self.settle(one)

    def _broken(self, peer: PeerId, gone: PeerId) -> None:
        links = self._links.get(peer)
        if links is not None and gone in links and gone not in self._links.get(gone, {}):
            del links[gone]
            self.nodes[peer].disconnected(self.now, gone)
            self.settle(peer)

    def _can_reach(self, one: PeerId, two: PeerId) -> bool:
        return self.reachable is None or self.reachable(one, two)

    def _dial(self, me: PeerId, effect: Connect) -> None:
        if effect.peer in self._links[me] or (me, effect.peer) in self._dialling:
            return
        self.count("dials")
        self._dialling[me, effect.peer] = []
        # Who listens there may be somebody else, and a silent machine costs the whole timeout.
        found = [self._listeners.get(address) for address in effect.addresses]
        silent = any(peer is not None and peer not in self.nodes for peer in found)
        wait_s = limits.DIAL_TIMEOUT_S if silent else 2 * self._latency_s()
        self.after(wait_s, self._dialled, me, effect.peer, effect.peer in found)

    def _dialled(self, me: PeerId, peer: PeerId, found: bool) -> None:
        waiting = self._dialling.pop((me, peer))
        if me not in self.nodes:
            return
        if found and self.link(me, peer):
            for message in waiting:
                self._send(me, peer, message)
        elif peer not in self._links[me]:
            self.nodes[me].unreachable(self.now, peer)
            self.settle(me)

    # -- time ----------------------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        """Let virtual time pass."""
        end = self.now + seconds
        while self._heap and self._heap[0][0] <= end:
            self.now, _, call, args = heapq.heappop(self._heap)
            call(*args)
        self.now = end

    def after(self, delay_s: float, call: Callable[..., None], *args: Any) -> None:
        self._number += 1
        heapq.heappush(self._heap, (self.now + delay_s, self._number, call, args))

    def outcome(self, core: DhtCore, handle: int, limit_s: float = 60.0) -> object:
        """Run until ``core`` has emitted the event of ``handle``; None if it never does."""
        self.settle(core.me.peer)
        end = self.now + limit_s
        while (core.me.peer, handle) not in self.outcomes and self.now < end:
            self.run(0.02)
        return self.outcomes.pop((core.me.peer, handle), (None, self.now))[0]

    def settle(self, me: PeerId) -> None:
        """Carry out what a node wants, and set its next tick."""
        node = self.nodes[me]
        for effect in node.drain():
            if isinstance(effect, Send):
                self._send(me, effect.peer, effect.message)
            elif isinstance(effect, Connect):
                self._dial(me, effect)
            elif isinstance(effect, Emit):
                self._emitted(me, effect.event)
            else:
                raise AssertionError(f"the DHT has no effect {effect!r}")
        at = node.deadline()
        if at < self._tick_at.get(me, float("inf")):
            self._tick_at[me] = at
            self.after(max(0.0, at - self.now), self._tick, me, at)

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def _tick(self, me: PeerId, at: float) -> None:
        if self._tick_at.get(me) != at:
            return  # an earlier one was set meanwhile
        del self._tick_at[me]
        node = self.nodes.get(me)
        if node is not None:
            node.tick(self.now)
            self.settle(me)

    def _emitted(self, me: PeerId, event: object) -> None:
        self.count(type(event).__name__)
        if isinstance(event, PeerFault):
            self.faults.append(event)
        handle = getattr(event, "handle", None)
        if handle is not None:
            self.outcomes[me, handle] = (event, self.now)

    def _send(self, sender: PeerId, receiver: PeerId, message: messages.Message) -> None:
        if receiver in self._links[sender]:
            self.count("messages")
            self.after(self._latency_s(), self._deliver, sender, receiver, message)
        elif (sender, receiver) in self._dialling:
            self._dialling[sender, receiver].append(message)

    def _deliver(self, sender: PeerId, receiver: PeerId, message: messages.Message) -> None:
        if sender in self._links.get(receiver, {}) and self._can_reach(sender, receiver):
            self.nodes[receiver].receive(self.now, sender, message)
            self.settle(receiver)

    def _latency_s(self) -> float:
        return self.rng.uniform(*LATENCY_S)


def ground_names(prefix: str, count: int, target: int, tries: int) -> list[str]:
    """Names whose ids lie near ``target``: of ``tries`` keys each, the nearest is kept."""
    return [
        min(
            (f"{prefix}{number}.{n}" for n in range(tries)),
            key=lambda name: node_id(peer_id_of(name)) ^ target,
        )
        for number in range(count)
    ]


def liars(
    net: Net, names: Iterable[str], *, blocks: int = 0, ways: Sequence[str] = LIES
) -> list[PeerId]:
    """Enter a ring of liars; ``blocks``: in how many /24 they all stand (0: each in its own)."""
    prefixes = [net.public_address().rpartition(".")[0] for _ in range(blocks)]
    ring: list[Contact] = []
    for number, name in enumerate(names):
        block = prefixes[number % blocks] if blocks else ""
        ring.append(Contact(peer_id_of(name), (net.public_address(block),)))
    for number, contact in enumerate(ring):
        liar = Liar(contact.peer, ring, ways[number % len(ways)])
        net.enter(contact.peer, contact.addresses, liar)
    return [contact.peer for contact in ring]


def introduce(net: Net, liar_peers: Iterable[PeerId], known: int) -> None:
    """Each liar makes itself known to the honest nodes nearest to it, and to some others."""
    honest = [core.me for core in net.honest()]
    for number, peer in enumerate(liar_peers):
        place = node_id(peer)
        near = heapq.nsmallest(known, honest, key=lambda c: c.id ^ place)
        liar = net.nodes[peer]
        assert isinstance(liar, Liar)
        for contact in [*near, *net.rng.sample(honest, min(known, len(honest)))]:
            net.link(peer, contact.peer)
            liar.introduce(contact.peer, 1 + number)
        net.settle(peer)
