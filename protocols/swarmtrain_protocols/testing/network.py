"""Links between hosts: connections that come and go, and packets that meet trouble on the way.

Two characters of network, chosen per seed (``NetworkModel.seeded``):

- ``stream``: a connection is a byte stream, as TCP is. Messages arrive in order and once; a loss is
  a reset of the connection, which takes everything in flight with it. During a cut, packets wait
  for the resend; if the cut outlasts the detection time, both ends see the connection end.
- ``datagram``: harsher than any real link. Messages are lost, doubled and reordered one by one.

Fetches always travel as streams. Each direction of each link has its own row of draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.testing.draws import Stream, exponential
from swarmtrain_protocols.testing.faults import (
    LOSSY,
    NOISY,
    REORDER_S,
    SLOW_FACTOR,
    TAIL_MAX_S,
    TAIL_SCALE_S,
    TAIL_SHAPE,
)
from swarmtrain_protocols.testing.keyring import peer_id_of

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host
    from swarmtrain_protocols.testing.world import World

DIAL_QUEUE_MAX = 4096
ORDER_GAP_S = 1e-7
TAIL_S_MAX = 5.0
DOUBLE_S_MAX = 4.0
"""A second copy may come this much later, when what it speaks of is long decided."""


def address_of(name: str) -> str:
    """Where the host of that name listens: an address of its own, in a subnet of its own."""
    a, b, c = peer_id_of(name)[:3]
    return f"44.{a}.{b}.{c}:4000"


@dataclass(frozen=True)
class NetworkModel:
    """The weather. Times in seconds, rates in bytes per second, the rest are probabilities."""

    mode: str = "stream"
    latency_s: tuple[float, float] = (0.01, 0.05)
    tail: float = 0.0
    tail_mean_s: float = 1.0
    loss: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    detection_s: tuple[float, float] = (2.0, 8.0)
    rate_bytes_per_s: float = 1e6
    sync_s: tuple[float, float] = (0.0005, 0.01)

    @staticmethod
    def seeded(seed: int) -> NetworkModel:
        """The weather of a seed: half of them streams, many of them bad."""
        luck = Stream(seed, "weather")

        def pick(*values: float) -> float:
            return values[luck.integer(len(values))]

        stream = luck.chance(0.5)
        low = pick(0.001, 0.01, 0.03)
        return NetworkModel(
            mode="stream" if stream else "datagram",
            latency_s=(low, low + pick(0.002, 0.04, 0.15)),
            tail=pick(0.0, 0.01, 0.03),
            tail_mean_s=pick(0.3, 1.0),
            loss=pick(0.0, 0.0, 0.001, 0.005) if stream else pick(0.0, 0.01, 0.05, 0.15),
            duplicate=0.0 if stream else pick(0.0, 0.02, 0.1),
            corrupt=pick(0.0, 0.0, 0.02),
            rate_bytes_per_s=pick(2e4, 1e5, 1e7),
            sync_s=(0.0005, pick(0.002, 0.02, 0.2)),
        )

    def healed(self) -> NetworkModel:
        """The same links without loss, doubles, tails or flipped bits."""
        return replace(self, tail=0.0, loss=0.0, duplicate=0.0, corrupt=0.0)


@dataclass(slots=True)
class Packet:
    """``arrive(host)`` runs at the receiver; ``fail()`` if no connection could be made for it."""

    kind: str
    data: bytes
    arrive: Callable[[Host], None]
    fail: Callable[[], None] | None = None
    bulk: bool = False
    extra_s: float = 0.0


class Connection:
    """One connection of two hosts; each end has its own opinion of whether it is up."""

    def __init__(self, number: int, a: str, b: str) -> None:
        self.number = number
        self.state = {a: "pending", b: "pending"}
        self.opens_at = {a: 0.0, b: 0.0}
        self.last = {a: 0.0, b: 0.0}
        self.held: dict[str, list[Packet]] = {a: [], b: []}

    def usable(self) -> bool:
        return "down" not in self.state.values()


@dataclass(slots=True)
class _Dial:
    incarnation: int
    queue: list[Packet] = field(default_factory=list)


class Network:
    """All links of a world."""

    def __init__(self, world: World, strict_addresses: bool) -> None:
        self.world = world
        self._strict = strict_addresses
        self._book: dict[str, set[str]] = {}  # whom each host can dial
        self._connections: dict[tuple[str, str], Connection] = {}
        self._of: dict[str, dict[str, Connection]] = {}  # the same, by host and other host
        self._dials: dict[tuple[str, str], _Dial] = {}
        self._luck: dict[tuple[str, str, str], Stream] = {}
        self._cuts: dict[tuple[str, str], int] = {}
        self._episode: dict[tuple[str, str], int] = {}
        self._trouble: dict[tuple[str, str], int] = {}
        self._numbers = 0
        self.unreachable: list[str] = []
        """Names of hosts that nobody can dial (behind NAT); they dial out."""

    # --- faults ----------------------------------------------------------------------------------

    def cut(self, a: str, b: str) -> None:
        """Stop everything from ``a`` to ``b``; cuts of the same link nest."""
        self._cuts[a, b] = self._cuts.get((a, b), 0) + 1
        if self._cuts[a, b] > 1:
            return
        connection = self._connections.get(_pair(a, b))
        if connection is not None and connection.state[b] != "down":
            episode = self._episode.get((a, b), 0)

            def silence() -> None:
                if self._cuts.get((a, b), 0) and self._episode.get((a, b), 0) == episode:
                    self._end(connection, b)

            self.world.after(self._detection_s(a, b), self.world.hosts[b], silence)

    def mend(self, a: str, b: str) -> None:
        """Undo one ``cut``; what waited is sent again."""
        left = self._cuts.get((a, b), 0) - 1
        if left > 0:
            self._cuts[a, b] = left
            return
        self._cuts.pop((a, b), None)
        self._episode[a, b] = self._episode.get((a, b), 0) + 1
        connection = self._connections.get(_pair(a, b))
        if connection is not None:
            waiting, connection.held[a] = connection.held[a], []
            for packet in waiting:
                self._transmit(connection, a, b, packet)

    def trouble(self, kind: str, host: str, change: int) -> None:
        """Begin (+1) or end (-1) times of some kind of trouble on all links of a host."""
        self._trouble[kind, host] = self._trouble.get((kind, host), 0) + change

    def heal(self) -> None:
        """End every cut and all trouble."""
        self._trouble.clear()
        for a, b in list(self._cuts):
            self._cuts[a, b] = 1
            self.mend(a, b)

    def is_cut(self, a: str, b: str) -> bool:
        return bool(self._cuts) and self._cuts.get((a, b), 0) > 0

    def linked(self, a: str, b: str) -> bool:
        """True if both ends hold the connection to be up."""
        connection = self._connections.get(_pair(a, b))
        return connection is not None and all(s == "up" for s in connection.state.values())

    # --- addresses --------------------------------------------------------------------------------

    def learn(self, host: Host, peer: bytes, addresses: tuple[str, ...]) -> None:
        """Remember that ``host`` knows how to dial ``peer``, if an address is really its own."""
        other = self.world.by_peer.get(peer)
        if other is not None and address_of(other.name) in addresses:
            self._book.setdefault(host.name, set()).add(other.name)

    def knows(self, a: str, b: str) -> bool:
        """Whether host ``a`` knows where ``b`` listens."""
        return b in self._book.get(a, ())

    # --- what hosts ask for ----------------------------------------------------------------------

    def send(self, a: Host, b: Host, packet: Packet) -> None:
        """Send over the connection of the two, or dial and send when it is up."""
        connection = self._of.get(a.name, {}).get(b.name)
        if connection is not None and connection.state[a.name] == "up":
            self._transmit(connection, a.name, b.name, packet)
            return
        self.dial(a, b, packet)

    def dial(self, a: Host, b: Host, packet: Packet | None = None) -> None:
        """Have a connection; no news is given if it cannot be had."""
        connection = self._connections.get(_pair(a.name, b.name))
        if connection is not None and connection.state[a.name] == "up":
            return
        if self._strict and not self.knows(a.name, b.name):
            self.world.seen["net:no-address"] += 1
            if packet is not None:
                self._fail(a, packet)
            return
        dial = self._dials.get((a.name, b.name))
        if dial is None or dial.incarnation != a.incarnation:
            dial = self._dials[a.name, b.name] = _Dial(a.incarnation)
            self._knock(a, b, dial)
        if packet is None:
            return
        if len(dial.queue) >= DIAL_QUEUE_MAX:
            self.world.seen["drop:dial-queue"] += 1
            self._fail(a, packet)
        else:
            dial.queue.append(packet)

    def probe(self, a: Host, peer: PeerId) -> None:
        """Ask over the connection, if there is one; a process that runs answers at once."""
        b, asked_s, incarnation = self.world.by_peer[peer], a.local_now(), a.incarnation
        connection = self._connections.get(_pair(a.name, b.name))
        if connection is None or connection.state[a.name] != "up":
            return

        def answer(host: Host) -> None:
            if connection.state[host.name] == "up":
                self._transmit(connection, b.name, a.name, Packet("pong", b"", heard))

        def heard(host: Host) -> None:
            if host.incarnation == incarnation:
                host.answered(peer, host.local_now() - asked_s)

        self._transmit(connection, a.name, b.name, Packet("ping", b"", answer))

    def close(self, a: Host, b: Host) -> None:
        """End the connection as ``a`` asks; both ends are told."""
        connection = self._connections.get(_pair(a.name, b.name))
        if connection is not None and connection.state[a.name] == "up":
            self._end(connection, a.name)

    def close_all(self, a: Host) -> None:
        """End every connection that ``a`` has."""
        for _, connection in self._standing(a.name):
            if connection.state[a.name] == "up":
                self._end(connection, a.name)

    def _standing(self, name: str) -> list[tuple[str, Connection]]:
        """The connections that a host has not seen end, with who is at the other end, in order."""
        links = sorted(self._of.get(name, {}).items())
        return [(other, link) for other, link in links if link.state[name] != "down"]

    def died(self, host: Host, *, silent: bool) -> None:
        """The process of ``host`` is gone: its kernel says so, or (``silent``) nobody does."""
        self._book.pop(host.name, None)  # it forgets what it has learnt
        for other, connection in self._standing(host.name):
            connection.state[host.name] = "down"
            connection.held[host.name].clear()
            if silent:
                delay_s = self._detection_s(host.name, other)
                self.world.after(delay_s, self.world.hosts[other], self._end, connection, other)
            else:
                self._transmit(connection, host.name, other, _fin(connection, self))

    def paused(self, host: Host, until_s: float) -> None:
        """Whoever hears nothing from ``host`` for too long ends the connection."""
        for other, connection in self._standing(host.name):
            delay_s = self._detection_s(host.name, other)
            if self.world.now + delay_s < until_s:
                self.world.after(delay_s, self.world.hosts[other], self._end, connection, other)

    # --- inside ----------------------------------------------------------------------------------

    def _stream(self, a: str, b: str, purpose: str) -> Stream:
        key = (a, b, purpose)
        found = self._luck.get(key)
        if found is None:
            found = self._luck[key] = Stream(self.world.seed, "link", a, b, purpose)
        return found

    def _detection_s(self, a: str, b: str) -> float:
        """After how long without a sign of ``a`` its connection ends at ``b``."""
        return self._stream(a, b, "detect").between(*self.world.model.detection_s)

    def _latency_s(self, a: str, b: str, uniform: float, tail: float) -> float:
        model = self.world.model
        low, high = model.latency_s
        delay_s = low + (high - low) * uniform
        if self._has("slow", a, b):
            delay_s *= SLOW_FACTOR
        if tail < model.tail:
            delay_s += min(TAIL_S_MAX, exponential(tail / model.tail, model.tail_mean_s))
        return delay_s

    def _has(self, kind: str, a: str, b: str) -> bool:
        there = self._trouble
        return bool(there) and (there.get((kind, a), 0) > 0 or there.get((kind, b), 0) > 0)

    def _transmit(self, connection: Connection, a: str, b: str, packet: Packet) -> None:
        model = self.world.model
        calm = not self._trouble and model.loss == model.tail == model.duplicate == 0.0
        luck = self._stream(a, b, packet.kind)
        lost, doubled, uniform, tail = (1.0, 1.0, luck.third(), 1.0) if calm else luck.four()
        stream = packet.bulk or packet.kind == "fin" or model.mode == "stream"
        if self.is_cut(a, b):
            if stream:
                connection.held[a].append(packet)
            else:
                self.world.seen["net:lost-in-cut"] += 1
            return
        loss = LOSSY if self._has("lossy", a, b) else model.loss
        if stream and (model.mode == "datagram" or loss == LOSSY):
            loss /= 20.0  # a reset takes much more with it than one datagram
        flipped = self._flipped(a, b, packet)
        if (lost < loss and packet.kind != "fin") or flipped:
            self.world.seen["net:flipped"] += flipped
            if stream:
                self.world.seen["net:reset"] += 1
                self._reset(connection, a, b)
            else:
                self.world.seen["net:lost"] += 1
            return
        at_s = self.world.now + packet.extra_s + self._latency_s(a, b, uniform, tail)
        at_s = max(at_s + self._held_back_s(a, b, packet, stream), connection.opens_at[b])
        if stream and not packet.bulk:
            at_s = connection.last[a] = max(at_s, connection.last[a] + ORDER_GAP_S)
        self._schedule(connection, b, packet, at_s)
        duplicate = LOSSY if self._has("duplicate", a, b) else model.duplicate
        if not stream and doubled < duplicate and packet.kind == "message":
            self.world.seen["net:doubled"] += 1
            late, _, _, much = self._stream(a, b, "double").four()
            self._schedule(connection, b, packet, at_s + DOUBLE_S_MAX * late * (much < 0.5))

    def _flipped(self, a: str, b: str, packet: Packet) -> bool:
        """A flipped bit fails the frame's authentication: the link ends, or the datagram is gone.

        Chunks are looked at where they arrive (``transfers``).
        """
        noisy = packet.kind == "message" and self.noisy(a, b)
        return noisy and self._stream(a, b, "noise").chance(NOISY)

    def noisy(self, a: str, b: str) -> bool:
        """Bits flip between the two."""
        return self._has("noisy", a, b)

    def _held_back_s(self, a: str, b: str, packet: Packet, stream: bool) -> float:
        """Seconds by which a packet comes later than others do."""
        late_s = 0.0
        if self._has("tail", a, b):
            uniform = self._stream(a, b, "tail").uniform()
            late_s = min(TAIL_MAX_S, TAIL_SCALE_S * ((1.0 - uniform) ** (-1.0 / TAIL_SHAPE) - 1.0))
            self.world.seen["net:tail"] += late_s > 1.0
        if packet.kind == "message" and not stream and self._has("reorder", a, b):
            held, much, _, _ = self._stream(a, b, "reorder").four()
            if held < LOSSY:
                self.world.seen["net:held-back"] += 1
                late_s += REORDER_S * much
        return late_s

    def _schedule(self, connection: Connection, b: str, packet: Packet, at_s: float) -> None:
        host = self.world.hosts[b]

        def land() -> None:
            if packet.kind == "fin" or connection.state[b] == "up":
                packet.arrive(host)

        self.world.at(at_s, host, land)

    def _reset(self, connection: Connection, a: str, b: str) -> None:
        low, high = self.world.model.latency_s
        for name, uniform in zip((a, b), self._stream(a, b, "reset").four(), strict=False):
            delay_s = low + (high - low) * uniform
            self.world.after(delay_s, self.world.hosts[name], self._end, connection, name)

    def _end(self, connection: Connection, name: str) -> None:
        """``name``'s end goes down; its node hears of it, the other end gets a FIN."""
        if connection.state[name] == "down":
            return
        was_up = connection.state[name] == "up"
        connection.state[name] = "down"
        connection.held[name].clear()
        names = list(connection.state)
        other = names[0] if names[1] == name else names[1]
        if connection.state[other] != "down":
            self._transmit(connection, name, other, _fin(connection, self))
        host = self.world.hosts[name]
        if was_up and host.alive:
            self._tell(host, "disconnected", other)

    def _tell(self, host: Host, what: str, other: str) -> None:
        """Give news of a link to the node as an event of its own (so that SIGSTOP holds it)."""

        def news() -> None:
            self.world.trace.record(self.world.now, host.name, what, other.encode())
            if what == "disconnected":
                self.world.transfers.lost_link(host, other)
            if host.alive:
                if what == "connected":
                    host.tell_wall_of(self.world.hosts[other])
                host.call(what, self.world.hosts[other].peer)

        self.world.at(self.world.now, host, news)

    def _knock(self, a: Host, b: Host, dial: _Dial) -> None:
        uniform, tail, back, _ = self._stream(a.name, b.name, "dial").four()
        there_s = self._latency_s(a.name, b.name, uniform, tail)
        back_s = self._latency_s(b.name, a.name, back, 1.0)
        timeout_s = limits.DIAL_TIMEOUT_S  # of the connection; handshakes are not simulated

        def arrived() -> None:
            shut = self.is_cut(a.name, b.name) or self.is_cut(b.name, a.name)
            if b.name in self.unreachable or not b.alive:
                wait_s = timeout_s if shut or b.dark else back_s
                self.world.after(wait_s, None, self._dial_failed, a, b, dial)
            elif shut or b.paused_until > self.world.now:
                self.world.after(timeout_s, None, self._dial_failed, a, b, dial)
            elif a.incarnation == dial.incarnation:
                self._establish(a, b, dial, back_s)

        self.world.after(there_s, None, arrived)

    def _dial_failed(self, a: Host, b: Host, dial: _Dial) -> None:
        if self._dials.get((a.name, b.name)) is dial:
            del self._dials[a.name, b.name]
        self.world.seen["net:dial-failed"] += 1
        if a.incarnation != dial.incarnation:
            return
        connection = self._connections.get(_pair(a.name, b.name))
        up = connection is not None and connection.state[a.name] == "up"
        for packet in dial.queue:
            if up and connection is not None:
                self._transmit(connection, a.name, b.name, packet)
            else:
                self._fail(a, packet)

    def _fail(self, a: Host, packet: Packet) -> None:
        if packet.fail is not None:
            self.world.at(self.world.now, a, packet.fail)

    def _establish(self, a: Host, b: Host, dial: _Dial, back_s: float) -> None:
        pair = _pair(a.name, b.name)
        old = self._connections.get(pair)
        if old is not None and not old.usable():
            for name in pair:  # the end that has not noticed yet notices now
                if old.state[name] != "down":
                    self._end(old, name)
            old = None
        if old is None:
            self._numbers += 1
            old = self._connections[pair] = Connection(self._numbers, a.name, b.name)
            for one, other in (pair, pair[::-1]):
                self._of.setdefault(one, {})[other] = old
            self._open(old, b, a)
            old.opens_at[a.name] = self.world.now + back_s
            self.world.after(back_s, None, self._open, old, a, b)
        self.world.after(back_s + ORDER_GAP_S, None, self._flush, old, a, b, dial)

    def _open(self, connection: Connection, host: Host, other: Host) -> None:
        if connection.state[host.name] != "pending" or not host.alive:
            return
        connection.state[host.name] = "up"
        if other.name not in self.unreachable:
            self._book.setdefault(host.name, set()).add(other.name)  # its greeting says where
        self._tell(host, "connected", other.name)

    def _flush(self, connection: Connection, a: Host, b: Host, dial: _Dial) -> None:
        if self._dials.get((a.name, b.name)) is dial:
            del self._dials[a.name, b.name]
        if a.incarnation != dial.incarnation:
            return
        for packet in dial.queue:
            if connection.state[a.name] == "up":
                self._transmit(connection, a.name, b.name, packet)
            else:
                self._fail(a, packet)


def _pair(a: str, b: str) -> tuple[str, str]:
    return (a, b) if a < b else (b, a)


def _fin(connection: Connection, network: Network) -> Packet:
    return Packet("fin", b"", lambda host: network._end(connection, host.name))
