"""What the leader of steps waits for: answers to a query, and owners of a plan (spec 11 §2.4).

Both are asked again now and then: a question or its answer may be lost with a link that nobody
noticed, and to ask twice is harmless.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.messages import pipeline as m
from swarmtrain_protocols.pipeline import claims as cl

ASK_AGAIN_S = 5.0


@dataclass(slots=True)
class Query:
    """Workers are frozen and say what they have. ``standing`` by stage: (holders, state hash)."""

    number: int
    standing: list[tuple[tuple[bytes, ...], bytes]]
    asked: list[PeerId]
    deadline: float
    again_at: float
    answers: dict[PeerId, cl.Claims] = field(default_factory=dict)

    def waiting(self, present: Sequence[PeerId]) -> list[PeerId]:
        """Who is there and has not answered."""
        return [p for p in self.asked if p in present and p not in self.answers]

    def overdue(self, now: float, present: Sequence[PeerId]) -> list[PeerId]:
        """Who is to be asked again now."""
        if now < self.again_at:
            return []
        self.again_at = now + ASK_AGAIN_S
        return self.waiting(present)


@dataclass(slots=True)
class Closing:
    """Owners take out what is not theirs and encode the rest. ``due`` by (stage, owner)."""

    query: Query
    plan: m.StepPlan
    digest: bytes
    due: dict[tuple[int, PeerId], int]
    deadline: float
    again_at: float
    ready: dict[tuple[int, PeerId], bytes] = field(default_factory=dict)
    proposed: bool = False

    @property
    def complete(self) -> bool:
        return len(self.ready) == len(self.due)

    def overdue(self, now: float) -> list[PeerId]:
        """Owners that are to be told the plan again now."""
        if now < self.again_at:
            return []
        self.again_at = now + ASK_AGAIN_S
        return list(
            dict.fromkeys(peer for stage, peer in self.due if (stage, peer) not in self.ready)
        )
