"""One simulated machine: a process that may die, its clock, its disk and its queue of effects."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from swarmtrain_protocols import core, limits
from swarmtrain_protocols.core import Effect, PeerId, Persist, Probe
from swarmtrain_protocols.testing.aims import labels_of
from swarmtrain_protocols.testing.clock import HostClock
from swarmtrain_protocols.testing.disk import Disk
from swarmtrain_protocols.testing.draws import Stream, generator
from swarmtrain_protocols.testing.faults import SLOW_EVENT_S, SLOW_SYNC_S, Fault
from swarmtrain_protocols.testing.keyring import FakeKeyring, peer_id_of

if TYPE_CHECKING:
    import random

    from swarmtrain_protocols.merkle import Blob
    from swarmtrain_protocols.messages import Message
    from swarmtrain_protocols.testing.transfers import Transfer
    from swarmtrain_protocols.testing.world import World

SPINS_MAX = 200
"""Ticks without progress of time after which a core is said to spin."""

Completion = tuple[float, Callable[[float], None]]


class Node(core.Core, Protocol):
    """What the world drives: a core, its links, its fetches and its data plane."""

    def connected(self, now: float, peer: PeerId) -> None: ...

    def disconnected(self, now: float, peer: PeerId) -> None: ...

    def answered(self, now: float, peer: PeerId, rtt_s: float) -> bool: ...

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
        self.dark = False
        """Off, so that nobody is told why it does not answer."""
        self.paused_until = 0.0
        self.asleep_until = 0.0
        self.slow_until = 0.0
        self.node: Any = None
        self.disk = Disk(Stream(world.seed, name, "disk"), world.seen, lambda: world.now)
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
        self._work_luck = Stream(world.seed, name, "work")
        self.clock = HostClock(Stream(world.seed, name, "clock"))
        self._busy_until = 0.0
        self._waiting: list[Persist] = []
        self._full_since: float | None = None
        self._gave_notice = False

    # --- life ------------------------------------------------------------------------------------

    def boot(self) -> None:
        """Start the process from what is durable."""
        assert not self.alive and not self.vanished
        self.alive = True
        self.dark = False
        self.world.trace.record(self.world.now, self.name, "boot", str(self.incarnation).encode())
        context = Context(
            name=self.name,
            peer=self.peer,
            keyring=self.keyring,
            records=list(self.disk.records),
            disk=self.disk,
            rng=generator(self.world.seed, self.name, str(self.incarnation)),
            now=self.local_now(),
            wall_s=self.clock.wall_s(self.world.now),
            incarnation=self.incarnation,
            peers=self.world.peers,
        )

        def build() -> None:
            self.node = self.factory(context)

        self.world.guarded(self, build)
        self.settle()

    def kill(self, *, unsynced: bool = True) -> None:
        """Like kill -9: no clean-up, and everything volatile is lost; see ``Disk.crash``."""
        assert self.alive
        if self._settling:
            self.world.observe(self)  # what it was before it died is seen, too
        self.world.trace.record(self.world.now, self.name, "kill")
        self.alive = False
        self.incarnation += 1
        self.node = None
        self._queue.clear()
        self._syncing = False
        self.fetches.clear()
        self.disk.crash(unsynced=unsynced)
        self._waiting.clear()
        self._full_since, self._gave_notice = None, False
        self._tick_at = math.inf
        self._tick_number += 1
        self._wake(self.world.now)
        self.paused_until = self._busy_until = 0.0

    def well(self, now: float) -> None:
        """The world is healed: nothing is slow, full, armed or wrong here any more."""
        self.armed.clear()
        self.slow_disk_until = self.slow_until = 0.0
        self._wake(now)
        self.clock.run_at(now, 1.0)
        self.disk.full_until = 0.0
        if self.alive and self.node is not None:
            self.retime()

    def _wake(self, now: float) -> None:
        """It sleeps no longer; what it would have slept more is no time for its clock either."""
        if self.asleep_until > now:
            self.clock.jump(self.asleep_until - now)
        self.asleep_until = 0.0

    @property
    def held_until(self) -> float:
        """Until when everything that happens to this machine waits."""
        return max(self.paused_until, self._busy_until)

    def worked(self) -> None:
        """An event was handled; on a slow machine the next one waits its turn."""
        if self.slow_until > self.world.now:
            self._busy_until = self.world.now + self._work_luck.between(*SLOW_EVENT_S)

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
        return self.clock.local_s(self.world.now)

    def retime(self) -> None:
        """Something happened to the clock: timers go by what it shows from now on."""
        self._tick_at = math.inf
        if self.alive:
            self._set_timer()

    def tell_wall(self) -> None:
        """The wall clock was set; nodes that care look at it now and then."""
        told = getattr(self.node, "wall_set", None)
        if told is not None:
            self.world.guarded(self, told, self.local_now(), self.clock.wall_s(self.world.now))
            self.settle()

    def tell_wall_of(self, other: Host) -> None:
        """The hello of a new link tells the other machine's wall clock."""
        told = getattr(self.node, "wall_told", None)
        if told is not None:
            wall_s = other.clock.wall_s(self.world.now)
            self.world.guarded(self, told, self.local_now(), other.peer, wall_s)

    # --- calls into the node ---------------------------------------------------------------------

    def call(self, method: str, *args: object) -> None:
        """Call ``node.method(now, *args)`` and carry out what it asks for."""
        self.world.guarded(self, getattr(self.node, method), self.local_now(), *args)
        self.settle()

    def receive(self, sender: PeerId, message: Message) -> None:
        self.call("receive", sender, message)

    def answered(self, peer: PeerId, rtt_s: float) -> None:
        """A question of this node's was answered; most answers change nothing."""
        found: list[bool] = []
        now = self.local_now()
        self.world.guarded(self, lambda: found.append(self.node.answered(now, peer, rtt_s)))
        if any(found):
            self.settle()

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
        for effect in self.world.guarded(self, self.node.drain):
            if isinstance(effect, Probe):
                self.world.network.probe(self, effect.peer)  # it waits for no disk
            else:
                self._queue.append(effect)

    def _next_effect(self) -> None:
        effect = self._queue.popleft()
        if isinstance(effect, Persist):
            batch = [effect]
            while self._queue and isinstance(self._queue[0], Persist):
                following = self._queue.popleft()
                assert isinstance(following, Persist)
                batch.append(following)
            self._persist(batch)
            self._done("persist", *batch)
            return
        self._done(self.world.execute(self, effect), effect)

    def _done(self, label: str, *effects: Effect) -> None:
        """Effects were carried out: is a fault aimed at that?"""
        self.hit(label)
        if self.world.trouble.aims:
            for effect in effects:
                for name in labels_of(effect):
                    if self.alive:
                        self.world.trouble.hit(self, name)

    # --- the record file, as ``swarmtrain_peer.journal`` treats it -------------------------------

    def _persist(self, batch: list[Persist]) -> None:
        self._waiting += batch
        if self._full_since is None:
            self._write()
        else:
            self._look_who_waits()

    def _write(self) -> None:
        """Begin to write what waits; without space, try again later."""
        if self.disk.full:
            self.world.seen["disk:full"] += 1
            self._full_since = self._full_since or self.world.now
            self.world.after(limits.DISK_FULL_RETRY_S, self, self._write)
            self._look_who_waits()
            return
        self._full_since = None
        self._syncing = True
        self.disk.append(self._waiting)
        self._waiting = []
        self.world.after(self._sync_delay_s(), self, self._synced)

    def _look_who_waits(self) -> None:
        """What others rely on holds back all that follows; the rest is written later."""
        assert self._full_since is not None
        was_blocked = self._syncing
        self._syncing = any(item.relied for item in self._waiting)
        self.world.seen["disk:full-relied"] += self._syncing
        if self._syncing and self.world.now - self._full_since >= limits.DISK_FULL_PATIENCE_S:
            if not self._gave_notice:
                self._gave_notice = True
                self.world.seen["disk:gave-notice"] += 1
                self.world.network.close_all(self)
        elif was_blocked and not self._syncing:
            self.settle()

    def _sync_delay_s(self) -> float:
        model = self.world.model
        if self.slow_disk_until > self.world.now:
            return self._sync_luck.between(0.0, SLOW_SYNC_S)
        return self._sync_luck.between(*model.sync_s)

    def _synced(self) -> None:
        self.disk.sync()
        self._syncing = self._gave_notice = False
        self.world.trace.record(self.world.now, self.name, "synced")
        self._done("synced", "synced")
        if self.alive:
            self.settle()

    def hit(self, label: str) -> None:
        """Fire a fault that is aimed at what this host has just done."""
        for item in self.armed:
            if item.b == label:
                self.armed.remove(item)
                self.world.fire(item)
                break
        if self.world.trouble.aims and self.alive:
            self.world.trouble.hit(self, label)

    # --- timer -----------------------------------------------------------------------------------

    def _set_timer(self) -> None:
        wanted = self.clock.world_s(self.node.deadline())
        if wanted >= self._tick_at or self._gave_notice:
            return  # a site whose disk is full and whom others wait for stands still
        self._tick_at = max(wanted, self.world.now)
        self._tick_number += 1
        self.world.at(self._tick_at, self, self._timer, self._tick_number)

    def _timer(self, number: int) -> None:
        if number != self._tick_number:
            return
        self._tick_at = math.inf
        deadline = self.node.deadline()
        if self.clock.world_s(deadline) > self.world.now + 1e-9 or self._gave_notice:
            self._set_timer()
            return
        self.local_now()
        self.clock.reach(deadline)
        self._count_spins()
        self.world.trace.record(self.world.now, self.name, "tick")
        self.call("tick")

    def _count_spins(self) -> None:
        if self.world.now - self._spin_at > 1e-3:
            self._spin_at, self._spins = self.world.now, 0
        self._spins += 1
        if self._spins > SPINS_MAX:
            self.world.violation("spin", f"{self.name}: deadline() stays in the past after tick()")
