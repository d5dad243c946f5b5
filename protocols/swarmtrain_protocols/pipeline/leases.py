"""Who works at which micro-batch of a step: pacing for the leader, never correctness (spec 11).

A lease lives for ``ttl_s`` and is renewed by every request of its driver; while it lives, nobody
else gets the micro-batch. What a driver has finished is still its own: it keeps the tensors, and
can send any hop again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.pipeline.claims import Settlement


@dataclass(slots=True)
class _Lease:
    driver: PeerId | None = None
    until: float = -math.inf
    done: bool = False
    loss: float = math.nan
    redo: list[int] = field(default_factory=list)
    """Hops that its driver has been asked to send again."""


@dataclass(slots=True)
class Grant:
    """What one driver gets now."""

    micro_batches: list[int] = field(default_factory=list)
    redo: list[tuple[int, int]] = field(default_factory=list)
    """(hop, micro-batch)."""


class Vacancy:
    """How long nobody has led who could lease: what a new leader knows of leases it did not give.

    Drivers tell a new leader what they work at. The leases of those that cannot tell it have run
    out one ``ttl_s`` after the last moment at which the old leader was seen.
    """

    def __init__(self) -> None:
        self._leader: PeerId | None = None
        self._since: float | None = None

    def leader_changed(self, now: float, other: PeerId | None) -> None:
        """``other`` leads now; None: nobody, or this node."""
        self._leader = other
        if other is None:
            self._begins(now)
        else:
            self._since = None

    def connected(self, peer: PeerId) -> None:
        if peer == self._leader:
            self._since = None

    def disconnected(self, now: float, peer: PeerId) -> None:
        """The link to the leader broke: it may be dead since now."""
        if peer == self._leader:
            self._begins(now)

    def _begins(self, now: float) -> None:
        self._since = now if self._since is None else self._since

    def over_at(self, now: float, ttl_s: float) -> float:
        """When this node, leader as of ``now``, may deal; drivers ask every third of ``ttl_s``."""
        since = now if self._since is None else self._since
        return max(now + ttl_s / 3, since + ttl_s)


class Leases:
    """The micro-batches of one step.

    Args:
        from_s: nothing is leased before this time: leases of another leader may be alive.
    """

    def __init__(self, micro_batches: int, ttl_s: float, from_s: float) -> None:
        self.ttl_s = ttl_s
        self._from = from_s
        self._all = [_Lease() for _ in range(micro_batches)]
        self._room: dict[PeerId, int] = {}
        self._cut: dict[PeerId, None] = {}
        """Drivers whose link broke and that have not asked since."""

    # -- what drivers say ------------------------------------------------------------------

    def asked(self, now: float, driver: PeerId, room: int, working: Sequence[int]) -> None:
        """Renews what ``driver`` works at, and adopts what it began under another leader.

        What was leased to it and is not in ``working`` is on its way there, and takes of its room;
        after its link broke it never arrived, or died with the driver's process: it is free.
        """
        mine = dict.fromkeys(n for n in working if n < len(self._all))
        if driver in self._cut:
            del self._cut[driver]
            for number, lease in enumerate(self._all):
                if lease.driver == driver and not lease.done and number not in mine:
                    lease.driver, lease.until = None, -math.inf
        for number in mine:
            lease = self._all[number]
            if not lease.done and (lease.driver is None or lease.until <= now):
                lease.driver, lease.until = driver, now + self.ttl_s
        under_way = 0
        for number, lease in enumerate(self._all):
            if lease.driver != driver or lease.until <= now:
                continue
            if lease.redo or (number in mine and not lease.done):
                lease.until = now + self.ttl_s
            elif not lease.done:
                under_way += 1
        self._room[driver] = room - under_way

    def finished(self, driver: PeerId, number: int, loss: float) -> None:
        """All hops of a micro-batch were answered, or those that were to be done again."""
        lease = self._all[number]
        if lease.done and lease.driver is not None and lease.driver != driver and not lease.redo:
            return  # two have done it: the first one keeps it
        lease.driver, lease.done, lease.loss = driver, True, loss
        lease.redo.clear()

    def abandoned(self, driver: PeerId, number: int) -> None:
        """The driver does not work at it, or does not keep it any more."""
        lease = self._all[number]
        if lease.driver == driver:
            lease.driver, lease.until = None, -math.inf
            if lease.redo:
                lease.done = False
                lease.redo.clear()

    def gone(self, driver: PeerId) -> None:
        """Its link is down: it gets nothing more; what it has lives on until it expires or asks."""
        self._room.pop(driver, None)
        self._cut[driver] = None

    # -- what workers say ------------------------------------------------------------------

    def settle(self, now: float, settled: Settlement, linked: Sequence[PeerId]) -> None:
        """Workers were asked: only what they have is done.

        What is missing of a finished micro-batch is for its driver to send again; if that is
        gone, the micro-batch is free. Work in progress goes on.
        """
        for number in settled.micro_batches:
            self._all[number].done = True
            self._all[number].redo.clear()
        for number, hops in settled.missing.items():
            lease = self._all[number]
            if not lease.done:
                continue
            if lease.driver is not None and lease.driver in linked:
                lease.redo = list(hops)
                lease.until = now + self.ttl_s
            else:
                lease.driver, lease.until, lease.done = None, -math.inf, False
                lease.redo.clear()

    # -- what the leader wants to know -----------------------------------------------------

    def done(self) -> int:
        """Micro-batches that are finished as far as is known."""
        return sum(lease.done and not lease.redo for lease in self._all)

    def losses(self, numbers: Sequence[int]) -> list[float]:
        """Those that drivers have reported, in order of the micro-batches."""
        found = [self._all[number].loss for number in numbers]
        return [loss for loss in found if math.isfinite(loss)]

    def deal(self, now: float, linked: Sequence[PeerId]) -> dict[PeerId, Grant]:
        """Lease what is free to linked drivers with room, one each in turn."""
        for lease in self._all:
            if lease.redo and (lease.until <= now or lease.driver not in linked):
                lease.driver, lease.done = None, False
                lease.redo.clear()
        grants: dict[PeerId, Grant] = {}
        free = [
            number
            for number, lease in enumerate(self._all)
            if not lease.done and (lease.driver is None or lease.until <= now)
        ]
        free.reverse()
        while now >= self._from and free:
            able = [d for d, room in self._room.items() if room > 0 and d in linked]
            if not able:
                break
            for driver in able[: len(free)]:
                number = free.pop()
                lease = self._all[number]
                lease.driver, lease.until = driver, now + self.ttl_s
                self._room[driver] -= 1
                grants.setdefault(driver, Grant()).micro_batches.append(number)
        return grants

    def redo_of(self, driver: PeerId) -> list[tuple[int, int]]:
        """What ``driver`` is to send again: (hop, micro-batch), as much as fits in a message."""
        pairs = [
            (hop, number)
            for number, lease in enumerate(self._all)
            if lease.driver == driver
            for hop in lease.redo
        ]
        return pairs[: limits.REDO_MAX]

    def redoers(self) -> list[PeerId]:
        """Drivers that have something to send again, in order of their micro-batches."""
        found = [lease.driver for lease in self._all if lease.redo and lease.driver is not None]
        return list(dict.fromkeys(found))

    def deadline(self, now: float) -> float:
        """When something becomes free; ``math.inf``: nothing is waited for."""
        alive = [lease.until for lease in self._all if not lease.done or lease.redo]
        times = [max(until, self._from) for until in alive]
        return min((t for t in times if t > now), default=math.inf)
