"""Swarms of which some cannot be dialled, and members that relay between them, in virtual time.

``run_nat(seed)`` is one schedule: one or two seeds that can be dialled and hold no state, and two
or three trainers behind routers. Whoever of them comes late, or was away, can have the state only
from another one, through a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Effect, PeerId
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.messages.reach import RelayOffer, RelayReply, RelayRequest
from swarmtrain_protocols.relay import CloseStream, OpenStream, Relay, Splice, StreamFailed
from swarmtrain_protocols.testing.checks.base import Checker, settle_within
from swarmtrain_protocols.testing.checks.rounds import RoundsAreRight
from swarmtrain_protocols.testing.draws import Stream
from swarmtrain_protocols.testing.faults import PLAIN_KINDS, Fault, Plan, generate
from swarmtrain_protocols.testing.network import Connection, Network, Packet, _Dial, _pair
from swarmtrain_protocols.testing.site import Site, SitePart, SwarmSpec
from swarmtrain_protocols.testing.swarm import (
    HEAL_AT_S,
    LIVENESS_S,
    TROUBLE_FROM_S,
    TROUBLE_UNTIL_S,
    Outcome,
    Swarm,
    _Recovered,
    describe,
    play,
    spec_of,
    start_sites,
    truth_of,
)
from swarmtrain_protocols.testing.truth import Truth
from swarmtrain_protocols.testing.world import World

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Completion, Context, Host

TRIGGERS = (
    *("do:OpenStream", "do:Splice", "do:CloseStream", "send:relay?", "send:relay-offer"),
    *("do:InstallSnapshot", "do:ApplyResult", "send:state-snapshot"),
)


class RelayedNetwork(Network):
    """A network in which a host may carry the connection of two others."""

    def __init__(self, world: World) -> None:
        super().__init__(world, True)
        self.via: dict[tuple[str, str], tuple[str, int]] = {}

    def dial(self, a: Host, b: Host, packet: Packet | None = None) -> None:
        up = self._up(a.name, b.name)
        super().dial(a, b, packet)
        if not up and not self.knows(a.name, b.name):
            self.world.at(self.world.now, a, a.call, "no_route", b.peer)

    def _up(self, a: str, b: str) -> bool:
        connection = self._connections.get(_pair(a, b))
        return connection is not None and connection.state[a] == "up"

    def is_cut(self, a: str, b: str) -> bool:
        carried = self.via.get(_pair(a, b))
        if carried is None:
            return super().is_cut(a, b)
        return super().is_cut(a, carried[0]) or super().is_cut(carried[0], b)

    def open_stream(self, host: Host, effect: OpenStream) -> None:
        """``host`` dials the one between and says its token."""
        via = self.world.by_peer[effect.via]
        uniform, tail, _, _ = self._stream(host.name, via.name, "relay").four()
        there_s = self._latency_s(host.name, via.name, uniform, tail)
        end = host.name, host.incarnation, effect.kind

        def arrived() -> None:
            if not super(RelayedNetwork, self).is_cut(host.name, via.name):
                self.world.at(self.world.now, via, via.call, "stream_end", effect.token, end)

        self.world.after(there_s, None, arrived)
        if effect.kind == "link":
            wait_s = limits.RELAY_WAIT_S + limits.HANDSHAKE_TIMEOUT_S / 10
            self.world.after(wait_s, host, host.call, "stream_over", effect.peer)

    def splice(self, via: str, number: int, ends: list[tuple[str, int, str]]) -> None:
        """Both ends are at ``via``: the two have a connection."""
        ends = sorted(ends, key=lambda end: end[2] != "link")
        (a, born_a, kind), (b, born_b, answers) = ends
        one, two = self.world.hosts[a], self.world.hosts[b]
        if (kind, answers) != ("link", "answer"):
            self.world.violation("wrong-ends", f"{via} splices {ends}")
        alive = one.alive and two.alive and (one.incarnation, two.incarnation) == (born_a, born_b)
        if not alive or self._usable(a, b):
            return  # it stays silent, and is closed for that
        self.via[_pair(a, b)] = via, number
        self.world.seen["relay:spliced"] += 1
        self._establish(one, two, _Dial(one.incarnation), 0.01)

    def _usable(self, a: str, b: str) -> bool:
        connection = self._connections.get(_pair(a, b))
        return connection is not None and connection.usable()

    def hang_up(self, via: str, number: int) -> None:
        """``via`` carries the stream no more: both ends see their connection end."""
        for pair, carried in list(self.via.items()):
            if carried == (via, number):
                for name in pair:
                    self._end(self._connections[pair], name)

    def died(self, host: Host, *, silent: bool) -> None:
        super().died(host, silent=silent)
        for pair, (via, _) in list(self.via.items()):
            if via == host.name:
                self._reset(self._connections[pair], *pair)

    def _end(self, connection: Connection, name: str) -> None:
        super()._end(connection, name)
        pair = _pair(*connection.state)
        carried = self.via.get(pair)
        if carried is not None and set(connection.state.values()) == {"down"}:
            del self.via[pair]
            via = self.world.hosts[carried[0]]
            if via.alive:
                self.world.at(self.world.now, via, via.call, "stream_closed", carried[1])

    def _transmit(self, connection: Connection, a: str, b: str, packet: Packet) -> None:
        carried = self.via.get(_pair(a, b))
        if carried is not None and packet.kind != "fin":
            via = self.world.hosts[carried[0]]
            if not via.alive:
                return
            nbytes = len(packet.data) + 1
            self.world.bytes_moved["relayed"] += nbytes
            self.world.at(self.world.now, via, via.call, "stream_moved", carried[1], nbytes)
        super()._transmit(connection, a, b, packet)


class NatSite(Site):
    """A site with its relay core."""

    def __init__(
        self, ctx: Context, spec: SwarmSpec, part: SitePart, truth: Truth, world: World
    ) -> None:
        super().__init__(ctx, spec, part, truth)
        assert isinstance(world.network, RelayedNetwork)
        self.net = world.network
        self.host = world.hosts[ctx.name]
        self.ends: dict[int, list[tuple[str, int, str]]] = {}
        self.relay = Relay(
            me=ctx.peer,
            entropy=ctx.entropy,
            dialled_by_others=self._can_be_dialled,
            relays=part.reachable,
            uses=True,
        )

    def _can_be_dialled(self, peer: PeerId) -> bool | None:
        known = self.core.ledger.members.get(peer)
        return None if known is None else known.reachable

    def receive(self, now: float, peer: PeerId, message: Message) -> None:
        if not isinstance(message, RelayRequest | RelayReply | RelayOffer):
            super().receive(now, peer, message)
            return
        try:
            self.relay.receive(now, peer, message)
        except PeerFault as fault:
            self.truth.seen["fault-raised:" + fault.code] += 1

    def tick(self, now: float) -> None:
        super().tick(now)
        self.relay.tick(now)

    def deadline(self) -> float:
        return min(super().deadline(), self.relay.deadline())

    def drain(self) -> list[Effect]:
        return [*super().drain(), *self.relay.drain()]

    def connected(self, now: float, peer: PeerId) -> None:
        name = self.truth.name_of(peer)
        direct = _pair(name, self.ctx.name) not in self.net.via
        relays = self.truth.parts[name].reachable
        self.relay.connected(now, peer, relays=relays, direct=direct)
        super().connected(now, peer)

    def disconnected(self, now: float, peer: PeerId) -> None:
        self.relay.disconnected(now, peer)
        super().disconnected(now, peer)

    def execute(self, now: float, effect: Effect) -> list[Completion]:
        if isinstance(effect, OpenStream):
            self.net.open_stream(self.host, effect)
        elif isinstance(effect, Splice):
            self.net.splice(self.ctx.name, effect.stream, self.ends[effect.stream])
        elif isinstance(effect, CloseStream):
            self.ends.pop(effect.stream, None)
            self.net.hang_up(self.ctx.name, effect.stream)
        elif isinstance(effect, StreamFailed):
            self.truth.seen["relay:failed:" + effect.code] += 1
        else:
            return super().execute(now, effect)
        return []

    # What the network tells.

    def no_route(self, now: float, peer: PeerId) -> None:
        self.relay.want(now, peer)

    def stream_end(self, now: float, token: bytes, end: tuple[str, int, str]) -> None:
        number = self.relay.attached(now, token)
        if number is not None:
            self.ends.setdefault(number, []).append(end)

    def stream_over(self, now: float, peer: PeerId) -> None:
        """The time for a stream of this site to become a link is over."""
        if peer not in self.core.linked():
            self.relay.opened(now, peer, False)

    def stream_moved(self, now: float, number: int, nbytes: int) -> None:
        self.relay.moved(now, number, nbytes)

    def stream_closed(self, now: float, number: int) -> None:
        self.relay.closed(now, number)


class RelaysAreFair(Checker):
    """Only those that cannot be dialled are relayed to, within bounds, and every byte is paid."""

    def always(self, world: World, host: Host) -> None:
        site = host.node
        if not isinstance(site, NatSite):
            return
        relay = site.relay
        mine: dict[PeerId, int] = {}
        for stream in relay._streams.values():
            if site.truth.parts[site.truth.name_of(stream.ends[1])].reachable:
                world.violation("detour", f"{host.name} relays to a site that can be dialled")
            for end in stream.ends:
                mine[end] = mine.get(end, 0) + 1
        if any(count > limits.RELAY_STREAMS_PER_PEER_MAX for count in mine.values()):
            world.violation("streams", f"{host.name} carries too many streams of one member")
        if sum(relay.spent.values()) != 2 * relay.relayed_bytes:
            world.violation("unpaid", f"{host.name} has carried bytes that nobody paid")
        for number, ends in site.ends.items():
            open_ = relay._streams.get(number)
            names = [site.truth.name_of(e) for e in open_.ends] if open_ is not None else []
            if names and any(name not in names for name, _, _ in ends):
                world.violation("wrong-ends", f"{host.name}: {ends} at a stream of {names}")


def nat_spec_of(seed: int) -> tuple[SwarmSpec, tuple[SitePart, ...]]:
    """One or two seeds without state, two or three trainers that nobody can dial."""
    luck = Stream(seed, "nat")
    spec, _ = spec_of(seed)
    seeds = "ab"[: 1 + luck.integer(2)]
    hidden = "cde"[: 2 + luck.integer(2)]
    parts = [SitePart(name, trains=False, holds_state=False) for name in seeds]
    parts += [SitePart(name, reachable=False, votes=False) for name in hidden]
    return replace(spec, group_every_s=0.0), tuple(parts)


def build_nat(seed: int) -> Swarm:
    """The world of a seed; the last trainer comes late, and needs the state of another one."""
    spec, parts = nat_spec_of(seed)
    world = World(seed, strict_addresses=True)
    world.network = RelayedNetwork(world)
    truth = truth_of(Truth, world, parts)
    truth.ticket_sites = tuple(part.name for part in parts if part.reachable)
    rounds = RoundsAreRight(truth, spec.manifest.keys, spec.chunk_values)

    def make(part: SitePart, ctx: Context) -> NatSite:
        return NatSite(ctx, spec, part, truth, world)

    start_sites(world, seed, spec.founder_site, parts, make, within_s=8.0)
    world.watch(rounds, RelaysAreFair())
    return Swarm(world, truth, rounds, spec)


def nat_plan_of(seed: int) -> Plan:
    """What may go wrong: as in other swarms, and around the streams."""
    names = tuple(part.name for part in nat_spec_of(seed)[1])
    return Plan(
        names,
        start_s=TROUBLE_FROM_S,
        end_s=TROUBLE_UNTIL_S,
        count=(2, 10),
        kinds=PLAIN_KINDS,
        triggers=TRIGGERS,
    )


def run_nat(seed: int, schedule: Sequence[Fault] | None = None) -> Outcome:
    """One schedule from beginning to end; the schedule is that of the seed unless given."""
    faults = list(schedule) if schedule is not None else generate(seed, nat_plan_of(seed))
    outcome = Outcome(seed, faults)
    swarm = build_nat(seed)

    def trouble() -> None:
        swarm.world.run(HEAL_AT_S)
        outcome.recovery_s = settle_within(
            swarm.world, LIVENESS_S, _Recovered(swarm), lambda: describe(swarm)
        )

    play(swarm.world, outcome, (), trouble)
    outcome.committed = len(swarm.rounds.committed)
    outcome.aborted = swarm.rounds.aborted
    return outcome
