"""Sixty DHT nodes under churn and cuts: nothing false is ever found, everything is found after."""

from __future__ import annotations

import os

import pytest

from swarmtrain_protocols.core import Connect, Effect, PeerId
from swarmtrain_protocols.dht.events import DhtFound
from swarmtrain_protocols.dht.kademlia import DhtCore
from swarmtrain_protocols.dht.records import decode_value, encode_value
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.testing.checks.base import Checker, settle_within
from swarmtrain_protocols.testing.faults import Fault, Plan, generate, to_text
from swarmtrain_protocols.testing.network import address_of
from swarmtrain_protocols.testing.world import Context, Host, Violation, World

NODES = 60
NAMES = tuple(f"n{i}" for i in range(NODES))
PUBLISHERS = NAMES[:12]
RUN = bytes(range(32))
DHT_SEEDS = 1 + int(os.environ.get("SWARMTRAIN_SIM_SEEDS", "0")) // 500
GET_S = 2.0
REDIAL_S = 5.0


class DhtNode:
    """A DHT core that publishes one key (some do) and keeps looking up the keys of others."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.core = DhtCore(
            keyring=ctx.keyring,
            rng=ctx.rng,
            now=ctx.now,
            wall_s=ctx.wall_s,
            addresses=(address_of(ctx.name),),
            run=RUN,
        )
        self.links: dict[PeerId, None] = {}
        self.extra: list[Effect] = []
        self.redial_at = ctx.now
        self.get_at = ctx.now + 8.0 + ctx.rng.random() * GET_S
        self.publish_at = ctx.now + 4.0
        self.asked: dict[int, str] = {}
        self.fresh: dict[str, float] = {}
        """When a key was last found here, by the name of its publisher; own clock."""
        self.last_sequence: dict[bytes, int] = {}
        self.turn = ctx.rng.randrange(len(PUBLISHERS))

    def receive(self, now: float, peer: PeerId, message: Message) -> None:
        self.core.receive(now, peer, message)

    def tick(self, now: float) -> None:
        self.core.tick(now)
        if now >= self.redial_at:
            self.redial_at = now + REDIAL_S
            if not self.links:
                seeds = [n for n in ("n0", "n1", "n2") if n != self.ctx.name]
                self.extra += [Connect(self.ctx.peers[n], (address_of(n),)) for n in seeds]
        if now >= self.publish_at:
            self.publish_at = float("inf")
            if self.ctx.name in PUBLISHERS:
                value = encode_value([self.ctx.name, self.ctx.incarnation])
                self.core.store(now, "key/" + self.ctx.name, value, 120.0, keep=True)
        if now >= self.get_at:
            self.get_at = now + GET_S
            self.turn = (self.turn + 1) % len(PUBLISHERS)
            name = PUBLISHERS[self.turn]
            self.asked[self.core.get(now, "key/" + name)] = name

    def deadline(self) -> float:
        return min(self.core.deadline(), self.redial_at, self.get_at, self.publish_at)

    def drain(self) -> list[Effect]:
        out = [*self.core.drain(), *self.extra]
        self.extra = []
        return out

    def connected(self, now: float, peer: PeerId) -> None:
        self.links[peer] = None
        name = next(n for n, p in self.ctx.peers.items() if p == peer)
        self.core.connected(now, peer, (address_of(name),))

    def disconnected(self, now: float, peer: PeerId) -> None:
        self.links.pop(peer, None)
        self.core.disconnected(now, peer)

    def emitted(self, now: float, event: object) -> None:
        if isinstance(event, DhtFound) and event.handle in self.asked:
            name = self.asked.pop(event.handle)
            if event.records:
                self.fresh[name] = now

    def fetched(self, now: float, ticket: int) -> None:
        raise AssertionError("the DHT fetches nothing")

    def fetch_failed(self, now: float, ticket: int, reason: str) -> None:
        raise AssertionError("the DHT fetches nothing")

    def provide(self, root: bytes) -> Blob | None:
        return None

    def accept(self, purpose: object, first: int, chunks: list[bytes]) -> None:
        raise AssertionError("the DHT fetches nothing")

    def execute(self, now: float, effect: Effect) -> None:
        raise AssertionError(f"unknown effect {effect}")


class NothingFalse(Checker):
    """MB1, MB2: what is found was published by its publisher, and never an older one later."""

    def __init__(self) -> None:
        self.newest: dict[tuple[str, int, bytes], int] = {}
        self.looks = 0

    def emitted(self, world: World, host: Host, event: object) -> None:
        if not isinstance(event, DhtFound):
            return
        for record in event.records:
            world.seen["dht:found"] += 1
            publisher = world.by_peer[record.publisher].name
            name, incarnation = decode_value(record.value)
            if name != publisher or incarnation > world.hosts[name].incarnation:
                world.violation("MB1", f"{host.name} finds {name} by {publisher}")
            key = (host.name, host.incarnation, record.key + record.publisher)
            if record.sequence < self.newest.get(key, 0):
                world.violation("MB2", f"{host.name} finds an older record of {name}")
            self.newest[key] = record.sequence

    def always(self, world: World, host: Host) -> None:
        self.looks += 1
        if self.looks % 50:
            return  # a table has many contacts
        if any(contact.peer == host.peer for contact in host.node.core.table.contacts()):
            world.violation("MB4", f"{host.name} is in its own routing table")


def run_dht(seed: int, schedule: list[Fault]) -> tuple[World, str]:
    world = World(seed, strict_addresses=True)
    for index, name in enumerate(NAMES):
        world.add(name, DhtNode, start_s=0.05 * index)
    world.watch(NothingFalse())
    world.plan(schedule)
    try:
        world.run(30.0)
        since = {name: host.local_now() for name, host in world.hosts.items()}
        readers = NAMES[::5]

        def found(reader: str, name: str) -> bool:
            host = world.hosts[reader]
            return host.alive and host.node.fresh.get(name, 0.0) > since[reader]

        def done() -> bool:
            return all(found(r, name) for r in readers for name in PUBLISHERS)

        def open_ends() -> str:
            return str([(r, n) for r in readers for n in PUBLISHERS if not found(r, n)][:20])

        settle_within(world, 90.0, done, open_ends)
    except Violation as broken:
        return world, str(broken)
    return world, ""


@pytest.mark.slow
def test_everything_published_is_found_after_trouble() -> None:
    plan = Plan(
        NAMES,
        start_s=6.0,
        end_s=24.0,
        count=(20, 40),
        triggers=("send:dht-store?", "send:dht-value?", "connect"),
        aimed_share=0.2,
    )
    seen: dict[str, int] = {}
    for seed in range(DHT_SEEDS):
        schedule = generate(seed, plan)
        world, wrong = run_dht(seed, schedule)
        assert not wrong, f"seed {seed}: {wrong}\n{to_text(schedule)}"
        for name, count in world.seen.items():
            seen[name] = seen.get(name, 0) + count
    assert seen["dht:found"] > 500
    assert seen["fault:crash"] >= 3
