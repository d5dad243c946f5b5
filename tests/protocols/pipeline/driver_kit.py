"""A driver core with a leader and workers that a test plays by hand, or that serve all."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

from swarmtrain_protocols.core import Effect, Emit, PeerId, Send
from swarmtrain_protocols.messages.pipeline import (
    EMPTY,
    HopRefused,
    HopReply,
    HopRequest,
    Lease,
    LeaseRequest,
    MicroBatchDone,
    Tensor,
)
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.driver import DriverCore
from swarmtrain_protocols.pipeline.envelope import View
from swarmtrain_protocols.pipeline.paths import PathPlan
from swarmtrain_protocols.pipeline.routing import Policy, Router

LEADER = PeerId(b"L" * 32)


def worker(stage: int, number: int) -> PeerId:
    return PeerId(bytes([stage, number]) + bytes(30))


def tensor(text: str) -> Tensor:
    data = text.encode()
    return Tensor(data[:32].ljust(32, b"\0"), len(data), data)


class Rig:
    """``sent``: (peer, message) not yet looked at; ``events``: everything emitted."""

    def __init__(
        self,
        stages: int = 2,
        replicas: int = 2,
        *,
        sticky: bool = False,
        policy: Policy = "least-finish",
        paths: PathPlan | None = None,
    ) -> None:
        self.out: list[Effect] = []
        self.view: View | None = View(0, 5, 3)
        self.serving = {s: [worker(s, i) for i in range(replicas)] for s in range(stages + 1)}
        self.core = DriverCore(
            rng=random.Random(11),
            out=self.out,
            stages=stages,
            view=lambda: self.view,
            workers=lambda stage: self.serving[stage],
            version=lambda stage: 5,
            paths=paths or PathPlan(stages),
            sticky=sticky,
            router=Router(random.Random(3), policy),
        )
        self.events: list[object] = []
        self.wanted: list[px.NeedTokens] = []
        self.served: list[px.ServeTensor] = []
        self._sent: list[tuple[PeerId, object]] = []
        self.core.leader_changed(0.0, LEADER)
        self.core.set_active(0.0, True)

    def sent(self) -> list[tuple[PeerId, object]]:
        """All messages since the last call."""
        self._collect()
        found, self._sent = self._sent, []
        return found

    def requests(self) -> list[tuple[PeerId, HopRequest]]:
        return [(p, m) for p, m in self.sent() if isinstance(m, HopRequest)]

    def asked(self) -> tuple[PeerId, HopRequest]:
        """The only request since the last look."""
        (found,) = self.requests()
        return found

    def to_leader(self) -> list[LeaseRequest | MicroBatchDone]:
        return [m for _, m in self.sent() if isinstance(m, LeaseRequest | MicroBatchDone)]

    def _collect(self) -> None:
        for effect in self.out:
            if isinstance(effect, Send):
                self._sent.append((effect.peer, effect.message))
            elif isinstance(effect, px.NeedTokens):
                self.wanted.append(effect)
            elif isinstance(effect, px.ServeTensor):
                self.served.append(effect)
            else:
                assert isinstance(effect, Emit), effect
                self.events.append(effect.event)
        self.out.clear()

    def lease(self, now: float, *ks: int, ttl_s: float = 100.0, redo: object = ()) -> None:
        """A lease; the tokens of new micro-batches come at once."""
        lease = Lease(0, 5, ks, ttl_s, redo)  # type: ignore[arg-type]
        self.core.receive(now, LEADER, lease)
        self._collect()
        wanted, self.wanted = self.wanted, []
        for need in wanted:
            self.core.tokens(now, need.step, need.micro_batch, b"tokens%d" % need.micro_batch)

    def reply(self, now: float, peer: PeerId, request: HopRequest, loss: float = 0.0) -> None:
        self.core.receive(now, peer, answer(request, loss))

    def refuse(self, now: float, peer: PeerId, request: HopRequest, code: str) -> None:
        self.core.receive(now, peer, HopRefused(request.id, code))

    def outcomes(self) -> list[str]:
        self._collect()
        return [e.outcome for e in self.events if isinstance(e, px.HopDone)]


def answer(request: HopRequest, loss: float = 0.0) -> HopReply:
    """An output that names what it was made of."""
    hop, backward = request.id.hop, request.id.backward
    output = tensor(f"{'g' if backward else 'y'}{request.id.micro_batch}.{hop}")
    return HopReply(request.id, EMPTY if backward and hop == 0 else output, loss, 0, 0.01)


def serve_all(
    rig: Rig,
    total: int,
    seconds: Callable[[PeerId, HopRequest], float],
    until_s: float = 1e4,
) -> float:
    """Workers that serve in order of arrival and a leader with ``total`` micro-batches: the time.

    Messages take no time.
    """
    free_at: dict[PeerId, float] = {}
    heap: list[tuple[float, int, PeerId, HopReply]] = []
    now, count, leased, done = 0.0, 0, 0, 0
    while done < total:
        for peer, message in rig.sent():
            if isinstance(message, LeaseRequest):
                room = min(message.room, total - leased)
                rig.lease(now, *range(leased, leased + room))
                leased += room
            elif isinstance(message, MicroBatchDone):
                done += 1
            elif isinstance(message, HopRequest):
                free_at[peer] = max(now, free_at.get(peer, 0.0)) + seconds(peer, message)
                count += 1
                heapq.heappush(heap, (free_at[peer], count, peer, answer(message)))
        if rig.out:
            continue
        timer = rig.core.deadline()
        if heap and heap[0][0] <= timer:
            now, _, peer, reply = heapq.heappop(heap)
            rig.core.receive(now, peer, reply)
        else:
            now = max(now, timer)
            rig.core.tick(now)
        assert now < until_s, "the driver is stuck"
    return now
