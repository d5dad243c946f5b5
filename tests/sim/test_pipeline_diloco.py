"""Pipelines in mode ``diloco``: whole swarms of toy stages that step by themselves (spec 11 §2.8).

Checkers: ``testing/local_swarm.py`` and those of all rounds. ``run_local(seed)`` repeats a failure.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest

from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.pipeline.hops import stage_of
from swarmtrain_protocols.testing.faults import Fault
from swarmtrain_protocols.testing.local_site import LocalSite
from swarmtrain_protocols.testing.local_swarm import (
    LocalSwarm,
    build,
    describe,
    local_spec,
    run_built,
    run_local,
)
from swarmtrain_protocols.testing.network import NetworkModel
from swarmtrain_protocols.testing.pipeline_site import PipelinePart
from swarmtrain_protocols.testing.swarm import Outcome
from swarmtrain_protocols.testing.toystage import Toy

SEEDS = range(7)


def calm(
    seed: int, *, site: type[LocalSite] = LocalSite, names: str = "abcdef", **changes: Any
) -> LocalSwarm:
    """Three block stages, two members each, one driver, and a network that does its best."""
    spec = local_spec(seed, Toy(seed, 3, 2))
    spec = replace(spec, **{"hop_s": (0.004, 0.008), "room": 2, **changes})
    parts = tuple(PipelinePart(name, drives=name == "a") for name in names)
    return build(seed, spec, parts, model=NetworkModel(), site=site)


@functools.cache
def outcome_of(seed: int) -> Outcome:
    return run_local(seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_rounds_are_right_through_trouble_and_go_on(seed: int) -> None:
    outcome = outcome_of(seed)
    assert not outcome.violation, outcome.text
    assert outcome.committed > 0 and outcome.seen["local:step"] > 0


def test_the_same_seed_gives_the_same_trace() -> None:
    assert outcome_of(3).trace == run_local(3).trace


def test_in_calm_weather_exchanges_are_spread_and_nobody_is_excluded() -> None:
    swarm = calm(1)
    outcome = run_built(swarm, 1, [])
    assert not outcome.violation, outcome.text
    assert swarm.rounds.early > 0, "first phases of some stages are shorter"
    assert min(swarm.committed().values()) >= 3
    assert outcome.seen["decided:excluded"] == 0
    for key, opened in swarm.rounds.opened.items():
        stage = int(key.channel.split("/")[1])
        due = 4 if key.round else (4, 1, 2, 3)[stage]
        works = [swarm.truth.work[item.root] for item in opened.contributors]
        assert [made.steps for made in works] == [due] * len(works), key
    driver = swarm.site("a")
    assert driver is not None and driver.core.pipeline.driver.not_sticky == 0


def kept(swarm: LocalSwarm, name: str) -> bool:
    """Everything that a member has accumulated is in a contribution or on its way into one.

    Only a round that was committed without the member takes local steps along (11 §2.8, rule 6).
    """
    site = swarm.site(name)
    assert site is not None
    made = {
        pair for w in swarm.truth.work.values() if w.member == site.ctx.peer for pair in w.pairs
    }
    made |= {pair for mine in site.trained.values() for pair in mine.pairs}
    made |= {pair for pairs in site.sums.values() for pair in pairs}
    left = {stage_of(hop, swarm.spec.toy.stages) for hop, _ in set(site.seen) - made}
    return made <= set(site.seen) and all(went_on_without(swarm, site, s) for s in left)


def went_on_without(swarm: LocalSwarm, site: LocalSite, stage: int) -> bool:
    """A round of this stage was committed without a contribution of this site."""
    history = site.core.ledger.channels[stage_channel(stage)].history
    sets = [{member for member, *_ in item.contributors} for item in history]
    return any(site.ctx.peer not in members for members in sets)


def test_who_dies_takes_its_own_local_steps_and_no_others() -> None:
    """PL22: two trainers are killed in the middle of their phases."""
    swarm = calm(2)
    world = swarm.world
    world.run(8.0)
    lost = 0
    for name in "ce":
        victim = swarm.site(name)
        assert victim is not None
        lost += sum(len(mine.pairs) for mine in victim.trained.values())
        victim.kill_trainer(world.now)
        world.run(world.now + 4.0)
    outcome = run_built(swarm, 2, [])
    assert not outcome.violation, outcome.text
    assert lost > 0 and outcome.seen["trainer:killed"] == 2
    assert outcome.seen["decided:excluded"] == 0
    assert all(kept(swarm, name) for name in "abdf")
    for stage in range(4):
        assert swarm.committed()[stage_channel(stage)] >= 3


def test_a_member_that_is_killed_costs_the_others_nothing() -> None:
    swarm = calm(4)
    outcome = run_built(swarm, 4, [Fault(9.0, "crash", "d", "", 5.0)])
    assert not outcome.violation, outcome.text
    assert all(kept(swarm, name) for name in "abcef")


def test_a_stage_that_nobody_holds_comes_back_and_the_others_keep_theirs() -> None:
    spec = replace(local_spec(1, Toy(1, 3, 2), ends_replicas=3), hop_s=(0.004, 0.008))
    parts = [PipelinePart("a", trains=False, drives=True)]
    parts += [PipelinePart(name, votes=False) for name in "bcdefg"]
    swarm = build(1, spec, parts, model=NetworkModel())
    world, lost = swarm.world, 2
    world.run(10.0)
    steward = swarm.site("a")
    assert steward is not None
    before = swarm.committed()
    for member in steward.core.ledger.pipeline.serving(lost):
        world.crash(swarm.truth.names[member], restart_s=None)
    more = {name: rounds + 4 for name, rounds in before.items()}

    def on_they_go() -> bool:
        return all(swarm.committed()[name] >= rounds for name, rounds in more.items())

    assert world.run(world.now + 120.0, on_they_go), describe(swarm)
    assert world.seen["entry:StageLost"] == world.seen["entry:StageRecovered"] == 1
    assert steward.core.ledger.pipeline.stages[lost].generation == 1


class Careless(LocalSite):
    """Adds every backward that it is asked for."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.core.pipeline.worker._suppress = False


def test_a_worker_that_adds_twice_is_noticed() -> None:
    outcome = run_built(calm(5, site=Careless, doubled=0.3), 5, [])
    assert outcome.violation == "PL21" and "twice" in outcome.text
