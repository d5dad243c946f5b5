"""The leader's side of a stage's loss: notice it, name a host, name another one, watch. Spec 11.

A stage is lost when no linked member has had its state for a while. Members that are expected back
get longer, because what they have on disk is better than anything that can be rebuilt. The host is
a worker that the assigner has given the stage, or a member that has come back with the state; it
collects candidates, has them scored, and asks for STAGE_RECOVERED (``rebuild``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import Effect, Emit, PeerId
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.messages.member import StateReport
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.rounds import effects as fx

LOOK_S = 1.0
GUARD_STEPS = 200
GUARD_LOSS = 0.5
"""Nats above the loss before the stage was lost, after so many steps: the user should know."""
LOSS_STEPS = 20.0
"""Time constant of the mean of the steps' losses."""


@dataclass(frozen=True, slots=True)
class RecoveryPolicy:
    """Patience. ``dead_s``: without a holder, if nobody is expected back; ``return_s``: else.

    ``apply_s``: for holders of the last result that have not applied it. ``host_s``: for a host.
    """

    dead_s: float = 10.0
    return_s: float = 30.0
    apply_s: float = 60.0
    host_s: float = 900.0


@dataclass(slots=True)
class _Host:
    """Since when somebody has been the host of a stage, and since when its link is down."""

    member: bytes
    since: float
    gone: float = math.inf


class RecoveryLeader:
    """Active on the leader of the log.

    Args:
        reported: (member, its latest state report of a channel) for members with a link.
        able: members with a link and a trainer that a stage is assigned to, in member order.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        out: list[Effect],
        propose: Callable[[float, e.EntryBody], bool],
        present: Callable[[], Sequence[bytes]],
        reported: Callable[[str], Sequence[tuple[bytes, StateReport]]],
        able: Callable[[int], Sequence[PeerId]],
        policy: RecoveryPolicy | None = None,
    ) -> None:
        self.ledger = ledger
        self.active = False
        self._out = out
        self._propose = propose
        self._present = present
        self._reported = reported
        self._able = able
        self._policy = policy or RecoveryPolicy()
        self._reset(0.0)

    def _reset(self, now: float) -> None:
        self._since: dict[int, float] = {}
        self._hosts: dict[int, _Host] = {}
        self._proposed: dict[int, tuple[bytes, float]] = {}
        self._loss = math.nan
        self._step = -1
        self._guards: dict[int, tuple[int, float]] = {}
        """By stage: the step at which to look, and the loss before it was lost."""
        self._next_look = now

    def activate(self, now: float, active: bool) -> None:
        """Leadership of the log begins or ends; everything volatile is dropped."""
        self.active = active
        self._reset(now)

    def reconcile(self, now: float) -> None:
        """The ledger moved."""
        state = self.ledger.pipeline
        if not self.active or not state.stages:
            return
        for stage in [s for s, (host, _) in self._proposed.items() if state.stages[s].host == host]:
            del self._proposed[stage]
        lost = state.lost()
        for stage in lost:  # a host may be done before anybody looks: its report takes a moment
            self._since.pop(stage, None)
        for stage in [s for s in self._hosts if s not in lost]:
            del self._hosts[stage]
        if state.step != self._step:
            self._step = state.step
            self._watch_loss()

    def _watch_loss(self) -> None:
        """Guard rail of reference practice: a recovery that did not heal is told, not hidden."""
        state = self.ledger.pipeline
        if state.loss >= 0.0:
            known = state.loss if math.isnan(self._loss) else self._loss
            self._loss = known + (state.loss - known) / LOSS_STEPS
        for stage, (at, before) in list(self._guards.items()):
            if state.step < at:
                continue
            del self._guards[stage]
            if self._loss > before + GUARD_LOSS:
                why = f"loss {self._loss:.3f}, {before:.3f} before stage {stage} was lost"
                fields: dict[str, object] = {"what": "a recovery that did not heal", "why": why}
                self._out.append(Emit(fx.Notice("fallback", fields)))

    def step(self, now: float) -> None:
        if not self.active or now < self._next_look or self.ledger.ended:
            return
        self._next_look = now + LOOK_S
        for stage in range(len(self.ledger.pipeline.stages)):
            channel = self.ledger.channels.get(stage_channel(stage))
            # Before the first step everybody makes the first weights alone.
            if channel is not None and channel.round and not self._waiting(now, stage):
                self._look(now, stage)

    def _waiting(self, now: float, stage: int) -> bool:
        """A proposal is on its way."""
        _, at = self._proposed.get(stage, (b"", -math.inf))
        return now < at + self._policy.dead_s

    def _look(self, now: float, stage: int) -> None:
        front, applying = self._holders(stage)
        if self.ledger.pipeline.stages[stage].host:
            self._look_after_host(now, stage, front)
            return
        if front:
            self._since.pop(stage, None)
            return
        since = self._since.setdefault(stage, now)
        here = self._present()
        away = [k for k in self.ledger.pipeline.serving(stage) if k not in here]
        patience = self._policy.return_s if away else self._policy.dead_s
        if applying:
            patience = max(patience, self._policy.apply_s)
        able = self._able(stage)
        if now >= since + patience and able:
            self._name(now, stage, able[0], "no holder of its state is left")

    def _holders(self, stage: int) -> tuple[list[bytes], list[bytes]]:
        """Members with the current state; members that are about to compute it."""
        channel = self.ledger.channels[stage_channel(stage)]
        last = channel.outcome(channel.round - 1)
        front, applying = [], []
        for member, report in self._reported(channel.name):
            if report.generation != self.ledger.generation or not any(report.state_hash):
                continue
            if report.round >= channel.round:
                front.append(member)
            elif last is not None and report.round == last.round and member in last.held_by:
                applying.append(member)
        return sorted(front), sorted(applying)

    def _look_after_host(self, now: float, stage: int, front: list[bytes]) -> None:
        named = self.ledger.pipeline.stages[stage].host
        host = self._hosts.get(stage)
        if host is None or host.member != named:
            host = self._hosts[stage] = _Host(named, now)
        gone = named not in self._present()
        host.gone = min(host.gone, now) if gone else math.inf
        if front and named not in front:
            self._name(now, stage, front[0], "a member is back with its state")
            return
        overdue = now >= host.since + self._policy.host_s
        others = [k for k in self._able(stage) if k != named]
        if others and (overdue or now >= host.gone + self._policy.dead_s):
            reason = "its host did not finish" if overdue else "its host is gone"
            self._name(now, stage, others[0], reason)

    def _name(self, now: float, stage: int, host: bytes, reason: str) -> None:
        channel = self.ledger.channels[stage_channel(stage)]
        if self._propose(now, e.StageLost(stage, channel.round, host, reason)):
            self._proposed[stage] = host, now
            if not math.isnan(self._loss):
                self._guards[stage] = channel.round + GUARD_STEPS, self._loss

    def deadline(self) -> float:
        busy = self.active and bool(self.ledger.pipeline.stages) and not self.ledger.ended
        return self._next_look if busy else math.inf
