"""Fetches states of channels that this node does not serve: for a rebuild, or to keep for others.

One query to whoever may have snapshots, a moment for their answers, then the newest one that the
log pins, from all who offer it in turn. Every chunk is checked against the root by the shell.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from swarmtrain_protocols import limits
from swarmtrain_protocols.channels import ChannelState
from swarmtrain_protocols.core import Effect, Emit, PeerId, Send
from swarmtrain_protocols.ledger import ZERO_HASH, Ledger
from swarmtrain_protocols.messages.member import SnapshotOffer, SnapshotQuery
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.fetches import Fetches

ANSWERS_S = 2.0
"""What has been offered by then is chosen from."""
RANGE_CHUNKS = 16
RANGES_IN_FLIGHT = 2
ASKED_MAX = 16

Done = Callable[[float, "fx.Snapshot | None"], None]
"""Called once: the snapshot whose chunks are all in place, or None if none could be had."""


@dataclass(slots=True)
class _Job:
    channel: str
    use: str
    after: int
    done: Done
    expires: float
    choose_at: float
    asked: dict[PeerId, None]
    offers: dict[tuple[int, bytes], list[PeerId]] = field(default_factory=dict)
    chosen: fx.Snapshot | None = None
    todo: list[tuple[int, int]] = field(default_factory=list)
    flying: dict[int, tuple[int, int]] = field(default_factory=dict)


class Collector:
    """All such fetches of one node; at most one per channel and use."""

    def __init__(
        self,
        *,
        me: PeerId,
        ledger: Ledger,
        fetches: Fetches,
        out: list[Effect],
        chunk_values: int = limits.CHUNK_VALUES,
    ) -> None:
        self.ledger = ledger
        self._me = me
        self._fetches = fetches
        self._out = out
        self._chunk_values = chunk_values
        self._jobs: dict[tuple[str, str], _Job] = {}

    def busy(self, channel: str, use: str) -> bool:
        return (channel, use) in self._jobs

    def start(
        self,
        now: float,
        channel: str,
        use: str,
        ask: list[PeerId],
        done: Done,
        *,
        timeout_s: float,
        after: int = -1,
    ) -> None:
        """Get a pinned state of ``channel`` of a round above ``after`` from one of ``ask``.

        Another one for the same channel and ``use`` (``fx.Snapshot.foreign``) must be over or
        cancelled.
        """
        assert use and (channel, use) not in self._jobs, (channel, use)
        asked = dict.fromkeys(peer for peer in ask[:ASKED_MAX] if peer != self._me)
        job = _Job(channel, use, after, done, now + timeout_s, now + ANSWERS_S, asked)
        self._jobs[channel, use] = job
        for peer in asked:
            self._out.append(Send(peer, SnapshotQuery(channel)))
        if not asked:
            self._end(now, job, None)

    def cancel(self, channel: str, use: str) -> None:
        """Forget it; ``done`` is not called."""
        job = self._jobs.pop((channel, use), None)
        for ticket in list(job.flying) if job is not None else ():
            self._fetches.cancel(ticket)

    def offered(self, now: float, peer: PeerId, offer: SnapshotOffer) -> None:
        """A peer's answer; offers of those who were not asked are ignored."""
        channel = self.ledger.channels.get(offer.channel)
        for job in list(self._jobs.values()):
            if channel is not None and job.channel == channel.name and peer in job.asked:
                self._heard(now, job, channel, peer, offer)

    def _heard(
        self, now: float, job: _Job, channel: ChannelState, peer: PeerId, offer: SnapshotOffer
    ) -> None:
        del job.asked[peer]
        for number, root in zip(offer.rounds, offer.roots, strict=False):
            pinned = root != ZERO_HASH and channel.pinned_hash(number) == root
            if pinned and number > job.after:
                job.offers.setdefault((number, root), []).append(peer)
        if not job.asked:
            job.choose_at = min(job.choose_at, now)
            self._step(now, job)

    def tick(self, now: float) -> None:
        for job in list(self._jobs.values()):
            if self._is_on(job):
                self._step(now, job)

    def deadline(self) -> float:
        times = [
            job.choose_at if job.chosen is None else job.expires for job in self._jobs.values()
        ]
        return min(times, default=math.inf)

    # -- inside ----------------------------------------------------------------------------

    def _is_on(self, job: _Job) -> bool:
        return self._jobs.get((job.channel, job.use)) is job

    def _step(self, now: float, job: _Job) -> None:
        if now >= job.expires:
            self._end(now, job, None)
        elif job.chosen is None and now >= job.choose_at:
            self._choose(now, job)

    def _choose(self, now: float, job: _Job) -> None:
        channel = self.ledger.channels.get(job.channel)
        if not job.offers or channel is None:
            self._end(now, job, None)
            return
        number, root = max(job.offers)
        job.chosen = fx.Snapshot(job.channel, number, root, channel.values, job.use)
        total = 1 + -(-channel.values // self._chunk_values)
        job.todo = [
            (first, min(RANGE_CHUNKS, total - first)) for first in range(0, total, RANGE_CHUNKS)
        ]
        job.todo.reverse()
        self._pump(now, job)

    def _donors(self, job: _Job) -> list[PeerId]:
        assert job.chosen is not None
        return job.offers[job.chosen.round, job.chosen.root]

    def _pump(self, now: float, job: _Job) -> None:
        donors = self._donors(job)
        while job.todo and donors and len(job.flying) < RANGES_IN_FLIGHT:
            self._fetch(now, job, donors[0], job.todo.pop())
        if job.flying:
            return
        if not job.todo:
            self._end(now, job, job.chosen)
        else:  # nobody is left who has the rest of this one: try the next older one
            assert job.chosen is not None
            del job.offers[job.chosen.round, job.chosen.root]
            job.chosen = None
            self._choose(now, job)

    def _fetch(self, now: float, job: _Job, donor: PeerId, piece: tuple[int, int]) -> None:
        assert job.chosen is not None

        def done(at: float, reason: str | None) -> None:
            self._fetched(at, job, donor, ticket, reason)

        root = job.chosen.root
        ticket = self._fetches.start(now, donor, root, piece[0], piece[1], job.chosen, done)
        job.flying[ticket] = piece

    def _fetched(
        self, now: float, job: _Job, donor: PeerId, ticket: int, reason: str | None
    ) -> None:
        piece = job.flying.pop(ticket)
        if not self._is_on(job):
            return
        if reason is not None:
            if reason == "corrupt":
                fields: dict[str, object] = {"peer": donor.hex(), "fault": "corrupt_chunk"}
                self._out.append(Emit(fx.Notice("peer_fault", fields)))
            job.todo.append(piece)
            donors = self._donors(job)
            if donor in donors:
                donors.remove(donor)
        self._pump(now, job)

    def _end(self, now: float, job: _Job, found: fx.Snapshot | None) -> None:
        self.cancel(job.channel, job.use)
        job.done(now, found)
