"""A hand-driven network of DHT cores in virtual time: latency, loss, nodes that vanish, liars."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from random import Random

from swarmtrain_protocols import messages
from swarmtrain_protocols.core import Connect, Emit, PeerId, Send
from swarmtrain_protocols.dht.ids import node_id
from swarmtrain_protocols.dht.kademlia import DhtCore
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.testing.keyring import FakeKeyring

WALL_S = 1_700_000_000.0
RUN = bytes(range(32))

Tamper = Callable[[messages.Message], messages.Message | None]


def core(name: str, *, now: float = 0.0, addresses: tuple[str, ...] | None = None) -> DhtCore:
    """A core with a fast keyring and one private address of its own."""
    at = (f"{name}.internal:1",) if addresses is None else addresses
    return DhtCore(
        keyring=FakeKeyring(name),
        rng=Random(name),
        now=now,
        wall_s=WALL_S + now,
        addresses=at,
        run=RUN,
    )


class Network:
    """Nodes by name, a heap of deliveries and ticks, and what each node emitted."""

    def __init__(self, seed: int, *, latency_s: float = 0.04, loss: float = 0.0) -> None:
        self.rng = Random(seed)
        self.now = 0.0
        self.latency_s = latency_s
        self.loss = loss
        self.nodes: dict[PeerId, DhtCore] = {}
        self.events: dict[PeerId, list[object]] = {}
        self.faults: list[PeerFault] = []
        self.tampers: dict[PeerId, Tamper] = {}
        self.sent = 0
        self.reachable: Callable[[PeerId, PeerId], bool] | None = None
        self._links: dict[tuple[PeerId, PeerId], bool] = {}
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._tick_at: dict[PeerId, float] = {}

    def add(self, name: str, addresses: tuple[str, ...] | None = None) -> DhtCore:
        node = core(name, now=self.now, addresses=addresses)
        self.nodes[node.me.peer] = node
        self.events[node.me.peer] = []
        self._after(node)
        return node

    def grow(self, count: int, *, every_s: float = 0.2, first: str = "n") -> list[DhtCore]:
        """Add nodes one after the other; each knows one earlier node, as from a ticket."""
        grown = []
        for number in range(count):
            known = list(self.nodes)
            node = self.add(f"{first}{number}")
            if known:
                self.link(node.me.peer, known[self.rng.randrange(len(known))])
            self.run(every_s)
            grown.append(node)
        return grown

    def link(self, one: PeerId, two: PeerId) -> None:
        """Both ends learn of a link and of each other's addresses."""
        if (one, two) in self._links or one not in self.nodes or two not in self.nodes:
            return
        if not self._can_reach(one, two):
            self.nodes[one].unreachable(self.now, two)
            self._after(self.nodes[one])
            return
        self._links[one, two] = self._links[two, one] = True
        for here, there in ((one, two), (two, one)):
            self.nodes[here].connected(self.now, there, self.nodes[there].me.addresses)
            self._after(self.nodes[here])

    def vanish(self, node: DhtCore) -> None:
        """Without a word: links stay, answers do not come."""
        del self.nodes[node.me.peer]

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self._heap and self._heap[0][0] <= end:
            self.now, _, call = heapq.heappop(self._heap)
            call()
        self.now = end

    def settle(self, node: DhtCore, handle: int, limit_s: float = 60.0) -> object:
        """Run until ``node`` has emitted the event of ``handle``."""
        end = self.now + limit_s
        self._after(node)
        while self.now < end:
            for event in self.events[node.me.peer]:
                if getattr(event, "handle", None) == handle:
                    return event
            self.run(0.05)
        raise AssertionError(f"no outcome of {handle} in {limit_s} s")

    def nearest(self, target: int, count: int, but: PeerId | None = None) -> list[PeerId]:
        """The truth by brute force."""
        peers = [peer for peer in self.nodes if peer != but]
        return sorted(peers, key=lambda peer: node_id(peer) ^ target)[:count]

    def _after(self, node: DhtCore) -> None:
        me = node.me.peer
        for effect in node.drain():
            if isinstance(effect, Send):
                self._send(me, effect.peer, effect.message)
            elif isinstance(effect, Connect):
                self._at(self.latency_s, lambda two=effect.peer: self.link(me, two))
            else:
                assert isinstance(effect, Emit)
                if isinstance(effect.event, PeerFault):
                    self.faults.append(effect.event)
                self.events[me].append(effect.event)
        at = node.deadline()
        if me in self.nodes and at < self._tick_at.get(me, float("inf")):
            self._tick_at[me] = at
            self._at(max(0.0, at - self.now), lambda: self._tick(me))

    def _tick(self, me: PeerId) -> None:
        self._tick_at.pop(me, None)
        node = self.nodes.get(me)
        if node is not None:
            node.tick(self.now)
            self._after(node)

    def _send(self, sender: PeerId, receiver: PeerId, message: messages.Message) -> None:
        self.sent += 1
        tamper = self.tampers.get(sender)
        changed = message if tamper is None else tamper(message)
        if changed is None or self.rng.random() < self.loss:
            return
        delay_s = self.latency_s * (0.5 + self.rng.random())
        if (sender, receiver) not in self._links:
            delay_s += 2 * self.latency_s  # the message waits for the link
        self._at(delay_s, lambda: self._deliver(sender, receiver, changed))

    def _can_reach(self, one: PeerId, two: PeerId) -> bool:
        return self.reachable is None or self.reachable(one, two)

    def _deliver(self, sender: PeerId, receiver: PeerId, message: messages.Message) -> None:
        node = self.nodes.get(receiver)
        if node is not None and self._can_reach(sender, receiver):
            node.receive(self.now, sender, message)
            self._after(node)

    def _at(self, delay_s: float, call: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._heap, (self.now + delay_s, self._number, call))
