"""Random swarms that lose whole stages, while all else that can go wrong goes wrong as well.

At random moments everybody who serves some stage dies at once, for good or for a while. Before,
in between and after, sites crash, pause and are cut off at random and at every phase of a rebuild.
When all is healed, steps must be committed again; checkers watch what the stages came back with.
"""

from __future__ import annotations

from collections.abc import Callable

from swarmtrain_protocols.testing.checks.base import settle_within
from swarmtrain_protocols.testing.draws import Stream
from swarmtrain_protocols.testing.faults import PLAIN_KINDS, Plan, generate
from swarmtrain_protocols.testing.network import NetworkModel
from swarmtrain_protocols.testing.pipeline_site import PipelinePart
from swarmtrain_protocols.testing.pipeline_swarm import (
    TRIGGERS,
    Pipeline,
    build,
    describe,
    make_spec,
)
from swarmtrain_protocols.testing.toystage import Toy

STEWARD, WORKERS = "a", "bcdefg"
VANISHED_MAX = 3
"""Of six workers: the others have room for all stages."""
STRIKES_S = (8.0, 50.0)
TROUBLE_S = (6.0, 60.0)
HEAL_AT_S = 65.0
LIVENESS_S = 400.0
"""Two hosts may die one after the other, and inputs that nobody has are waited for."""
STEPS_AFTER_HEALING = 2
REBUILD_TRIGGERS = (
    *("do:NeedCalibration", "do:BuildCandidates", "do:TryCandidate", "do:AdoptCandidate"),
    *("do:KeepCopy", "send:propose", "send:snapshots?", "send:snapshots"),
)


def lossy_swarm(seed: int) -> Pipeline:
    """A steward and six workers on one to three stages; every second swarm in calm weather."""
    luck = Stream(seed, "loss")
    toy = Toy(seed, 1 + luck.integer(3), 4)
    second = luck.chance(0.5)
    parts = [PipelinePart(STEWARD, trains=False, holds_state=False, drives=True)]
    parts += [PipelinePart(name, votes=False, drives=name == "b" and second) for name in WORKERS]
    model = None if luck.chance(0.5) else NetworkModel()
    return build(seed, make_spec(seed, toy), parts, model=model)


def run_losses(seed: int) -> Pipeline:
    """One such swarm from beginning to end.

    Raises:
        Violation: a checker's, or ``liveness``: no steps after healing.
    """
    swarm = lossy_swarm(seed)
    world, luck = swarm.world, Stream(seed, "strikes")
    plan = Plan(
        (STEWARD, *WORKERS),
        start_s=TROUBLE_S[0],
        end_s=TROUBLE_S[1],
        count=(2, 12),
        kinds=PLAIN_KINDS,
        triggers=(*TRIGGERS, *REBUILD_TRIGGERS),
        durations_s=(1.0, 8.0, 20.0, 45.0),
    )
    world.plan(generate(seed, plan))
    for _ in range(1 + luck.integer(3)):
        stage = luck.integer(swarm.spec.toy.stages + 1)
        world.at(luck.between(*STRIKES_S), None, _strike(swarm, luck, stage))
    world.run(HEAL_AT_S)
    target = len(swarm.steps.committed) + STEPS_AFTER_HEALING
    settle_within(
        world, LIVENESS_S, lambda: len(swarm.steps.committed) >= target, lambda: describe(swarm)
    )
    return swarm


def _strike(swarm: Pipeline, luck: Stream, stage: int) -> Callable[[], None]:
    """Everybody who serves ``stage``, as far as the steward knows, dies at once."""

    def strike() -> None:
        world, steward = swarm.world, swarm.site(STEWARD)
        if steward is None or steward.core.ledger.model is None:
            return
        gone = sum(host.vanished for host in world.hosts.values())
        for member in steward.core.ledger.pipeline.serving(stage):
            forever = gone < VANISHED_MAX and luck.chance(0.6)
            gone += forever
            restart_s = None if forever else luck.between(20.0, 60.0)
            world.crash(swarm.truth.names[member], restart_s=restart_s)

    return strike
