"""Bookkeeping of fetches: numbers, deadlines, and one answer for each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import CancelFetch, Effect, Fetch, PeerId

FETCH_BASE_TIMEOUT_S = 20.0
FETCH_RATE_FLOOR_BYTES_PER_S = 256 * 1024

Done = Callable[[float, str | None], None]
"""Called once with (now, None) on success or (now, reason)."""


@dataclass(slots=True)
class _Job:
    peer: PeerId
    done: Done
    deadline: float


class Fetches:
    """All fetches in flight of one node; callbacks run inside the node's calls, in order."""

    def __init__(self, out: list[Effect]) -> None:
        self._out = out
        self._jobs: dict[int, _Job] = {}
        self._next = 1

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
    ) -> int:
        """Ask ``peer`` for ``count`` chunks; ``done`` gets exactly one answer, by a deadline.

        ``timeout_s`` None: as long as the largest chunks may take on a slow link.
        """
        assert 0 < count <= limits.CHUNKS_PER_FETCH_MAX
        ticket = self._next
        self._next += 1
        if timeout_s is None:
            nbytes = count * limits.CHUNK_VALUES * 8
            timeout_s = FETCH_BASE_TIMEOUT_S + nbytes / FETCH_RATE_FLOOR_BYTES_PER_S
        self._jobs[ticket] = _Job(peer, done, now + timeout_s)
        self._out.append(Fetch(ticket, peer, root, first, count, purpose))
        return ticket

    def cancel(self, ticket: int) -> None:
        if self._jobs.pop(ticket, None) is not None:
            self._out.append(CancelFetch(ticket))

    def finished(self, now: float, ticket: int, reason: str | None) -> None:
        """The shell's answer; late answers to cancelled fetches are ignored."""
        job = self._jobs.pop(ticket, None)
        if job is not None:
            job.done(now, reason)

    def disconnected(self, now: float, peer: PeerId) -> None:
        """Answer every fetch from a peer whose link broke."""
        for ticket in [t for t, job in self._jobs.items() if job.peer == peer]:
            self._expire(now, ticket, "disconnected")

    def tick(self, now: float) -> None:
        for ticket in [t for t, job in self._jobs.items() if job.deadline <= now]:
            self._expire(now, ticket, "timeout")

    def deadline(self) -> float:
        return min((job.deadline for job in self._jobs.values()), default=math.inf)

    def _expire(self, now: float, ticket: int, reason: str) -> None:
        job = self._jobs.pop(ticket, None)
        if job is None:  # an earlier callback in the same loop cancelled it
            return
        self._out.append(CancelFetch(ticket))
        job.done(now, reason)
