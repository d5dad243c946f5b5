"""The audit of a pipeline: every few steps somebody is killed in a certain state; all is counted.

Schedules of ``faults`` go by time; this goes by steps and states. A ``Blow`` names who is to die
and when: right after an effect of some kind, or in a state of the leader or of a driver. Blows are
dealt one after the other, again and again; one that never meets its moment makes room for the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from swarmtrain_protocols.testing.checks.base import Checker
from swarmtrain_protocols.testing.faults import Fault
from swarmtrain_protocols.testing.host import Host
from swarmtrain_protocols.testing.network import NetworkModel
from swarmtrain_protocols.testing.pipeline_site import PipelinePart, PipelineSite
from swarmtrain_protocols.testing.pipeline_swarm import (
    Pipeline,
    PipelineOutcome,
    build,
    make_spec,
    run_built,
)
from swarmtrain_protocols.testing.toystage import Toy
from swarmtrain_protocols.testing.world import World

BACK_S = 1.0
STEP_S_MAX = 20.0
"""Simulated seconds that a step may take on average, deaths included."""


@dataclass(frozen=True)
class Blow:
    """``trigger``: label of an effect, or empty; then ``when`` says whether the state is there."""

    name: str
    role: str
    trigger: str = ""
    when: Callable[[PipelineSite], bool] | None = None
    then: Blow | None = None
    """Dealt right after this one, in the same step."""


def _steps(site: PipelineSite) -> Any:
    return site.core.pipeline.steps


def _claims(site: PipelineSite) -> object:
    query = _steps(site)._query
    return query is not None and query.answers


def _ready(site: PipelineSite) -> object:
    closing = _steps(site)._closing
    return closing is not None and closing.ready


def _proposed(site: PipelineSite) -> bool:
    closing = _steps(site)._closing
    return closing is not None and closing.proposed


def _closed(site: PipelineSite) -> bool:
    return site.core.ledger.pipeline.closed is not None


def _waits_for(site: PipelineSite, backward: bool) -> bool:
    asked = [identity.backward for identity, _ in site.core.pipeline.driver.issues()]
    return backward in asked


def _redoes(site: PipelineSite) -> bool:
    return site.core.pipeline.driver.figures()["redo"] > 0


WORKER_PHASES = tuple(
    Blow("worker: " + name, "worker", trigger)
    for name, trigger in (
        ("forward or backward under way", "do:Compute"),
        ("computed, answer on its way", "send:hop"),
        ("claims told", "send:close"),
        ("undoing", "do:Undo"),
        ("handing over", "do:HandOver"),
        ("ready", "send:step-ready"),
        ("exchange begun", "do:BeginAttempt"),
        ("parts held", "send:held"),
        ("reducing", "do:ReducePart"),
        ("storing", "do:StoreResult"),
        ("holding", "send:holding"),
        ("stepping", "do:ApplyResult"),
        ("stepped", "emit:StateAdvanced"),
    )
)
"""What a worker does in a step: forward and backward, query, hand-over, exchange, step."""

LEADER_STATES = (
    Blow("leader: leases given", "leader", "send:lease"),
    Blow("leader: query", "leader", when=lambda s: _steps(s)._query is not None),
    Blow("leader: some claims told", "leader", when=lambda s: bool(_claims(s))),
    Blow("leader: plan", "leader", when=lambda s: _steps(s)._closing is not None),
    Blow("leader: some owners ready", "leader", when=lambda s: bool(_ready(s))),
    Blow("leader: close proposed", "leader", when=_proposed),
    Blow("leader: closed", "leader", when=_closed),
    Blow("leader: exchanging", "leader", "do:ReducePart"),
    Blow("leader: some stages committable", "leader", when=lambda s: bool(_steps(s)._verdicts)),
    Blow("leader: outcome proposed", "leader", when=lambda s: bool(_steps(s)._decided)),
    Blow("leader: step over", "leader", "emit:StepDone"),
)

DRIVER_STATES = (
    Blow("driver: lease asked for", "driver", "send:lease?"),
    Blow("driver: tokens asked for", "driver", "do:NeedTokens"),
    Blow("driver: forward outstanding", "driver", when=lambda s: _waits_for(s, False)),
    Blow("driver: backward outstanding", "driver", when=lambda s: _waits_for(s, True)),
    Blow("driver: done told", "driver", "send:mb-done"),
    Blow(
        "worker: claims on their way",
        "worker",
        "send:close",
        then=Blow("driver: sending again", "driver", when=_redoes),
    ),
)


class Killer(Checker):
    """Deals ``blows`` in turn, one every ``every`` steps."""

    def __init__(self, swarm: Pipeline, blows: Sequence[Blow], every: int) -> None:
        self.swarm = swarm
        self.blows = list(blows)
        self.every = every
        self.dealt: Counter[str] = Counter()
        self.pauses: list[tuple[str, float]] = []
        """By blow: seconds from the death to the next committed step."""
        self.gaps: list[float] = []
        """Seconds between steps with no death between them."""
        self._turn = 0
        self._last: Blow | None = None
        self._due = every
        self._armed: Blow | None = None
        self._struck: tuple[str, float] | None = None
        self._seen = 0
        self._at = 0.0

    def always(self, world: World, host: Host) -> None:
        done = len(self.swarm.steps.committed)
        if done > self._seen:
            self._stepped(world, done)
        if world.healed or not self.blows:
            return
        if done >= self._due:
            self._due = done + self.every
            self._arm(self.blows[self._turn % len(self.blows)])
            self._turn += 1
        self._aim(world, host)

    def _stepped(self, world: World, done: int) -> None:
        if self._struck is not None:
            name, at = self._struck
            self.pauses.append((name, world.now - at))
            self._struck = None
        elif self._seen:
            self.gaps.append(world.now - self._at)
        self._seen, self._at = done, world.now

    def _arm(self, blow: Blow) -> None:
        for host in self.swarm.world.hosts.values():
            host.armed.clear()
        self._armed = self._last = blow

    def _aim(self, world: World, host: Host) -> None:
        """Whoever is first to be in the state dies; who plays which part may have changed."""
        blow, site = self._armed, host.node
        host.armed.clear()
        if blow is None or site is None or not self._plays(host, blow.role):
            return
        fault = Fault(world.now, "aim-crash", host.name, blow.trigger or blow.name, BACK_S)
        if blow.trigger:
            host.armed.append(fault)
        elif blow.when is not None and blow.when(site):
            world.at(world.now, None, world.fire, fault)
            self._armed = None

    def _plays(self, host: Host, role: str) -> bool:
        site = host.node
        if role == "leader":
            return bool(site.core.pipeline.steps.active)
        if role == "driver":
            return bool(site.part.drives)
        return not site.part.drives and not site.core.pipeline.steps.active

    def crashed(self, world: World, host: Host) -> None:
        blow = self._last
        assert blow is not None, "nobody else kills here"
        self.dealt[blow.name] += 1
        self._struck = blow.name, world.now
        for other in world.hosts.values():
            other.armed.clear()
        self._armed = blow.then
        self._last = blow.then or blow


@dataclass
class Audit:
    """What came of it. ``lost``: micro-batches of committed steps that are in no gradient."""

    outcome: PipelineOutcome
    dealt: Counter[str] = field(default_factory=Counter)
    pauses: list[tuple[str, float]] = field(default_factory=list)
    step_s: float = 0.0
    lost: int = 0

    def summary(self) -> str:
        seen = self.outcome.seen
        longest = max(self.pauses, key=lambda item: item[1], default=("nobody", 0.0))
        return (
            f"steps={self.outcome.committed} aborted={self.outcome.aborted} "
            f"deaths={sum(self.dealt.values())} replies_lost={seen['hop:lost']} "
            f"requests_doubled={seen['hop:doubled']} undone={seen['pipeline:undo']} "
            f"duplicates={int(self.outcome.violation == 'PL1')} lost={self.lost} "
            f"step_s={self.step_s:.2f} longest_pause_s={longest[1]:.1f} ({longest[0]}) "
            f"violation={self.outcome.violation or 'none'}"
        )


def run_audit(
    steps: int,
    blows: Sequence[Blow],
    every: int,
    *,
    seed: int = 5,
    toy: Toy | None = None,
    names: str = "abcde",
    drivers: str = "a",
    lost: float = 0.05,
    doubled: float = 0.05,
) -> Audit:
    """``steps`` steps in which nothing may be left out, then two more without trouble.

    Args:
        every: steps between two deaths.
        lost, doubled: shares of replies that are dropped and of requests that come twice.
    """
    toy = toy or Toy(seed, 2, 4)
    spec = replace(make_spec(seed, toy, close_fraction=1.0), lost=lost, doubled=doubled)
    parts = [PipelinePart(name, drives=name in drivers) for name in names]
    swarm = build(seed, spec, parts, model=NetworkModel())
    killer = Killer(swarm, blows, every)

    def enough() -> bool:
        return len(swarm.steps.committed) >= steps

    outcome = run_built(
        swarm, seed, [], killer, heal_at_s=10.0 + STEP_S_MAX * steps, healthy=enough
    )
    expected = toy.micro_batches * outcome.committed
    gaps = sorted(killer.gaps)
    return Audit(
        outcome,
        killer.dealt,
        killer.pauses,
        gaps[len(gaps) // 2] if gaps else 0.0,
        expected - outcome.micro_batches,
    )
