"""A toy protocol to test the simulator with: numbered pings, acknowledged once they are durable."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from swarmtrain_protocols import merkle
from swarmtrain_protocols.core import Effect, Emit, Fetch, PeerId, Persist, Send
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.messages.session import Ping, Pong
from swarmtrain_protocols.testing.checks.base import Checker
from swarmtrain_protocols.testing.faults import Fault, Plan, generate
from swarmtrain_protocols.testing.world import Context, Host, NetworkModel, Violation, World

RETRY_S = 0.5
CALM = NetworkModel()


class ToyNode:
    """Sends pings 1, 2, … ``goal`` to ``target``; the receiver persists before it answers.

    ``hasty`` plants the bug: the answer does not wait for the disk.
    """

    def __init__(self, ctx: Context, target: PeerId | None, goal: int, hasty: bool) -> None:
        self.ctx, self.target, self.goal, self.hasty = ctx, target, goal, hasty
        self.out: list[Effect] = []
        self.acked = 0
        self.stored: dict[bytes, int] = {}
        for record in ctx.records:
            self.stored[record[:32]] = int.from_bytes(record[32:], "big")
        self.retry_at = ctx.now if target is not None else math.inf
        self.calls: list[tuple[str, float]] = []
        self.received: list[int] = []
        self.links: list[tuple[str, bytes]] = []
        self.fetch_news: list[tuple[int, str]] = []
        self.accepted: list[tuple[object, int, list[bytes]]] = []
        self.blobs: dict[bytes, merkle.Blob] = {}

    def receive(self, now: float, peer: PeerId, message: Message) -> None:
        if isinstance(message, Ping):
            self.received.append(message.nonce)
            self.calls.append(("ping", now))
            answer = Send(peer, Pong(message.nonce))
            if message.nonce > self.stored.get(peer, 0):
                self.stored[peer] = message.nonce
                record = Persist(peer + message.nonce.to_bytes(8, "big"))
                self.out += [answer, record] if self.hasty else [record, answer]
            else:
                self.out.append(answer)
        elif isinstance(message, Pong) and message.nonce == self.acked + 1:
            self.acked = message.nonce
            self.out.append(Emit(self.acked))
            self.retry_at = now

    def tick(self, now: float) -> None:
        self.calls.append(("tick", now))
        if self.target is None or self.acked >= self.goal or now < self.retry_at:
            return
        self.out.append(Send(self.target, Ping(self.acked + 1)))
        self.retry_at = now + RETRY_S

    def deadline(self) -> float:
        return self.retry_at if self.acked < self.goal else math.inf

    def drain(self) -> list[Effect]:
        out, self.out = self.out, []
        return out

    def connected(self, now: float, peer: PeerId) -> None:
        self.links.append(("up", peer))

    def disconnected(self, now: float, peer: PeerId) -> None:
        self.links.append(("down", peer))

    def fetched(self, now: float, ticket: int) -> None:
        self.fetch_news.append((ticket, "ok"))

    def fetch_failed(self, now: float, ticket: int, reason: str) -> None:
        self.fetch_news.append((ticket, reason))

    def emitted(self, now: float, event: object) -> None:
        pass

    def provide(self, root: bytes) -> merkle.Blob | None:
        return self.blobs.get(root)

    def accept(self, purpose: object, first: int, chunks: list[bytes]) -> None:
        self.accepted.append((purpose, first, chunks))

    def execute(self, now: float, effect: Effect) -> list[Any]:
        self.out.append(Emit(("executed", effect)))
        return [(0.25, lambda at: self.out.append(Emit(("completed", at - now))))]

    def fetch(self, ticket: int, peer: PeerId, root: bytes, first: int, count: int) -> None:
        self.out.append(Fetch(ticket, peer, root, first, count, ("purpose", ticket)))


class Acknowledged(Checker):
    """What was acknowledged to ``a`` is on the disk of ``b`` for ever."""

    def __init__(self) -> None:
        self.highest = 0

    def emitted(self, world: World, host: Host, event: object) -> None:
        if host.name == "a" and isinstance(event, int):
            self.highest = max(self.highest, event)

    def always(self, world: World, host: Host) -> None:
        records = world.hosts["b"].disk.records
        durable = [int.from_bytes(r[32:], "big") for r in records if r[:32] == world.peers["a"]]
        if self.highest > max(durable, default=0):
            world.violation("lost-ack", f"acknowledged {self.highest}, durable {durable[-1:]}")


class Events(Checker):
    def __init__(self) -> None:
        self.events: list[tuple[str, object]] = []

    def emitted(self, world: World, host: Host, event: object) -> None:
        self.events.append((host.name, event))


def toy_world(
    seed: int, *, model: NetworkModel | None = CALM, goal: int = 20, hasty: bool = False
) -> World:
    """Two hosts: ``a`` pings, ``b`` answers."""
    world = World(seed, model=model)
    world.add("b", lambda ctx: ToyNode(ctx, None, 0, hasty))
    world.add("a", lambda ctx: ToyNode(ctx, ctx.peers["b"], goal, hasty))
    world.watch(Acknowledged())
    return world


def acked(world: World) -> int:
    """How far ``a`` has come; 0 while it is down."""
    node = world.hosts["a"].node
    return 0 if node is None else int(node.acked)


PLAN = Plan(("a", "b"), end_s=12.0, count=(2, 10), triggers=("persist", "synced", "send:pong"))


def toy_run(seed: int, schedule: list[Fault], *, hasty: bool = False) -> tuple[World, str | None]:
    """A whole run in the weather of the seed; the class of its violation, if any."""
    world = toy_world(seed, model=None, goal=60, hasty=hasty)
    world.plan(schedule)
    try:
        world.run(12.0)
        world.heal()
        if not world.run(60.0, lambda: acked(world) >= 60):
            world.violation("liveness", f"{acked(world)} of 60")
    except Violation as broken:
        return world, broken.kind
    return world, None


def trace_of(seed: int) -> str:
    """Trace hash of a seeded toy run, for comparisons between interpreters."""
    world, _ = toy_run(seed, generate(seed, PLAN))
    return world.trace.digest()


def counters(seeds: range, *, hasty: bool = False) -> tuple[Counter[str], list[int]]:
    """How often each point fired, and the seeds that failed."""
    seen: Counter[str] = Counter()
    failed = []
    for seed in seeds:
        world, kind = toy_run(seed, generate(seed, PLAN), hasty=hasty)
        seen.update(set(world.seen))
        if kind is not None:
            failed.append(seed)
    return seen, failed
