"""A whole pipeline in the simulator: sites with real cores, toy stages, trouble from a seed.

``run_pipeline(seed)`` is one schedule, as ``swarm.run_swarm`` is for rounds: build the swarm of the
seed, let trouble happen, heal, and demand that steps go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from swarmtrain_protocols.manifest import RunKeys, make_manifest
from swarmtrain_protocols.testing.checks.base import Checker, settle_within
from swarmtrain_protocols.testing.checks.pl11 import BooksAgree
from swarmtrain_protocols.testing.checks.steps import StepsAreRight
from swarmtrain_protocols.testing.draws import Stream
from swarmtrain_protocols.testing.faults import MORE_KINDS, PLAIN_KINDS, Fault, Plan, generate
from swarmtrain_protocols.testing.keyring import FakeKeyring
from swarmtrain_protocols.testing.network import NetworkModel
from swarmtrain_protocols.testing.pipeline_site import PipelinePart, PipelineSite, PipelineSpec
from swarmtrain_protocols.testing.pipeline_truth import PipelineTruth
from swarmtrain_protocols.testing.swarm import Outcome, play, start_sites, truth_of
from swarmtrain_protocols.testing.toystage import Toy
from swarmtrain_protocols.testing.world import Context, World
from swarmtrain_protocols.tickets import Capability, sign_capability

TROUBLE_FROM_S = 6.0
TROUBLE_UNTIL_S = 22.0
HEAL_AT_S = 26.0
LIVENESS_S = 90.0
STEPS_AFTER_HEALING = 2
CHUNK_VALUES = 8

TRIGGERS = (
    *("persist", "synced", "fetch", "emit:LedgerChanged", "emit:StateAdvanced", "emit:HopDone"),
    *("send:hop?", "send:hop", "send:lease?", "send:lease", "send:mb-done"),
    *("send:close?", "send:close", "send:reopen", "send:plan", "send:step-ready"),
    *("send:held", "send:result", "send:holding"),
    *("do:Compute", "do:Undo", "do:HandOver", "do:ClearGradients", "do:NeedTokens"),
    *("do:BeginAttempt", "do:ReducePart", "do:StoreResult", "do:ApplyResult"),
)
AIMS = (
    *(("@leader", "append:StepClosed"), ("@leader", "append:StepOutcome")),
    *(("@actor", "*/entry:StepClosed#2"), ("@leader", "@member/send:step-ready#2")),
    *(("@steward", "persist:vote"), ("@actor", "*/send:lease#2"), ("@owner0", "send:result")),
)
"""Faults at a state: the leader as it closes a step, a driver as it gets its lease, …"""


@dataclass
class PipelineOutcome(Outcome):
    """``micro_batches``: in all committed steps. ``compared``: accumulators with have-sets."""

    micro_batches: int = 0
    compared: int = 0


@dataclass
class Pipeline:
    """A built world, what it knows, and its checkers."""

    world: World
    truth: PipelineTruth
    steps: StepsAreRight
    books: BooksAgree
    spec: PipelineSpec

    def site(self, name: str) -> PipelineSite | None:
        node = self.world.hosts[name].node
        return node if isinstance(node, PipelineSite) else None


def make_spec(seed: int, toy: Toy, **changes: Any) -> PipelineSpec:
    """A pipeline of toy stages; ``changes`` are run keys."""
    keys: dict[str, Any] = {
        "stages": toy.stages,
        "micro_batches": toy.micro_batches,
        "codec_scatter": "fp32",
        "codec_gather": "fp32",
        "inner_optimizer": "sgd",
        "inner_lr": 0.5,
        "inner_weight_decay": 0.0,
        "inner_warmup_steps": 0,
        "outer_lr": 0.7,
        "outer_momentum": 0.0,
        "replicas_min": 2,
        "ends_replicas": 2,
        "start_peers": 2,
        "close_fraction": 0.75,
    }
    founder = FakeKeyring("founder")
    manifest = make_manifest(
        RunKeys(**{**keys, **changes}), founder.peer_id, seed.to_bytes(16, "little")
    )
    capability = sign_capability(
        founder, Capability(b"ticket-1", manifest.run_id, role="trainer", vote=True)
    )
    return PipelineSpec(
        manifest=manifest,
        capability=capability,
        founder_site="a",
        layout=(),
        chunk_values=CHUNK_VALUES,
        phase_s=(1.0, 2.0),
        work_s=(0.001, 0.01),
        toy=toy,
    )


def spec_of(seed: int) -> tuple[PipelineSpec, tuple[PipelinePart, ...]]:
    """The swarm of a seed: one to three stages on four to six sites, one or two drivers."""
    luck = Stream(seed, "pipeline")

    def pick(*values: float) -> float:
        return values[luck.integer(len(values))]

    stages = 1 + luck.integer(3)
    toy = Toy(seed, stages, 4 + luck.integer(5))
    spec = make_spec(
        seed,
        toy,
        inner_clip=pick(0.0, 1.0, 1.0),
        codec_scatter=("fp32", "fp32", "bf16")[luck.integer(3)],
        codec_gather=("fp32", "int8")[luck.integer(2)],
    )
    spec = replace(
        spec,
        work_s=(0.001, pick(0.005, 0.1)),
        hop_s=(0.002, pick(0.01, 0.05)),
        lost=pick(0.0, 0.0, 0.05),
        doubled=pick(0.0, 0.0, 0.05),
        by_root=pick(0.0, 0.0, 0.3),
        trainer_life_s=pick(0.0, 0.0, 12.0),
        room=2 + luck.integer(2),
    )
    names = "abcdef"[: 4 + luck.integer(3)]
    drivers = names[0] + (names[1 + luck.integer(len(names) - 1)] if luck.chance(0.6) else "")
    slow = names[luck.integer(len(names))] if luck.chance(0.3) else ""
    parts = [
        PipelinePart(name, drives=name in drivers, slower=4.0 if name == slow else 1.0)
        for name in names
    ]
    if luck.chance(0.3):  # a seed: it leads, drives, and computes nothing
        parts[0] = replace(parts[0], trains=False, holds_state=False)
    return spec, tuple(parts)


def build(
    seed: int,
    spec: PipelineSpec | None = None,
    parts: Sequence[PipelinePart] = (),
    *,
    model: NetworkModel | None = None,
) -> Pipeline:
    """A world with its sites started one after another, its checkers watching."""
    if spec is None:
        spec, parts = spec_of(seed)
    world = World(seed, model=model, strict_addresses=True)
    truth = truth_of(PipelineTruth, world, parts)
    steps = StepsAreRight(truth, spec.toy, spec.manifest.keys, spec.chunk_values)
    books = BooksAgree(spec.toy, 2 * spec.toy.stages)

    def make(part: PipelinePart, ctx: Context) -> PipelineSite:
        return PipelineSite(ctx, spec, part, truth)

    start_sites(world, seed, spec.founder_site, parts, make, within_s=4.0)
    world.watch(steps, books)
    return Pipeline(world, truth, steps, books, spec)


def plan_of(seed: int) -> Plan:
    """What may go wrong in the swarm of a seed."""
    _, parts = spec_of(seed)
    return Plan(
        tuple(part.name for part in parts),
        start_s=TROUBLE_FROM_S,
        end_s=TROUBLE_UNTIL_S,
        count=(2, 12),
        kinds=PLAIN_KINDS,
        triggers=TRIGGERS,
        vanish_max=0,
        more=(*MORE_KINDS, "diskfull"),
        aims=AIMS,
    )


def run_pipeline(
    seed: int, schedule: Sequence[Fault] | None = None, *checkers: Checker
) -> PipelineOutcome:
    """One schedule from beginning to end; the schedule is that of the seed unless given."""
    faults = list(schedule) if schedule is not None else generate(seed, plan_of(seed))
    return run_built(build(seed), seed, faults, *checkers)


def run_built(
    swarm: Pipeline,
    seed: int,
    faults: Sequence[Fault],
    *checkers: Checker,
    heal_at_s: float = HEAL_AT_S,
    healthy: Callable[[], bool] | None = None,
) -> PipelineOutcome:
    """A schedule on a world that was built; trouble ends at a time, or when ``healthy`` says so."""
    outcome = PipelineOutcome(seed, list(faults))

    def trouble() -> None:
        swarm.world.run(heal_at_s, healthy)
        swarm.truth.calm = True
        outcome.recovery_s = settle_within(
            swarm.world, LIVENESS_S, _Recovered(swarm), lambda: describe(swarm)
        )

    play(swarm.world, outcome, checkers, trouble)
    outcome.committed = len(swarm.steps.committed)
    outcome.aborted = swarm.steps.aborted
    outcome.micro_batches = swarm.steps.micro_batches
    outcome.compared = swarm.books.compared
    return outcome


class _Recovered:
    """Steps were committed after healing, and whoever serves a stage is in step (PL13)."""

    def __init__(self, swarm: Pipeline) -> None:
        self.swarm = swarm
        self.target = len(swarm.steps.committed) + STEPS_AFTER_HEALING

    def __call__(self) -> bool:
        if len(self.swarm.steps.committed) < self.target:
            return False
        for host in self.swarm.world.hosts.values():
            if host.vanished:
                continue
            site = self.swarm.site(host.name)
            if site is None or not site.core.joiner.is_member:
                return False
            for stage in site.core.ledger.pipeline.assigned.get(host.peer, ()):
                state = site.plane.states.get(f"train/{stage}/0")
                if state is None or state.round < self.target:
                    return False
        return True


def describe(swarm: Pipeline) -> str:
    """Where every site stands, for the report of a run that does not finish."""
    lines = []
    for name, host in swarm.world.hosts.items():
        site = swarm.site(name)
        if site is None:
            lines.append(f"{name}: vanished={host.vanished}")
            continue
        core, state = site.core, site.core.ledger.pipeline
        names = swarm.truth.names
        rounds = {s: swarm_round(site, s) for s in range(swarm.spec.toy.stages + 1)}
        lines.append(
            f"{name}: index={core.ledger.index} leader={names.get(core.log.leader or b'', '-')} "
            f"member={core.joiner.is_member} links={''.join(names[p] for p in core.linked())} "
            f"step={state.step}.{state.attempt} era={state.era} closed={state.closed is not None} "
            f"assigned={ {names[m]: s for m, s in state.assigned.items()} } states={rounds} "
            f"drives={core.pipeline.driver.figures() if core.pipeline.driver.active else '-'} "
            f"have={[core.pipeline.worker.have(h) for h in range(swarm.spec.toy.stages + 2)]}"
        )
    return "\n  ".join(["", *lines])


def swarm_round(site: PipelineSite, stage: int) -> int:
    """The version of a stage at a site, -1: it is not here."""
    state = site.plane.states.get(f"train/{stage}/0")
    return state.round if state is not None else -1
