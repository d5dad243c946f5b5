"""Bookkeeping of fetches: numbers, deadlines, and one answer for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import CancelFetch, Effect, Fetch, PeerId

FETCH_BASE_TIMEOUT_S = 20.0
FETCH_RATE_FLOOR_BYTES_PER_S = 256 * 1024
WAITED_S = 0.4
"""A fetch that takes longer is one that is waited for."""
SILENT_TIMEOUT_S = 1.0
"""Of a fetch from somebody who seems to be frozen, when nobody else is known to have the bytes."""

Done = Callable[[float, str | None], None]
"""Called once with (now, None) on success or (now, reason)."""


@dataclass(slots=True)
class _Job:
    peer: PeerId
    done: Done
    deadline: float
    asked_at: float = -math.inf
    impatient: bool = False


class Fetches:
    """All fetches in flight of one node; callbacks run inside the node's calls, in order."""

    def __init__(self, out: list[Effect]) -> None:
        self._out = out
        self._jobs: dict[int, _Job] = {}
        self._next = 1
        self._impatient = 0
        self.suspected: Container[PeerId] = ()
        """Peers that seem to be frozen at the moment."""

    def start(
        self,
        now: float,
        peer: PeerId,
        root: bytes,
        first: int,
        count: int,
        purpose: object,
        done: Done,
        timeout_s: float | None = None,
        impatient: bool = False,
    ) -> int:
        """Ask ``peer`` for ``count`` chunks; ``done`` gets exactly one answer, by a deadline.

        ``timeout_s`` None: as long as the largest chunks may take on a slow link. ``impatient``:
        others have the same bytes, so it ends when ``peer`` is suspected of being frozen.
        """
        assert 0 < count <= limits.CHUNKS_PER_FETCH_MAX
        ticket = self._next
        self._next += 1
        if timeout_s is None:
            nbytes = count * limits.CHUNK_VALUES * 8
            timeout_s = FETCH_BASE_TIMEOUT_S + nbytes / FETCH_RATE_FLOOR_BYTES_PER_S
        if impatient and peer in self.suspected:
            timeout_s = SILENT_TIMEOUT_S
        self._jobs[ticket] = _Job(peer, done, now + timeout_s, now, impatient)
        self._impatient += impatient
        self._out.append(Fetch(ticket, peer, root, first, count, purpose))
        return ticket

    def cancel(self, ticket: int) -> None:
        if self._pop(ticket) is not None:
            self._out.append(CancelFetch(ticket))

    def finished(self, now: float, ticket: int, reason: str | None) -> None:
        """The shell's answer; late answers to cancelled fetches are ignored."""
        job = self._pop(ticket)
        if job is not None:
            job.done(now, reason)

    def disconnected(self, now: float, peer: PeerId) -> None:
        """Answer every fetch from a peer whose link broke."""
        for ticket in [t for t, job in self._jobs.items() if job.peer == peer]:
            self._expire(now, ticket, "disconnected")

    @property
    def waits(self) -> bool:
        """There is an impatient fetch."""
        return self._impatient > 0

    def waited(self, now: float) -> list[PeerId]:
        """Those whose bytes are waited for, for a while now."""
        old = now - WAITED_S
        return [job.peer for job in self._jobs.values() if job.impatient and job.asked_at <= old]

    def silent(self, now: float, peer: PeerId) -> None:
        """Answer every impatient fetch from a peer that seems to be frozen."""
        for ticket in [t for t, j in self._jobs.items() if j.peer == peer and j.impatient]:
            self._expire(now, ticket, "silent")

    def tick(self, now: float) -> None:
        for ticket in [t for t, job in self._jobs.items() if job.deadline <= now]:
            self._expire(now, ticket, "timeout")

    def deadline(self) -> float:
        if not self._jobs:
            return math.inf
        return min(job.deadline for job in self._jobs.values())

    def _pop(self, ticket: int) -> _Job | None:
        job = self._jobs.pop(ticket, None)
        if job is not None:
            self._impatient -= job.impatient
        return job

    def _expire(self, now: float, ticket: int, reason: str) -> None:
        job = self._pop(ticket)
        if job is None:  # an earlier callback in the same loop cancelled it
            return
        self._out.append(CancelFetch(ticket))
        job.done(now, reason)
