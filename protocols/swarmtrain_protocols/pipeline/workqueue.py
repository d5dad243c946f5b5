"""What waits for a worker's device, and what goes next.

Backward before forward, because it frees memory and closes steps; then the older step, the lower
attempt, and who came first; but an evaluation that has waited for long goes before all of them,
for where drivers never pause nothing else would let it through. Generation shares the device by a
token bucket: it goes before all else while it has not used its share, and waits otherwise, unless
there is nothing else to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.messages.pipeline import HopRequest

_RANK = {"backward": 0, "forward": 1, "evaluate": 2, "generate": 3}
BURST_S = 2.0
"""Seconds of the device that generation may save up."""
EVALUATE_S = 0.5
"""How long an ``evaluate`` lets others go first."""
IDLE_S = 1.0
"""Without other work for so long, generation has the device to itself."""
WAIT_S_MAX = 1.0
"""A ``generate`` that had to wait longer for its share is refused: others may have time."""
TOLD_EVERY_S = 10.0
"""That generation waits is news once in a while."""
COST_ALPHA = 0.2


@dataclass(slots=True, eq=False)
class Job:
    """A request that waits. ``order`` counts arrivals."""

    peer: PeerId
    request: HopRequest
    order: int
    since: float = 0.0

    @property
    def rank(self) -> tuple[int, int, int, int]:
        identity = self.request.id
        return _RANK[self.request.kind], identity.step, identity.attempt, self.order

    def patient(self, now: float) -> bool:
        """It lets others go first."""
        return self.request.kind != "evaluate" or now < self.since + EVALUATE_S


class WorkQueue:
    """At most ``room`` requests, half of it for one peer.

    Args:
        share: of the device's time, for ``generate`` requests.
        tell: hears now and then whose request has to wait for its share, and the share.
    """

    def __init__(
        self,
        share: float,
        room: int,
        tell: Callable[[PeerId, float], None] = lambda peer, share: None,
    ) -> None:
        self._tell = tell
        self._share = share
        self._room = room
        self._jobs: list[Job] = []
        self._orders = 0
        self._saved_s = 0.0
        self._counted = -math.inf
        self._busy_until = -math.inf
        self._cost_s = 0.0
        self._told = -math.inf

    def __len__(self) -> int:
        return len(self._jobs)

    def has(self, peer: PeerId, request: HopRequest) -> bool:
        """The very same request waits already."""
        return any(j.peer == peer and j.request.id == request.id for j in self._jobs)

    def admit(self, now: float, peer: PeerId, request: HopRequest) -> tuple[str, str] | None:
        """Take a request in; else (code, reason) of its refusal.

        A ``generate`` takes the place of what its errand asked for before: nobody waits for that.
        """
        if request.kind == "generate":
            errand = request.id.micro_batch, request.id.hop
            self.remove(
                lambda job: (
                    (job.peer, job.request.kind) == (peer, "generate")
                    and (job.request.id.micro_batch, job.request.id.hop) == errand
                )
            )
            wait_s = self.wait_s(now)
            if wait_s > 0 and now - self._told >= TOLD_EVERY_S:
                self._told = now
                self._tell(peer, self._share)
            if wait_s > WAIT_S_MAX:
                return "share", f"generation has used up its {self._share:g} of the time"
        if not self.add(now, peer, request):
            return "busy", f"{len(self)} requests wait"
        return None

    def add(self, now: float, peer: PeerId, request: HopRequest) -> bool:
        """False: there is no room."""
        mine = sum(job.peer == peer for job in self._jobs)
        if len(self._jobs) >= self._room or mine >= max(1, self._room // 2):
            return False
        self._orders += 1
        self._jobs.append(Job(peer, request, self._orders, now))
        if request.kind != "generate":
            self._busy_until = now + IDLE_S
        return True

    def occupied(self, until: float) -> None:
        """The device has work that does not come through this queue until then."""
        self._busy_until = max(self._busy_until, until)

    def wait_s(self, now: float) -> float:
        """How long a ``generate`` that comes now waits for its share; 0 if the device is idle."""
        self._count(now)
        waiting = sum(job.request.kind == "generate" for job in self._jobs)
        debt_s = waiting * self._cost_s - self._saved_s
        if now >= self._busy_until or debt_s < 0:
            return 0.0
        return debt_s / self._share if self._share else math.inf

    def put_back(self, jobs: list[Job]) -> None:
        """They were taken and have to wait after all; they keep their places."""
        self._jobs += jobs

    def take(self, now: float) -> Job | None:
        """The job that goes next, removed; None: nothing may go now."""
        self._count(now)
        best: Job | None = None
        for job in self._jobs:
            before = best is None or (job.patient(now), job.rank) < (best.patient(now), best.rank)
            if job.request.kind != "generate" and before:
                best = job
        if best is None or self._saved_s > 0:
            waiting = [job for job in self._jobs if job.request.kind == "generate"]
            if waiting and (self._saved_s > 0 or now >= self._busy_until):
                best = min(waiting, key=lambda job: job.rank)
        if best is not None:
            self._jobs.remove(best)
            if best.request.kind != "generate":
                self._busy_until = now + IDLE_S
        return best

    def spent(self, now: float, request: HopRequest, seconds: float) -> None:
        """A job has used the device for so long."""
        self._count(now)
        if request.kind == "generate":
            self._saved_s -= seconds
            self._cost_s += COST_ALPHA * (seconds - self._cost_s) if self._cost_s else seconds
        else:
            self._busy_until = now + IDLE_S

    def remove(self, wanted: Callable[[Job], bool]) -> list[Job]:
        """Take out all jobs for which ``wanted`` holds, in the order in which they came."""
        gone = [job for job in self._jobs if wanted(job)]
        self._jobs = [job for job in self._jobs if job not in gone]
        return gone

    def next_at(self) -> float:
        """When a generate job may go that had to wait at the last ``take``; ``math.inf``: none."""
        if not self._jobs or all(job.request.kind != "generate" for job in self._jobs):
            return math.inf
        if self._saved_s > 0 or not self._share:
            return self._busy_until
        return min(self._busy_until, self._counted + (1e-6 - self._saved_s) / self._share)

    def _count(self, now: float) -> None:
        if self._counted > -math.inf:
            earned = (now - self._counted) * self._share
            self._saved_s = min(BURST_S * self._share, self._saved_s + earned)
        self._counted = now
