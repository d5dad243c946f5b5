"""Which replica of a stage gets a hop: the one that is expected to be done first. Spec 11.

Every driver measures for itself, from what it sees: seconds per micro-batch of each kind of hop at
each worker. A request that waits behind others of the same driver is not counted twice: its time
runs from the worker's previous answer (as SWARM's does, arXiv 2301.11913). A timeout is an
observation of the time that has passed, so that a worker that hangs loses its good name; SWARM's
code forgets it.

``policy="uniform"`` is plain round robin over all replicas, kept to be compared with.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId

EMA_ALPHA = 0.2
BAN_S = 5.0
BANS_DOUBLED_MAX = 6
TIMEOUT_S_MIN = 1.0
TIMEOUT_FACTOR = 4.0
UNKNOWN_FACTOR = 16.0
"""A kind of hop that was never measured gets so many times the slowest of the others."""
TIMEOUT_MEDIANS = 8.0
"""Requests that got lost are among the latest seconds: a few of them make no timeout long."""
HEDGE_FACTOR = 2.0
OBSERVATIONS_KEPT = 64
OBSERVATIONS_FOR_HEDGE = 8
MANY_REPLICAS = 16

Policy = Literal["least-finish", "uniform"]
Kind = tuple[int, bool]
"""(hop, backward): what is measured apart, because it costs apart."""


@dataclass(slots=True)
class _Issue:
    peer: PeerId
    kind: Kind
    sent: float


@dataclass(slots=True)
class _Worker:
    """What is known of one worker. ``seconds`` by kind of hop."""

    seconds: dict[Kind, float] = field(default_factory=dict)
    issues: dict[int, _Issue] = field(default_factory=dict)
    answered: float = 0.0
    failures: int = 0
    banned_until: float = 0.0


class Router:
    """Chooses workers, measures them, and says how long to wait for them.

    Tickets are the caller's numbers of requests; each goes in with ``sent`` and out with one of
    ``replied``, ``timed_out``, ``failed`` and ``dropped``.
    """

    def __init__(self, rng: random.Random, policy: Policy = "least-finish") -> None:
        self._rng = rng
        self._policy = policy
        self._workers: dict[PeerId, _Worker] = {}
        self._issues: dict[int, _Issue] = {}
        self._elapsed: dict[Kind, deque[float]] = {}
        self._turns: dict[Kind, int] = {}

    # -- choosing --------------------------------------------------------------------------

    def choose(
        self, now: float, kind: Kind, workers: Sequence[PeerId], exclude: Iterable[PeerId] = ()
    ) -> PeerId | None:
        """The worker for one more hop of ``kind``, or None if ``workers`` has none to offer.

        Excluded are those that have this very request already. Bans are ignored if they leave
        nobody; so is the exclusion, for a second request to the same worker is harmless.
        """
        outside = tuple(exclude)
        free = [w for w in workers if w not in outside] or list(workers)
        if self._policy == "uniform":
            return self._next_in_turn(kind, free)
        free = [w for w in free if not self.is_banned(now, w)] or free
        if len(free) > MANY_REPLICAS:
            # Drivers do not see each other's work: the best of all would be everybody's best.
            free = self._rng.sample(free, 2)
        return min(free, key=lambda w: self._score(kind, w, workers), default=None)

    def _next_in_turn(self, kind: Kind, workers: list[PeerId]) -> PeerId | None:
        if not workers:
            return None
        turn = self._turns.get(kind, 0)
        self._turns[kind] = turn + 1
        return sorted(workers)[turn % len(workers)]

    def _score(
        self, kind: Kind, worker: PeerId, others: Sequence[PeerId]
    ) -> tuple[float, int, float]:
        """Expected seconds until done; then fewest requests; then luck."""
        known = self._workers.get(worker)
        waiting = list(known.issues.values()) if known is not None else []
        ahead = sum(self.estimate(issue.kind, worker, others) for issue in waiting)
        finish = ahead + self.estimate(kind, worker, others)
        return finish, len(waiting), self._rng.random()

    def estimate(self, kind: Kind, worker: PeerId, others: Sequence[PeerId] = ()) -> float:
        """Seconds of one hop. A worker not yet measured is taken for as good as the best."""
        known = self._workers.get(worker)
        if known is not None and kind in known.seconds:
            return known.seconds[kind]
        measured = [
            self._workers[w].seconds[kind]
            for w in others
            if w in self._workers and kind in self._workers[w].seconds
        ]
        return min(measured, default=0.0)

    def finish_s(self, kind: Kind, workers: Sequence[PeerId]) -> float:
        """Seconds until one more hop of ``kind`` would be done; 0 if nothing is known."""
        scores = [self._score(kind, w, workers)[0] for w in workers]
        return min(scores, default=0.0)

    def is_banned(self, now: float, worker: PeerId) -> bool:
        known = self._workers.get(worker)
        return known is not None and now < known.banned_until

    def idle(self, now: float, worker: PeerId) -> bool:
        """Nothing of this driver is at the worker, and nothing speaks against it."""
        known = self._workers.get(worker)
        return known is None or (not known.issues and now >= known.banned_until)

    def outstanding(self, worker: PeerId) -> int:
        known = self._workers.get(worker)
        return len(known.issues) if known is not None else 0

    # -- measuring -------------------------------------------------------------------------

    def sent(self, now: float, ticket: int, worker: PeerId, kind: Kind) -> None:
        """A request is on its way."""
        assert ticket not in self._issues, ticket
        issue = self._issues[ticket] = _Issue(worker, kind, now)
        known = self._workers.get(worker)
        if known is None:
            self._make_room()
            known = self._workers[worker] = _Worker()
        known.issues[ticket] = issue

    def replied(self, now: float, ticket: int) -> float:
        """The answer is here; returns the seconds since the request was sent."""
        issue, worker = self._take(ticket)
        worker.failures, worker.banned_until = 0, 0.0
        self._observe(now, issue, worker)
        return now - issue.sent

    def timed_out(self, now: float, ticket: int) -> None:
        """No answer in time: that was slow, whatever it was, and the worker is banned."""
        issue, worker = self._take(ticket)
        self._observe(now, issue, worker)
        self._ban(now, worker)

    def late(self, now: float, worker: PeerId) -> None:
        """An answer to a request that had timed out: slow, but alive."""
        known = self._workers.get(worker)
        if known is not None:
            known.banned_until, known.answered = min(known.banned_until, now), now

    def failed(self, now: float, ticket: int) -> None:
        """The worker, or the link to it, failed; how long that took says nothing of its speed."""
        _, worker = self._take(ticket)
        self._ban(now, worker)

    def dropped(self, ticket: int) -> None:
        """The request does not matter any more, or was refused for good reason."""
        self._take(ticket)

    def avoid(self, now: float, worker: PeerId, seconds: float) -> None:
        """Ask others first for a while."""
        known = self._workers.get(worker)
        if known is not None:
            known.banned_until = max(known.banned_until, now + seconds)

    def pardon(self, worker: PeerId) -> None:
        """What stood against the worker is over: it has a new link, or a new stage."""
        known = self._workers.get(worker)
        if known is not None:
            known.failures, known.banned_until = 0, 0.0

    def _take(self, ticket: int) -> tuple[_Issue, _Worker]:
        issue = self._issues.pop(ticket)
        worker = self._workers[issue.peer]
        del worker.issues[ticket]
        return issue, worker

    def _observe(self, now: float, issue: _Issue, worker: _Worker) -> None:
        seconds = max(0.0, now - max(issue.sent, worker.answered))
        worker.answered = now
        before = worker.seconds.get(issue.kind)
        worker.seconds[issue.kind] = (
            seconds if before is None else before + EMA_ALPHA * (seconds - before)
        )
        kept = self._elapsed.setdefault(issue.kind, deque(maxlen=OBSERVATIONS_KEPT))
        kept.append(now - issue.sent)

    def _ban(self, now: float, worker: _Worker) -> None:
        worker.banned_until = now + BAN_S * 2 ** min(worker.failures, BANS_DOUBLED_MAX)
        worker.failures += 1

    def _make_room(self) -> None:
        """Forget who was measured first among those without work; there is a bound on members."""
        if len(self._workers) >= limits.MEMBERS_MAX:
            quiet = next((w for w, known in self._workers.items() if not known.issues), None)
            if quiet is not None:
                del self._workers[quiet]

    # -- waiting ---------------------------------------------------------------------------

    def p95_s(self, kind: Kind) -> float:
        """95th percentile of the latest seconds between request and answer; 0 if there is none."""
        kept = sorted(self._elapsed.get(kind, ()))
        return kept[min(len(kept) - 1, (95 * len(kept)) // 100)] if kept else 0.0

    def timeout_s(self, kind: Kind) -> float:
        """Seconds after which a request is sent elsewhere."""
        if kind not in self._elapsed:
            slowest = max((self.p95_s(known) for known in self._elapsed), default=math.inf)
            guess = max(TIMEOUT_S_MIN, UNKNOWN_FACTOR * slowest)
            return min(guess, limits.HOP_TIMEOUT_S_FIRST)
        wanted = max(TIMEOUT_S_MIN, TIMEOUT_FACTOR * self.p95_s(kind))
        usual = TIMEOUT_MEDIANS * statistics.median_low(self._elapsed[kind])
        return min(wanted, max(limits.HOP_TIMEOUT_S_FIRST, usual), limits.HOP_TIMEOUT_S_MAX)

    def hedge_s(self, kind: Kind) -> float | None:
        """Seconds after which a second, idle worker is asked as well; None: too little is known."""
        kept = self._elapsed.get(kind)
        if self._policy == "uniform" or kept is None or len(kept) < OBSERVATIONS_FOR_HEDGE:
            return None
        return HEDGE_FACTOR * self.p95_s(kind)

    def rates(self) -> dict[PeerId, dict[Kind, float]]:
        """Measured seconds by worker and kind of hop, for figures."""
        return {w: dict(known.seconds) for w, known in self._workers.items() if known.seconds}
