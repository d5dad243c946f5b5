"""A pipeline in mode ``diloco`` in the simulator: trouble from a seed, checkers, and liveness.

``run_local(seed)`` is one schedule, as ``pipeline_swarm.run_pipeline`` is for steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.pipeline.book import KEPT, stage_channel
from swarmtrain_protocols.testing.checks.base import Checker, settle_within
from swarmtrain_protocols.testing.checks.rounds import RoundsAreRight
from swarmtrain_protocols.testing.draws import Stream
from swarmtrain_protocols.testing.faults import MORE_KINDS, PLAIN_KINDS, Fault, Plan, generate
from swarmtrain_protocols.testing.local_site import LocalSite, LocalTruth
from swarmtrain_protocols.testing.network import NetworkModel
from swarmtrain_protocols.testing.pipeline_site import PipelinePart, PipelineSpec
from swarmtrain_protocols.testing.pipeline_swarm import make_spec
from swarmtrain_protocols.testing.swarm import Outcome, play, start_sites, truth_of
from swarmtrain_protocols.testing.toystage import Toy
from swarmtrain_protocols.testing.world import Context, World

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host

TROUBLE_FROM_S = 6.0
TROUBLE_UNTIL_S = 22.0
HEAL_AT_S = 26.0
LIVENESS_S = 120.0
ROUNDS_AFTER_HEALING = 2

TRIGGERS = (
    *("persist", "synced", "fetch", "emit:LedgerChanged", "emit:StateAdvanced", "emit:HopDone"),
    *("send:hop?", "send:hop", "send:ready", "send:held", "send:result", "send:holding"),
    *("do:Compute", "do:LocalStep", "do:HandOver", "do:ClearGradients", "do:NeedTokens"),
    *("do:BeginAttempt", "do:ReducePart", "do:StoreResult", "do:ApplyResult"),
)


def first_steps(stage: int, stages: int, inner_steps: int) -> int:
    """Local steps of a stage before its first contribution, D(0) of spec 11 §2.8.4.

    The spec says so here a second time: a checker must not ask the code that it judges.
    """
    if stage * inner_steps < stages:
        return inner_steps
    return (stage * inner_steps - stage * inner_steps % stages) // stages


class LocalRoundsAreRight(RoundsAreRight):
    """AR1 to AR6 and OS1 for stages that step by themselves, and PL21."""

    truth: LocalTruth

    def __init__(self, truth: LocalTruth, toy: Toy, spec: PipelineSpec) -> None:
        super().__init__(truth, spec.manifest.keys, spec.chunk_values)
        self.toy = toy
        self.early = 0
        """Contributions of the first round that came before a whole phase: they are staggered."""

    def first(
        self, world: World, host: Host, index: int, body: e.EntryBody, accepted: bool
    ) -> None:
        super().first(world, host, index, body, accepted)
        if accepted and isinstance(body, e.StepClosed | e.StepOutcome):
            world.violation("PL3", f"there are no steps in this mode: {body}")
        if accepted and isinstance(body, e.RoundOpened) and body.key.channel in self.states:
            self._work(world, body)
        if accepted and isinstance(body, e.StageRecovered):
            self._recovered(world, body)

    def _work(self, world: World, body: e.RoundOpened) -> None:
        """PL21: made by local steps from the state of its base round, each pair once."""
        stage = int(body.key.channel.split("/")[1])
        for item in body.contributors:
            made = self.truth.work[item.root]
            if (made.member, made.stage, made.base_round) != (item.member, stage, item.base_round):
                world.violation("PL21", f"{body.key}: {item} was made of {made}")
            if len(set(made.pairs)) != len(made.pairs):
                world.violation("PL21", f"{body.key}: {item} holds a pair twice: {made}")
            phase = self.run_keys.inner_steps
            if not made.base_round:
                phase = first_steps(stage, self.toy.stages + 1, phase)
                self.early += phase < self.run_keys.inner_steps
            if made.steps < phase:
                world.violation("PL21", f"{body.key}: {made.steps} of {phase} local steps: {made}")

    def _recovered(self, world: World, body: e.StageRecovered) -> None:
        channel, name = stage_channel(body.stage), body.candidates[body.choice]
        world.seen["recovered:" + name] += 1
        self.rebuilt[channel] = body.step
        for item in self.invariants:
            item.recovered(world, channel)
        if name != KEPT:
            theta = self.truth.candidates[channel, body.root]
            made = self._reference(channel, body.step, theta, np.zeros_like(theta))
            if made.state_hash != body.root:
                world.violation("PL16", f"stage {body.stage} comes back as something else")
            self.states[channel][body.step] = made

    def always(self, world: World, host: Host) -> None:
        if self.truth.wrong:
            world.violation("PL21", self.truth.wrong[0])
        super().always(world, host)


@dataclass
class LocalSwarm:
    """A built world, what it knows, and its checker."""

    world: World
    truth: LocalTruth
    rounds: LocalRoundsAreRight
    spec: PipelineSpec

    def site(self, name: str) -> LocalSite | None:
        node = self.world.hosts[name].node
        return node if isinstance(node, LocalSite) else None

    def committed(self) -> dict[str, int]:
        """Committed rounds by channel, as far as anybody has applied the log."""
        names = [stage_channel(s) for s in range(self.spec.toy.stages + 1)]
        return {name: sum(key[0] == name for key in self.rounds.committed) for name in names}


def local_spec(seed: int, toy: Toy, **changes: Any) -> PipelineSpec:
    """A pipeline of toy stages that step by themselves; ``changes`` are run keys."""
    keys: dict[str, Any] = {
        "pipeline_mode": "diloco",
        "inner_steps": 4,
        "outer_momentum": 0.9,
        "grace_s": 3.0,
        **changes,
    }
    return make_spec(seed, toy, **keys)


def spec_of(seed: int) -> tuple[PipelineSpec, tuple[PipelinePart, ...]]:
    """The swarm of a seed: one to three stages on four to six sites, one or two drivers."""
    luck = Stream(seed, "local")

    def pick(*values: float) -> float:
        return values[luck.integer(len(values))]

    toy = Toy(seed, 1 + luck.integer(3), 2 + luck.integer(3))
    spec = local_spec(
        seed, toy, inner_steps=2 + luck.integer(4), codec_gather=("fp32", "int8")[luck.integer(2)]
    )
    spec = replace(
        spec,
        work_s=(0.001, pick(0.005, 0.1)),
        hop_s=(0.005, pick(0.02, 0.05)),
        by_root=pick(0.0, 0.0, 0.3),
        lost=pick(0.0, 0.02),
        doubled=pick(0.0, 0.1),
        trainer_life_s=pick(0.0, 0.0, 12.0),
        room=2 + luck.integer(2),
    )
    names = "abcdef"[: 4 + luck.integer(3)]
    drivers = names[0] + (names[1 + luck.integer(len(names) - 1)] if luck.chance(0.6) else "")
    slow = names[luck.integer(len(names))] if luck.chance(0.3) else ""
    return spec, tuple(
        PipelinePart(name, drives=name in drivers, slower=3.0 if name == slow else 1.0)
        for name in names
    )


def build(
    seed: int,
    spec: PipelineSpec | None = None,
    parts: Sequence[PipelinePart] = (),
    *,
    model: NetworkModel | None = None,
    site: type[LocalSite] = LocalSite,
) -> LocalSwarm:
    """A world with its sites started one after another, its checker watching."""
    if spec is None:
        spec, parts = spec_of(seed)
    world = World(seed, model=model, strict_addresses=True)
    truth = truth_of(LocalTruth, world, parts)
    rounds = LocalRoundsAreRight(truth, spec.toy, spec)

    def make(part: PipelinePart, ctx: Context) -> LocalSite:
        return site(ctx, spec, part, truth)

    start_sites(world, seed, spec.founder_site, parts, make, within_s=4.0)
    world.watch(rounds)
    return LocalSwarm(world, truth, rounds, spec)


def plan_of(seed: int) -> Plan:
    """What may go wrong in the swarm of a seed."""
    _, parts = spec_of(seed)
    return Plan(
        tuple(part.name for part in parts),
        start_s=TROUBLE_FROM_S,
        end_s=TROUBLE_UNTIL_S,
        count=(2, 10),
        kinds=PLAIN_KINDS,
        triggers=TRIGGERS,
        vanish_max=0,
        more=(*MORE_KINDS, "diskfull"),
    )


def run_local(seed: int, schedule: Sequence[Fault] | None = None, *checkers: Checker) -> Outcome:
    """One schedule from beginning to end; the schedule is that of the seed unless given."""
    faults = list(schedule) if schedule is not None else generate(seed, plan_of(seed))
    return run_built(build(seed), seed, faults, *checkers)


def run_built(swarm: LocalSwarm, seed: int, faults: Sequence[Fault], *checkers: Checker) -> Outcome:
    """A schedule on a world that was built."""
    outcome = Outcome(seed, list(faults))

    def trouble() -> None:
        swarm.world.run(HEAL_AT_S)
        outcome.recovery_s = settle_within(
            swarm.world, LIVENESS_S, _Recovered(swarm), lambda: describe(swarm)
        )

    play(swarm.world, outcome, checkers, trouble)
    outcome.committed = sum(swarm.committed().values())
    outcome.aborted = swarm.rounds.aborted
    return outcome


class _Recovered:
    """Every stage has had rounds since the healing, and whoever serves one is in step (PL13)."""

    def __init__(self, swarm: LocalSwarm) -> None:
        self.swarm = swarm
        known = swarm.committed()
        self.targets = {name: rounds + ROUNDS_AFTER_HEALING for name, rounds in known.items()}

    def __call__(self) -> bool:
        done = self.swarm.committed()
        if any(done[name] < target for name, target in self.targets.items()):
            return False
        for host in self.swarm.world.hosts.values():
            site = self.swarm.site(host.name)
            if site is None or not site.core.joiner.is_member:
                return False
            for stage in site.core.ledger.pipeline.assigned.get(host.peer, ()):
                name = stage_channel(stage)
                state = site.plane.states.get(name)
                if state is None or state.round < self.targets[name]:
                    return False
        return True


def describe(swarm: LocalSwarm) -> str:
    """Where every site stands, for the report of a run that does not finish."""
    lines = [f"committed {swarm.committed()}"]
    for name, host in swarm.world.hosts.items():
        site = swarm.site(name)
        if site is None:
            lines.append(f"{name}: vanished={host.vanished}")
            continue
        core, stages = site.core, range(swarm.spec.toy.stages + 1)
        states = {s: site.plane.states.get(stage_channel(s)) for s in stages}
        lines.append(
            f"{name}: index={core.ledger.index} member={core.joiner.is_member} "
            f"leads={core.leadership.leading} trainer={site.computes} "
            f"assigned={core.ledger.pipeline.assigned.get(host.peer)} "
            f"rounds={ {s: known.round for s, known in states.items() if known is not None} } "
            f"log={ {s: core.pipeline.version(s) for s in stages} } "
            f"open={[c.name for c in core.ledger.train_channels() if c.open is not None]} "
            f"lost={core.ledger.pipeline.lost()} "
            f"drives={core.pipeline.driver.figures() if core.pipeline.driver.active else '-'} "
            f"trained={ {s: (t.round, t.steps) for s, t in site.trained.items()} }"
        )
    return "\n  ".join(["", *lines])
