"""A fleet of workers in virtual time under the real ``Assigner`` and the real ledger.

No hops are computed: the throughput at any moment is that of the workers that are alive and in
step (``pipeline.capacity``), with their true speeds. A worker that is given a stage downloads it
for ``download_s``; if nobody serves the stage, its recovery is taken to last as long. A worker that
leaves a stage for another serves neither while it downloads. Crashes are seen as broken links; the
member leaves the ledger half a minute later.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import Effect, PeerId
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.membership import LOST_AFTER_S
from swarmtrain_protocols.messages.pipeline import StageReport, WorkerReport
from swarmtrain_protocols.pipeline.assigner import Assigner
from swarmtrain_protocols.pipeline.book import pipeline_state, stage_channel
from swarmtrain_protocols.pipeline.capacity import throughput
from swarmtrain_protocols.pipeline.census import AssignPolicy
from swarmtrain_protocols.pipeline.hops import ENDS
from swarmtrain_protocols.testing.keyring import peer_id_of

LOG_S = 0.05
"""From a proposal to its entry."""
LEADER = peer_id_of("leader of the fleet")


@dataclass(slots=True)
class FleetWorker:
    """One simulated worker; ``ready`` by stage: when its download is over."""

    id: PeerId
    speed: float
    room: int
    alive: bool = True
    stages: tuple[int, ...] = ()
    ready: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Assignment:
    """One STAGE_ASSIGNED entry as the fleet saw it."""

    at: float
    member: bytes
    before: tuple[int, ...]
    after: tuple[int, ...]
    reason: str

    @property
    def moves(self) -> bool:
        """A stage was left and another one taken up."""
        left, came = set(self.before) - set(self.after), set(self.after) - set(self.before)
        return bool(left and came)


class Fleet:
    """See the module. ``place``, if given, replaces the assigner: it chooses a joiner's stage."""

    def __init__(
        self,
        *,
        blocks: int,
        policy: AssignPolicy,
        download_s: float = 60.0,
        values: int = 1_000_000,
        ends: int = 1,
        ends_cost: float = 1e-6,
        rng: random.Random | None = None,
        noise: float = 0.0,
        place: Callable[[Fleet, FleetWorker], int] | None = None,
    ) -> None:
        self.now = 0.0
        self.policy = policy
        self.values = values
        self.costs = {ENDS: ends_cost, **dict.fromkeys(range(1, blocks + 1), 1.0)}
        self.workers: dict[bytes, FleetWorker] = {}
        self.assignments: list[Assignment] = []
        self.done = 0.0
        """Micro-batches so far."""
        self.best = 0.0
        """The same at the optimum: whoever lives is in the best place at once, without download."""
        self._rng = rng or random.Random(0)
        self._noise = noise
        self._download_s = download_s
        self._place = place
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._rates = (0.0, 0.0)
        self._log: list[e.EntryBody] = []
        self.out: list[Effect] = []
        self.ledger = Ledger(pipeline=pipeline_state(blocks, "sync"))
        self.apply(e.Genesis(bytes(32), bytes(32), LEADER, bytes(64)))
        layout = [e.ChannelLayout(stage_channel(ENDS), ends)]
        layout += [e.ChannelLayout(stage_channel(s), values) for s in range(1, blocks + 1)]
        roots = tuple(bytes([7]) * 32 for _ in layout)
        self.apply(e.ModelDefined(bytes(32), tuple(layout), roots, LEADER))
        self.assigner = self.new_leader()

    # -- events ----------------------------------------------------------------------------

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """Call ``action`` at ``time_s``, after what was asked for earlier at the same time."""
        self._count += 1
        heapq.heappush(self._events, (max(time_s, self.now), self._count, action))

    def run(self, until_s: float) -> None:
        """Let time pass until ``until_s``."""
        while True:
            deadline = self.assigner.deadline() if self._place is None else until_s + 1.0
            coming = self._events[0][0] if self._events else until_s + 1.0
            time_s = max(self.now, min(deadline, coming))
            if time_s > until_s:
                break
            self._pass(time_s)
            if coming <= time_s:
                heapq.heappop(self._events)[2]()
            else:
                self.assigner.step(self.now)
        self._pass(until_s)

    def _pass(self, time_s: float) -> None:
        self.done += self._rates[0] * (time_s - self.now)
        self.best += self._rates[1] * (time_s - self.now)
        self.now = time_s

    # -- the log -----------------------------------------------------------------------------

    def new_leader(self) -> Assigner:
        """Another member leads the log from now on; it knows nothing but the ledger."""
        self.assigner = Assigner(
            me=LEADER,
            ledger=self.ledger,
            out=self.out,
            policy=self.policy,
            propose=self._propose,
            connected=lambda: [w.id for w in self.workers.values() if w.alive],
        )
        self.assigner.activate(self.now, True)
        return self.assigner

    def _propose(self, now: float, body: e.EntryBody) -> bool:
        self.at(now + LOG_S, lambda: self.apply(body))
        return True

    def apply(self, body: e.EntryBody) -> None:
        """The next entry of the log."""
        before = dict(self.ledger.pipeline.assigned)
        accepted = self.ledger.apply(self.ledger.index + 1, body)
        if isinstance(body, e.StageAssigned) and accepted:
            was = before.get(body.member, ())
            change = Assignment(self.now, body.member, was, body.stages, body.reason)
            self.assignments.append(change)
            self._serve(self.workers[body.member], body.stages)
        if self.ledger.index > 1:
            self.assigner.reconcile(self.now)

    # -- workers -----------------------------------------------------------------------------

    def arrive(self, time_s: float, name: str, speed: float = 1.0, room: int = 0) -> PeerId:
        """A worker joins at ``time_s``; ``room`` 0: for one block stage and the ends."""
        peer = peer_id_of(name)
        wanted = room or self.values + self.ledger.channels[stage_channel(ENDS)].values
        worker = FleetWorker(peer, speed, wanted)

        def come() -> None:
            self.workers[peer] = worker
            self.apply(e.MemberJoined(peer, name, ("127.0.0.1:1",), True, True, False, True))
            self._changed()
            if self._place is not None:
                stages = (ENDS, self._place(self, worker))
                self.apply(e.StageAssigned(peer, stages, "join"))
            self._report(worker, True)

        self.at(time_s, come)
        return peer

    def crash(self, time_s: float, peer: PeerId) -> None:
        """The worker is gone at ``time_s``, without a word."""

        def gone() -> None:
            self.workers[peer].alive = False
            self._changed()
            self.assigner.disconnected(self.now, peer)
            self.at(self.now + LOST_AFTER_S, left)

        def left() -> None:
            if not self.workers[peer].alive:
                self.apply(e.MemberLeft(peer, "lost"))
                del self.workers[peer]

        self.at(time_s, gone)

    def back(self, time_s: float, peer: PeerId) -> None:
        """A crashed worker is back before it left the ledger, with its state."""

        def here() -> None:
            self.workers[peer].alive = True
            self._changed()

        self.at(time_s, here)

    def _serve(self, worker: FleetWorker, stages: tuple[int, ...]) -> None:
        worker.ready = {s: t for s, t in worker.ready.items() if s in stages}
        for stage in stages:
            if stage not in worker.ready:
                seconds = self._download_s if stage != ENDS else 0.0
                worker.ready[stage] = self.now + seconds
                self.at(self.now + seconds, lambda: self._fetched(worker))
        worker.stages = stages
        self._changed()

    def _fetched(self, worker: FleetWorker) -> None:
        self._changed()
        self._report(worker, False)

    def _report(self, worker: FleetWorker, again: bool) -> None:
        if not worker.alive and worker.id not in self.workers:
            return
        if again:
            self.at(self.now + self.policy.report_s, lambda: self._report(worker, True))
        if not worker.alive or self._place is not None:
            return
        items = []
        for stage in worker.stages:
            ready = worker.ready[stage] <= self.now
            seconds = self.costs[stage] / worker.speed * self._rng.lognormvariate(0.0, self._noise)
            items.append(StageReport(stage, 1, ready, seconds if ready else 0.0))
        message = WorkerReport(self.ledger.generation, tuple(items), worker.room, 0)
        self.assigner.receive(self.now, worker.id, message)

    # -- figures -----------------------------------------------------------------------------

    def _changed(self) -> None:
        self._rates = self.rate(), self.optimum()

    def counts(self) -> list[int]:
        """Living workers by block stage."""
        found = [0] * (len(self.costs) - 1)
        for worker in self.workers.values():
            for stage in worker.stages:
                found[stage - 1] += worker.alive and stage != ENDS
        return found

    def rate(self) -> float:
        """Micro-batches per second at this moment."""
        speeds: dict[tuple[int, ...], float] = {}
        for worker in self.workers.values():
            served = tuple(s for s in worker.stages if worker.ready[s] <= self.now)
            if worker.alive and served:
                speeds[served] = speeds.get(served, 0.0) + worker.speed
        return throughput(speeds, self.costs)[0]

    def optimum(self) -> float:
        """For equal workers the brute-force optimum, for others no less than that.

        Equal workers: every placement has a stage with at most floor(n / S) of them, and the even
        one reaches that. Others: the sum of all speeds, evenly divided.
        """
        speeds = [w.speed for w in self.workers.values() if w.alive]
        blocks = len(self.costs) - 1
        if speeds and min(speeds) == max(speeds):
            return speeds[0] * (len(speeds) // blocks)
        return sum(speeds) / blocks

    def moves(self) -> list[Assignment]:
        """Assignments that took a worker from one stage to another."""
        return [item for item in self.assignments if item.moves]

    def returns(self, within_s: float) -> list[Assignment]:
        """Moves to a stage that the same worker had left less than ``within_s`` before."""
        found = []
        for item in self.moves():
            for other in self.moves():
                earlier = other.member == item.member and item.at - within_s < other.at < item.at
                if earlier and set(other.before) & (set(item.after) - set(item.before)):
                    found.append(item)
        return found
