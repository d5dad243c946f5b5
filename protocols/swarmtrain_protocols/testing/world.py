"""The world: one clock, one heap of events, hosts that run cores, and trouble from a schedule.

One seed decides everything: ``World(seed)`` with the same factories and the same schedule gives the
same trace, whatever the machine or PYTHONHASHSEED. Events are ordered by (time, sequence number).
"""

from __future__ import annotations

import heapq
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from swarmtrain_protocols import core, messages
from swarmtrain_protocols.core import Effect, PeerId
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.testing import transfers
from swarmtrain_protocols.testing.faults import Fault
from swarmtrain_protocols.testing.host import Context, Factory, Host, Node
from swarmtrain_protocols.testing.network import Network, NetworkModel, Packet
from swarmtrain_protocols.testing.trace import Trace
from swarmtrain_protocols.testing.trouble import Trouble

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.checks.base import Checker

EVENTS_MAX = 5_000_000


class Violation(Exception):
    """A promise was broken. ``kind`` is the class that shrinking keeps fixed."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class World:
    """Drives hosts in virtual time.

    Args:
        seed: decides all luck.
        model: the weather of the network; by default that of the seed.
        strict_addresses: a host can only dial whom it has learnt an address of
            (``network.address_of``), by ``Learn``, ``Connect`` or the greeting of a link.
    """

    def __init__(
        self,
        seed: int,
        *,
        model: NetworkModel | None = None,
        strict_addresses: bool = False,
    ) -> None:
        self.seed = seed
        self.model = model if model is not None else NetworkModel.seeded(seed)
        self.now = 0.0
        self.trace = Trace()
        self.seen: Counter[str] = Counter()
        self.bytes_moved: Counter[str] = Counter()
        self.hosts: dict[str, Host] = {}
        self.by_peer: dict[bytes, Host] = {}
        self.peers: dict[str, PeerId] = {}
        self.checkers: list[Checker] = []
        self.network = Network(self, strict_addresses)
        self.transfers = transfers.Transfers(self)
        self.trouble = Trouble(self)
        self.healed = False
        self.events_max = EVENTS_MAX
        self._heap: list[tuple[float, int, Host | None, int, Callable[..., None], Any]] = []
        self._sequence = 0
        self._sent: tuple[Any, str, str, bytes, Any] = (None, "", "", b"", None)
        """The message sent last: itself, its tag, its label, its bytes and what they decode as."""

    # --- building --------------------------------------------------------------------------------

    def add(self, name: str, factory: Factory, *, start_s: float = 0.0) -> Host:
        """Add a host that boots at ``start_s``; ``factory`` builds its node at each start."""
        assert name not in self.hosts and "," not in name
        host = Host(self, name, factory)
        self.hosts[name] = host
        self.by_peer[host.peer] = host
        self.peers[name] = host.peer
        self.at(start_s, None, self._boot, host)
        return host

    def watch(self, *checkers: Checker) -> None:
        """Add checkers; they are called at every event."""
        self.checkers += checkers

    def plan(self, schedule: Iterable[Fault]) -> None:
        """Let the faults of a schedule happen at their times."""
        for item in sorted(schedule):
            self.at(item.at_s, None, self.trouble.begin, item)

    # --- time ------------------------------------------------------------------------------------

    def at(self, time_s: float, host: Host | None, call: Callable[..., None], *args: Any) -> None:
        """Run ``call`` at a time; with a host, only if that incarnation lives and is not paused."""
        self._sequence += 1
        incarnation = host.incarnation if host is not None else 0
        time_s = max(time_s, self.now)
        heapq.heappush(self._heap, (time_s, self._sequence, host, incarnation, call, args))

    def after(
        self, delay_s: float, host: Host | None, call: Callable[..., None], *args: Any
    ) -> None:
        """Run ``call`` after a delay; see ``at``."""
        self.at(self.now + delay_s, host, call, *args)

    def run(self, until_s: float, stop: Callable[[], bool] | None = None) -> bool:
        """Let time pass until ``until_s``, or until ``stop()`` is true; True if it was.

        Raises:
            Violation: a checker, an exception in a node, a spinning timer.
        """
        while self._heap and self._heap[0][0] <= until_s:
            time_s, _, host, incarnation, call, args = heapq.heappop(self._heap)
            self.now = time_s
            if host is not None:
                if host.incarnation != incarnation or not host.alive:
                    continue
                if host.held_until > time_s:
                    self.at(host.held_until, host, call, *args)
                    continue
            if self.trace.events > self.events_max:
                self.violation("events", f"more than {self.events_max} events")
            call(*args)
            if host is not None:
                host.worked()
                if self.trouble.aims:
                    self.trouble.hit(host, "event")
            if stop is not None and stop():
                return True
        self.now = max(self.now, until_s)
        return stop is not None and stop()

    # --- trouble ---------------------------------------------------------------------------------

    def violation(self, kind: str, text: str) -> None:
        """Stop the run here.

        Raises:
            Violation: always.
        """
        raise Violation(kind, f"t={self.now:.4f} {text}")

    def guarded(self, host: Host, call: Callable[..., Any], *args: Any) -> Any:
        """Call into a node; any exception there is a violation, never a log line."""
        try:
            return call(*args)
        except Violation:
            raise
        except Exception as error:
            text = "".join(traceback.format_exception(error)[-6:])
            raise Violation(
                f"exception {type(error).__name__}", f"t={self.now:.4f} in {host.name}:\n{text}"
            ) from error

    def crash(
        self, name: str, *, restart_s: float | None, silent: bool = False, unsynced: bool = True
    ) -> None:
        """Kill a process; it starts again from its disk after ``restart_s`` (None: never).

        Args:
            silent: the machine is off, and nobody is told.
            unsynced: what was not synced may have reached the disk, as the seed says.
        """
        host = self.hosts[name]
        if not host.alive:
            return
        host.kill(unsynced=unsynced)
        host.vanished = restart_s is None
        host.dark = silent
        self.network.died(host, silent=silent)
        for checker in self.checkers:
            checker.crashed(self, host)
        if restart_s is not None:
            self.after(restart_s, None, self._boot, host)

    def heal(self) -> None:
        """End all trouble: links, weather, stopped and crashed processes (not the vanished)."""
        self.healed = True
        self.trouble.aims.clear()
        self.network.heal()
        self.model = self.model.healed()
        for host in self.hosts.values():
            host.well(self.now)
            resume_s, host.paused_until = host.paused_until, min(host.paused_until, self.now)
            if resume_s > self.now:
                self._hasten(host, resume_s)
            if not host.alive and not host.vanished and host.incarnation > 0:
                self._boot(host)

    def _hasten(self, host: Host, resume_s: float) -> None:
        """What a stopped process would have seen at ``resume_s`` it sees now, in the same order."""
        self._heap = [
            (self.now if item[2] is host and item[0] == resume_s else item[0], *item[1:])
            for item in self._heap
        ]
        heapq.heapify(self._heap)

    def fire(self, item: Fault) -> None:
        """An aimed fault has met its moment."""
        self.trouble.fire(item, self.hosts[item.a])

    def _boot(self, host: Host) -> None:
        if not host.alive and not host.vanished:
            host.boot()
            for checker in self.checkers:
                checker.booted(self, host)

    # --- effects ---------------------------------------------------------------------------------

    def execute(self, host: Host, effect: Effect) -> str:
        """Carry out one effect of a host's node; the label that aimed faults wait for."""
        if isinstance(effect, core.Send):
            return self._send(host, effect.peer, effect.message)
        if isinstance(effect, core.Emit):
            self.guarded(host, host.node.emitted, host.local_now(), effect.event)
            for checker in self.checkers:
                checker.emitted(self, host, effect.event)
            return "emit:" + type(effect.event).__name__
        if isinstance(effect, core.Fetch):
            self.transfers.start(host, effect)
            return "fetch"
        if isinstance(effect, core.CancelFetch):
            self.transfers.cancel(host, effect.ticket)
            return "cancel"
        if isinstance(effect, core.Learn):
            self.network.learn(host, effect.peer, effect.addresses)
            return "learn"
        if isinstance(effect, core.Connect | core.Disconnect):
            return self._link(host, effect)
        found = self.guarded(host, host.node.execute, host.local_now(), effect)
        for delay_s, call in found or ():
            self.after(delay_s, host, self._complete, host, call)
        return "do:" + type(effect).__name__

    def _link(self, host: Host, effect: core.Connect | core.Disconnect) -> str:
        other = self.by_peer.get(effect.peer)
        if isinstance(effect, core.Connect):
            self.network.learn(host, effect.peer, effect.addresses)
            if other is not None and other is not host:
                self.network.dial(host, other)
            return "connect"
        if other is not None and other is not host:
            self.network.close(host, other)
        return "disconnect"

    def _complete(self, host: Host, call: Callable[[float], None]) -> None:
        self.trace.record(self.now, host.name, "complete")
        self.guarded(host, call, host.local_now())
        host.settle()

    def _send(self, host: Host, peer: PeerId, message: Message) -> str:
        if message is not self._sent[0]:
            tag, data = str(message.__struct_config__.tag), messages.encode(message)
            decoded = messages.decode(data)
            if decoded != message:
                self.violation("codec", f"{host.name}: {message} decodes as {decoded}")
            self._sent = (message, tag, "send:" + tag, data, decoded)
        _, tag, label, data, decoded = self._sent  # one object for many receivers is encoded once
        self.seen[label] += 1
        other = self.by_peer.get(peer)
        if other is None:
            self.seen["drop:unknown-peer"] += 1
        elif other is host:
            self.violation("self-send", f"{host.name} sends {tag} to itself")
        else:

            def arrive(target: Host) -> None:
                self.trace.record(self.now, target.name, "receive " + host.name, data)
                target.receive(host.peer, decoded)
                if self.trouble.aims:
                    self.trouble.hit(target, "receive:" + tag)

            self.network.send(host, other, Packet("message", data, arrive))
        return label

    def observe(self, host: Host) -> None:
        """Called after every call into a node: the always-checkers look at the world."""
        for checker in self.checkers:
            checker.always(self, host)


__all__ = [
    "Context",
    "Factory",
    "Host",
    "NetworkModel",
    "Node",
    "Violation",
    "World",
]
