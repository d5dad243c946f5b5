"""The log alone under trouble: three stewards, and two followers that only listen."""

from __future__ import annotations

import functools
import os
from collections import Counter

import msgspec
import pytest
from blake3 import blake3

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import Connect, Effect, Emit, PeerId
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.log.core import LogCore
from swarmtrain_protocols.log.events import Committed, Conflict, LedgerDiverged, SnapshotLoaded
from swarmtrain_protocols.manifest import make_genesis
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.testing.checks.base import Checker, settle_within
from swarmtrain_protocols.testing.disk import Disk
from swarmtrain_protocols.testing.faults import MORE_KINDS, Fault, Plan, generate, to_text
from swarmtrain_protocols.testing.keyring import FakeKeyring
from swarmtrain_protocols.testing.world import Context, Host, Violation, World

RUN = bytes(range(32))
STEWARDS = ("a", "b", "c")
NAMES = ("a", "b", "c", "d", "e")
PROPOSE_S = 0.3
SEEDS = max(60, int(os.environ.get("SWARMTRAIN_SIM_SEEDS", "60")))
TRIGGERS = (
    *("persist", "synced", "emit:Committed", "emit:LeaderChanged"),
    *("send:vote?", "send:vote", "send:append", "send:appended", "send:update"),
)


class LogNode:
    """A log core, a chain of hashes in place of a ledger, and a leader that keeps proposing."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.index = -1
        self.digest = bytes(32)
        self.known = (-1, bytes(32))
        """Index and digest of what was emitted, that is: after it was durable where it must be."""
        self.next_proposal = ctx.now
        self.next_dial = ctx.now
        self.proposed = 0
        self.ready: list[Effect] = []
        founder = FakeKeyring("founder")
        genesis = None
        if ctx.name == "a" and not ctx.records:
            genesis = make_genesis(founder, RUN, ctx.peer)
        self.log = LogCore(
            run=RUN,
            founder=founder.peer_id,
            keyring=ctx.keyring,
            rng=ctx.rng,
            now=ctx.now,
            records=ctx.records,
            genesis=genesis,
            snapshot_of=self.snapshot,
            compact_every=20,
        )
        self.log.set_stewards_known(ctx.now, [ctx.peers[n] for n in STEWARDS if n != ctx.name])
        self.collect()

    def snapshot(self) -> bytes:
        return msgspec.msgpack.encode((self.index, self.digest))

    def collect(self) -> None:
        """Drain the core and apply what is committed before anything else is fed to it."""
        for effect in self.log.drain():
            if isinstance(effect, Emit) and isinstance(effect.event, Committed):
                for entry in effect.event.entries:
                    assert entry.index == self.index + 1
                    body = e.encode_body(entry.body)
                    self.index = entry.index
                    self.digest = blake3(self.digest + body).digest()
            elif isinstance(effect, Emit) and isinstance(effect.event, SnapshotLoaded):
                index, digest = msgspec.msgpack.decode(effect.event.data)
                assert index == effect.event.index
                self.index, self.digest = index, digest
            self.ready.append(effect)

    def receive(self, now: float, peer: PeerId, message: Message) -> None:
        self.log.receive(now, peer, message)
        self.collect()

    def tick(self, now: float) -> None:
        self.log.tick(now)
        self.collect()
        if now >= self.next_dial:
            self.next_dial = now + 2.0
            peers = [peer for name, peer in self.ctx.peers.items() if name != self.ctx.name]
            self.ready += [Connect(peer) for peer in peers]
        if now >= self.next_proposal:
            self.next_proposal = now + PROPOSE_S
            self.propose(now)
            self.collect()

    def propose(self, now: float) -> None:
        if not (self.log.is_leader and self.log.ready):
            return
        try:
            if self.proposed < len(STEWARDS):
                self.log.propose(now, joined(STEWARDS[self.proposed], self.ctx))
            elif set(self.log.voters) != {self.ctx.peers[n] for n in STEWARDS}:
                self.log.change_voters(now, tuple(sorted(self.ctx.peers[n] for n in STEWARDS)))
            else:
                self.log.propose(now, e.Paused(f"{self.ctx.name} {now:.3f}"))
        except LocalProtocolError:
            return  # uncommitted entries are bounded, and set changes exclude each other
        self.proposed += 1

    def deadline(self) -> float:
        return min(self.log.deadline(), self.next_proposal, self.next_dial)

    def drain(self) -> list[Effect]:
        self.collect()
        out, self.ready = self.ready, []
        return out

    def connected(self, now: float, peer: PeerId) -> None:
        self.log.connected(now, peer)
        self.collect()

    def disconnected(self, now: float, peer: PeerId) -> None:
        self.log.disconnected(now, peer)
        self.collect()

    def fetched(self, now: float, ticket: int) -> None:
        raise AssertionError("the log fetches nothing")

    def fetch_failed(self, now: float, ticket: int, reason: str) -> None:
        raise AssertionError("the log fetches nothing")

    def provide(self, root: bytes) -> Blob | None:
        return None

    def accept(self, purpose: object, first: int, chunks: list[bytes]) -> None:
        raise AssertionError("the log fetches nothing")

    def emitted(self, now: float, event: object) -> None:
        assert not isinstance(event, Conflict | LedgerDiverged), event
        if isinstance(event, Committed):
            for entry in event.entries:
                digest = blake3(self.known[1] + e.encode_body(entry.body)).digest()
                self.known = (entry.index, digest)
        elif isinstance(event, SnapshotLoaded):
            index, digest = msgspec.msgpack.decode(event.data)
            self.known = (index, digest)

    def execute(self, now: float, effect: Effect) -> None:
        raise AssertionError(f"unknown effect {effect}")


def joined(name: str, ctx: Context) -> e.MemberJoined:
    return e.MemberJoined(
        member=ctx.peers[name],
        name=name,
        addresses=(),
        trains=False,
        holds_state=False,
        may_vote=True,
        reachable=True,
    )


class OneLog(Checker):
    """Prefixes agree for ever (chained hashes), a term has one leader, nothing goes back."""

    def __init__(self) -> None:
        self.digests: dict[int, bytes] = {}
        self.leaders: dict[tuple[int, int], str] = {}
        self.committed = -1

    def always(self, world: World, host: Host) -> None:
        node: LogNode = host.node
        index, digest = node.known
        if index >= 0:
            if self.digests.setdefault(index, digest) != digest:
                world.violation("fork", f"{host.name} has another prefix up to {index}")
            self.committed = max(self.committed, index)
        if node.log.is_leader:
            key = (node.log.generation, node.log.term)
            leader = self.leaders.setdefault(key, host.name)
            if leader != host.name:
                world.violation("two-leaders", f"{leader} and {host.name} lead in {key}")

    def booted(self, world: World, host: Host) -> None:
        world.seen["log:restarted-with-entries"] += host.node.index >= 0
        world.seen["log:elections"] = len(self.leaders)


def run_log(seed: int, schedule: list[Fault]) -> tuple[World, OneLog, str]:
    world = World(seed)
    checker = OneLog()
    for index, name in enumerate(NAMES):
        world.add(name, LogNode, start_s=12.0 if name == "e" else 0.3 * index)
    world.watch(checker)
    world.plan(schedule)
    try:
        world.run(24.0)
        target = checker.committed + 5

        def done() -> bool:
            nodes = [host.node for host in world.hosts.values()]
            return all(node is not None and node.index >= target for node in nodes)

        settle_within(world, 40.0, done, lambda: describe(world, target))
    except Violation as broken:
        return world, checker, str(broken)
    return world, checker, ""


def describe(world: World, target: int) -> str:
    return f"target {target}: " + " ".join(
        f"{n}={h.node.index}{'L' if h.node.log.is_leader else ''}" for n, h in world.hosts.items()
    )


def plan() -> Plan:
    return Plan(
        NAMES,
        start_s=2.0,
        end_s=20.0,
        count=(2, 14),
        triggers=TRIGGERS,
        aimed_share=0.5,
        more=(*MORE_KINDS, "diskfull"),
    )


@functools.cache
def part(index: int) -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed in range(index, SEEDS, 6):
        schedule = generate(seed, plan())
        world, checker, wrong = run_log(seed, schedule)
        assert not wrong, f"seed {seed}: {wrong}\n{to_text(schedule)}\n" + "\n".join(
            world.trace.tail(30)
        )
        assert checker.committed >= 20
        if len(checker.leaders) > 1:
            seen["re-election"] += 1
        seen.update(set(world.seen))
    return seen


@pytest.mark.parametrize("index", range(6))
def test_prefixes_agree_terms_have_one_leader_and_it_goes_on(index: int) -> None:
    seen = part(index)  # asserts that nothing went wrong, schedule by schedule
    assert seen["send:append"] == len(range(index, SEEDS, 6))


def test_trouble_is_real() -> None:
    seen: Counter[str] = Counter()
    for index in range(6):
        seen.update(part(index))
    for name in (
        *("re-election", "disk:lost", "disk:torn", "send:vote", "log:restarted-with-entries"),
        *("fault:aim-crash", "fault:split", "fault:pause", "send:snapshot"),
        *("aim:persist", "aim:synced", "aim:send:vote", "aim:send:appended"),
    ):
        assert seen[name] >= 2, (name, seen)


def test_one_fault_at_any_moment_of_a_clean_run() -> None:
    """A crash of each steward at each of many moments, aimed at every kind of effect."""
    for steward in STEWARDS:
        for trigger in TRIGGERS:
            at_s = (0.0, 3.0)[len(trigger) % 2]
            schedule = [Fault(at_s, "aim-crash", steward, trigger, 1.0)]
            _, _, wrong = run_log(1000, schedule)
            assert not wrong, (schedule, wrong)


POWER_CUT = [Fault(10.0, "crash", name, "", 1.0) for name in STEWARDS]


def test_a_power_cut_of_all_stewards_loses_nothing() -> None:
    for seed in range(4):
        _, checker, wrong = run_log(seed, POWER_CUT)
        assert not wrong, (seed, wrong)
        assert checker.committed >= 40


def test_a_log_that_is_not_durable_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkers bite: the same power cut, with disks that forget what they have synced."""
    monkeypatch.setattr(Disk, "sync", lambda self: self._pending.clear())
    for seed in range(4):
        _, _, wrong = run_log(seed, POWER_CUT)
        assert wrong, seed
