"""One simulated machine: a process that may die, its clock, its disk and its queue of effects."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from swarmtrain_protocols import core
from swarmtrain_protocols.core import Effect, PeerId
from swarmtrain_protocols.testing.disk import Disk
from swarmtrain_protocols.testing.draws import Stream, generator
from swarmtrain_protocols.testing.faults import SLOW_SYNC_S, Fault
from swarmtrain_protocols.testing.keyring import FakeKeyring, peer_id_of

if TYPE_CHECKING:
    import random

    from swarmtrain_protocols.merkle import Blob
    from swarmtrain_protocols.messages import Message
    from swarmtrain_protocols.testing.transfers import Transfer
    from swarmtrain_protocols.testing.world import World

SPINS_MAX = 200
"""Ticks without progress of time after which a core is said to spin."""
CLOCK_OFFSET_S_MAX = 1e5
CLOCK_DRIFT_MAX = 2e-4
WALL_START_S = 1_800_000_000.0
WALL_SKEW_S_MAX = 20.0

Completion = tuple[float, Callable[[float], None]]


class Node(core.Core, Protocol):
    """What the world drives: a core, its links, its fetches and its data plane."""

    def connected(self, now: float, peer: PeerId) -> None: ...

    def disconnected(self, now: float, peer: PeerId) -> None: ...

    def fetched(self, now: float, ticket: int) -> None: ...

    def fetch_failed(self, now: float, ticket: int, reason: str) -> None: ...

    def emitted(self, now: float, event: object) -> None:
        """The layer above gets an event of ``Emit``, at its place in the order of effects."""

    def provide(self, root: bytes) -> Blob | None:
        """The blob whose Merkle root is ``root``, if this node can serve it."""

    def accept(self, purpose: object, first: int, chunks: list[bytes]) -> None:
        """Verified chunks of a fetch, put where ``purpose`` says."""

    def execute(self, now: float, effect: Effect) -> Sequence[Completion] | None:
        """Do an effect that the world does not know; completions are (delay_s, call(now))."""


@dataclass(frozen=True)
class Context:
    """What a process knows when it starts: its identity, its disk, its randomness."""

    name: str
    peer: PeerId
    keyring: FakeKeyring
    records: list[bytes]
    disk: Disk
    rng: random.Random
    now: float
    wall_s: float
    incarnation: int
    peers: dict[str, PeerId]

    def entropy(self, nbytes: int) -> bytes:
        """Stands in for the operating system's entropy."""
        return self.rng.randbytes(nbytes)


Factory = Callable[[Context], Any]
"""Builds (or rebuilds after a crash) a ``Node`` from its durable records."""


class Host:
    """A site in the world. ``incarnation`` grows at each crash; older events are void."""

    def __init__(self, world: World, name: str, factory: Factory) -> None:
        self.world = world
        self.name = name
        self.peer = peer_id_of(name)
        self.keyring = FakeKeyring(name)
        self.factory = factory
        self.incarnation = 0
        self.alive = False
        self.vanished = False
        self.paused_until = 0.0
        self.node: Any = None
        self.disk = Disk(Stream(world.seed, name, "disk"), world.seen)
        self.fetches: dict[int, Transfer] = {}
        self.armed: list[Fault] = []
        self.slow_disk_until = 0.0
        self._queue: deque[Effect] = deque()
        self._syncing = False
        self._settling = False
        self._tick_at = math.inf
        self._tick_number = 0
        self._spins = 0
        self._spin_at = -1.0
        self._sync_luck = Stream(world.seed, name, "sync")
        luck = Stream(world.seed, name, "clock")
        self._offset_s = luck.between(0.0, CLOCK_OFFSET_S_MAX)
        self._rate = 1.0 + luck.between(-CLOCK_DRIFT_MAX, CLOCK_DRIFT_MAX)
        self._wall_skew_s = luck.between(-WALL_SKEW_S_MAX, WALL_SKEW_S_MAX)
        self._last_local = 0.0

    # --- life ------------------------------------------------------------------------------------

    def boot(self) -> None:
        """Start the process from what is durable."""
        assert not self.alive and not self.vanished
        self.alive = True
        self.world.trace.record(self.world.now, self.name, "boot", str(self.incarnation).encode())
        context = Context(
            name=self.name,
            peer=self.peer,
            keyring=self.keyring,
            records=list(self.disk.records),
            disk=self.disk,
            rng=generator(self.world.seed, self.name, str(self.incarnation)),
            now=self.local_now(),
            wall_s=WALL_START_S + self.world.now + self._wall_skew_s,
            incarnation=self.incarnation,
            peers=self.world.peers,
        )

        def build() -> None:
            self.node = self.factory(context)

        self.world.guarded(self, build)
        self.settle()

    def kill(self) -> None:
        """Like kill -9: no clean-up, and everything volatile is lost."""
        assert self.alive
        self.world.trace.record(self.world.now, self.name, "kill")
        self.alive = False
        self.incarnation += 1
        self.node = None
        self._queue.clear()
        self._syncing = False
        self.fetches.clear()
        self.disk.crash()
        self._tick_at = math.inf
        self._tick_number += 1
        self.paused_until = 0.0

    @property
    def running(self) -> bool:
        """Alive and not stopped at this moment."""
        return self.alive and self.paused_until <= self.world.now

    @property
    def quiet(self) -> bool:
        """Everything that the node has asked for is carried out, or under way."""
        return not self._queue

    # --- clock -----------------------------------------------------------------------------------

    def local_now(self) -> float:
        """This machine's monotonic clock; each has its own zero and drift."""
        local = self._offset_s + self.world.now * self._rate
        self._last_local = max(self._last_local, local)
        return self._last_local

    def _world_time(self, local: float) -> float:
        return (local - self._offset_s) / self._rate

    # --- calls into the node ---------------------------------------------------------------------

    def call(self, method: str, *args: object) -> None:
        """Call ``node.method(now, *args)`` and carry out what it asks for."""
        self.world.guarded(self, getattr(self.node, method), self.local_now(), *args)
        self.settle()

    def receive(self, sender: PeerId, message: Message) -> None:
        self.call("receive", sender, message)

    def settle(self) -> None:
        """Collect effects, carry out what may be carried out, set the timer."""
        if self._settling:
            return
        self._settling = True
        try:
            self._collect()
            while self._queue and not self._syncing and self.running:
                self._next_effect()
                if self.alive:
                    self._collect()
            if self._queue and self.paused_until > self.world.now:
                self.world.at(self.paused_until, self, self.settle)
        finally:
            self._settling = False
        if self.alive:
            self.world.observe(self)
            self._set_timer()

    def _collect(self) -> None:
        found: list[Effect] = []
        self.world.guarded(self, lambda: found.extend(self.node.drain()))
        self._queue.extend(found)

    def _next_effect(self) -> None:
        effect = self._queue.popleft()
        if isinstance(effect, core.Persist):
            batch = [effect]
            while self._queue and isinstance(self._queue[0], core.Persist):
                following = self._queue.popleft()
                assert isinstance(following, core.Persist)
                batch.append(following)
            self._syncing = True
            self.disk.append(batch)
            self.world.after(self._sync_delay_s(), self, self._synced)
            self.hit("persist")
            return
        label = self.world.execute(self, effect)
        self.hit(label)

    def _sync_delay_s(self) -> float:
        model = self.world.model
        if self.slow_disk_until > self.world.now:
            return self._sync_luck.between(0.0, SLOW_SYNC_S)
        return self._sync_luck.between(*model.sync_s)

    def _synced(self) -> None:
        self.disk.sync()
        self._syncing = False
        self.world.trace.record(self.world.now, self.name, "synced")
        self.hit("synced")
        if self.alive:
            self.settle()

    def hit(self, label: str) -> None:
        """Fire a fault that is aimed at what this host has just done."""
        if not self.armed:
            return
        for item in self.armed:
            if item.b == label:
                self.armed.remove(item)
                self.world.fire(item)
                return

    # --- timer -----------------------------------------------------------------------------------

    def _set_timer(self) -> None:
        wanted = self._world_time(self.node.deadline())
        if wanted >= self._tick_at:
            return
        self._tick_at = max(wanted, self.world.now)
        self._tick_number += 1
        self.world.at(self._tick_at, self, self._timer, self._tick_number)

    def _timer(self, number: int) -> None:
        if number != self._tick_number:
            return
        self._tick_at = math.inf
        deadline = self.node.deadline()
        if self._world_time(deadline) > self.world.now + 1e-9:
            self._set_timer()
            return
        self._last_local = max(self.local_now(), deadline)
        self._count_spins()
        self.world.trace.record(self.world.now, self.name, "tick")
        self.call("tick")

    def _count_spins(self) -> None:
        if self.world.now - self._spin_at > 1e-3:
            self._spin_at, self._spins = self.world.now, 0
        self._spins += 1
        if self._spins > SPINS_MAX:
            self.world.violation("spin", f"{self.name}: deadline() stays in the past after tick()")
