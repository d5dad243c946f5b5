"""Copies of a stage's state with a worker of the next stage, so that its loss costs little.

For every stage one worker of the next one (of the first block stage for the last one; the ends
count as a stage) fetches the newest pinned snapshot every few steps and offers it like its own. A
stage that has too few workers is copied whenever a newer snapshot is on offer. Who does it follows
from the ledger, so nobody has to agree on it.
"""

from __future__ import annotations

import math

from blake3 import blake3

from swarmtrain_protocols.core import Effect, PeerId
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.pipeline.collect import Collector
from swarmtrain_protocols.rounds import effects as fx

COPY = "copy"
"""What such a snapshot is fetched for."""
COPY_STEPS = 20
CHECK_S = 5.0
"""How often a buddy looks whether a copy is due; also the pause after one that failed."""
COPY_TIMEOUT_S = 600.0
COPY_TIME_SHARE = 0.05
"""Of the time, for copies of a stage that has enough workers: links are for hops."""


def buddy_of(ledger: Ledger, stage: int) -> PeerId | None:
    """The member that keeps a copy of ``stage``; None: nobody serves the next one alone.

    The least of the next stage's workers by the hash of (member, stage): copies spread.
    """
    state = ledger.pipeline
    following = (stage + 1) % len(state.stages)
    able = [k for k in state.serving(following) if stage not in state.assigned[k]]
    if not able:
        return None
    return PeerId(min(able, key=lambda k: blake3(k + bytes([stage])).digest()))


class Buddy:
    """Keeps copies of other stages here, as far as this node is their buddy."""

    def __init__(
        self,
        *,
        me: PeerId,
        ledger: Ledger,
        out: list[Effect],
        collector: Collector,
        replicas_min: int,
    ) -> None:
        self.ledger = ledger
        self._me = me
        self._out = out
        self._collector = collector
        self._replicas_min = replicas_min
        self._kept: dict[int, tuple[int, int]] = {}
        """By stage: (run generation, round) of the copy that is here."""
        self._rest_until: dict[int, float] = {}
        self._check_at = 0.0

    def stages(self) -> list[int]:
        """Stages that this node is to keep a copy of."""
        count = len(self.ledger.pipeline.stages)
        return [s for s in range(count) if buddy_of(self.ledger, s) == self._me]

    def tick(self, now: float) -> None:
        if now < self._check_at:
            return
        self._check_at = now + CHECK_S
        mine = self.stages()
        for stage in [s for s in self._kept if s not in mine]:
            del self._kept[stage]
            self._rest_until.pop(stage, None)
            self._out.append(px.DropCopy(stage_channel(stage)))
        for stage in mine:
            if now >= self._rest_until.get(stage, now) or self._endangered(stage):
                self._look(now, stage)

    def _endangered(self, stage: int) -> bool:
        return len(self.ledger.pipeline.serving(stage)) < self._replicas_min

    def _look(self, now: float, stage: int) -> None:
        name = stage_channel(stage)
        channel = self.ledger.channels.get(name)
        state = self.ledger.pipeline
        if channel is None or not channel.round or state.stages[stage].host:
            return
        generation, kept = self._kept.get(stage, (-1, -1))
        if generation != self.ledger.generation:
            kept = -1
        wait = 1 if self._endangered(stage) else COPY_STEPS
        due = kept < 0 or channel.round >= kept + wait
        if not due or self._collector.busy(name, COPY):
            return
        donors = [PeerId(k) for k in state.serving(stage)]

        def done(at: float, snapshot: fx.Snapshot | None) -> None:
            if snapshot is not None:
                self._kept[stage] = self.ledger.generation, snapshot.round
                self._rest_until[stage] = at + (at - now) * (1 / COPY_TIME_SHARE - 1)
                self._out.append(px.KeepCopy(snapshot))

        if donors:
            self._collector.start(
                now, name, COPY, donors, done, timeout_s=COPY_TIMEOUT_S, after=kept
            )

    def deadline(self) -> float:
        return self._check_at if self.ledger.pipeline.stages else math.inf
