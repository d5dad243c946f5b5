"""Whole swarms lose stages: all who had a state are gone for good, and steps go on without them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.messages.pipeline import HopRequest
from swarmtrain_protocols.node_events import LedgerChanged
from swarmtrain_protocols.pipeline.book import KEPT, stage_channel
from swarmtrain_protocols.pipeline.hops import stage_of
from swarmtrain_protocols.pipeline.rebuild import UNSCORED
from swarmtrain_protocols.testing.checks.base import Checker
from swarmtrain_protocols.testing.faults import Fault
from swarmtrain_protocols.testing.host import Host
from swarmtrain_protocols.testing.network import NetworkModel
from swarmtrain_protocols.testing.pipeline_site import PipelinePart
from swarmtrain_protocols.testing.pipeline_swarm import Pipeline, build, describe, make_spec
from swarmtrain_protocols.testing.toystage import Toy
from swarmtrain_protocols.testing.world import World

TOY = Toy(5, 3, 4)
WORKERS = "bcdefg"


class Entries(Checker):
    """Entries of some kinds that were accepted, as the steward saw them."""

    def __init__(self, *kinds: type) -> None:
        self.kinds = kinds
        self.found: list[e.EntryBody] = []

    def emitted(self, world: World, host: Host, event: object) -> None:
        if host.name == "a" and isinstance(event, LedgerChanged):
            self.found += [x for _, x, ok in event.entries if ok and isinstance(x, self.kinds)]


class NobodyHadIt(Checker):
    """PL16 in calm weather: a stage is called lost only if no site that runs has its state."""

    def emitted(self, world: World, host: Host, event: object) -> None:
        if host.name != "a" or not isinstance(event, LedgerChanged):
            return
        for _, body, accepted in event.entries:
            if not (accepted and isinstance(body, e.StageLost)) or "no holder" not in body.reason:
                continue
            for other in world.hosts.values():
                states = other.node.plane.states if other.alive else {}
                state = states.get(stage_channel(body.stage))
                if state is not None and state.round >= body.step:
                    world.violation("PL16", f"{other.name} has the state that is lost: {body}")


class LateRequests:
    """Backwards of the step in progress, to be said again when all is different."""

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        self.heard: list[tuple[PeerId, HopRequest]] = []
        for host in loss.world.hosts.values():
            host.node.receive = partial(self._receive, host.node.receive)

    def _receive(
        self, real: Callable[..., None], now: float, peer: PeerId, message: Message
    ) -> None:
        if isinstance(message, HopRequest) and message.kind == "backward":
            self.heard.append((peer, message))
        real(now, peer, message)

    def again(self, step: int) -> int:
        """Every worker of a hop gets what any worker of it got; how many requests those were."""
        loss, count = self._loss, 0
        for peer, request in dict.fromkeys(self.heard):
            stage = stage_of(request.id.hop, TOY.stages)
            for name in loss.serving(stage) if request.id.step == step else ():
                if loss.world.hosts[name].alive:
                    loss.world.hosts[name].receive(peer, request)
                    count += 1
        return count


class Loss:
    """Six workers on three stages under one steward, some steps old."""

    def __init__(self, seed: int = 5) -> None:
        parts = [PipelinePart("a", trains=False, holds_state=False, drives=True)]
        parts += [PipelinePart(name, votes=False) for name in WORKERS]
        self.swarm: Pipeline = build(seed, make_spec(seed, TOY), parts, model=NetworkModel())
        self.world = self.swarm.world
        self.log = Entries(e.StageLost, e.StageRecovered)
        self.world.watch(self.log, NobodyHadIt())
        self.until(15.0, lambda: self.steps >= 4)

    @property
    def steps(self) -> int:
        return len(self.swarm.steps.committed)

    def until(self, seconds: float, reached: Callable[[], bool]) -> None:
        done = self.world.run(self.world.now + seconds, reached)
        assert done, describe(self.swarm)

    def serving(self, stage: int) -> list[str]:
        names = self.swarm.truth.names
        return [names[k] for k in self.ledger().pipeline.serving(stage)]

    def copied(self, stage: int) -> bool:
        """Somebody who does not serve the stage offers a state of it."""
        others = [name for name in WORKERS if name not in self.serving(stage)]
        cores = [site.core for name in others if (site := self.swarm.site(name)) is not None]
        return any(core.catchup.snapshots.get(stage_channel(stage)) for core in cores)

    def kill(self, *names: str, restart_s: float | None = None) -> None:
        for name in names:
            self.world.crash(name, restart_s=restart_s)

    def ledger(self, name: str = "a") -> Ledger:
        site = self.swarm.site(name)
        assert site is not None
        return site.core.ledger

    @property
    def lost(self) -> list[e.StageLost]:
        return [x for x in self.log.found if isinstance(x, e.StageLost)]

    @property
    def recovered(self) -> list[e.StageRecovered]:
        return [x for x in self.log.found if isinstance(x, e.StageRecovered)]

    def goes_on(self, stages: int = 1, seconds: float = 90.0) -> None:
        """So many stages come back, and steps are committed with them."""
        self.until(seconds, lambda: len(self.recovered) >= stages)
        before = self.steps
        self.until(30.0, lambda: self.steps >= before + 4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_whose_workers_are_gone_comes_back_as_the_best_candidate(stage: int) -> None:
    loss = Loss(5 + stage)
    loss.until(15.0, lambda: loss.copied(stage))
    victims, before = loss.serving(stage), loss.steps
    loss.kill(*victims)
    loss.goes_on()
    (lost,), (back,) = loss.lost, loss.recovered
    assert (lost.stage, back.stage, back.host) == (stage, stage, lost.host)
    assert back.step >= before and KEPT not in back.candidates
    assert len(back.candidates) == len(back.losses) >= 4
    assert min(back.losses) > UNSCORED, "every candidate was scored"
    assert back.losses[back.choice] == min(back.losses)
    assert {"snapshot", "fresh"} <= set(back.candidates), "a buddy had a copy"
    assert len(back.inputs) >= 2
    assert loss.world.seen["pipeline:copy"] > 0
    state = loss.ledger().pipeline
    assert state.era == 1 and state.stages[stage].generation == 1 and not state.lost()


def test_the_ends_come_back_from_a_copy_or_fresh() -> None:
    loss = Loss()
    loss.kill(*loss.serving(0))
    loss.until(90.0, lambda: any(x.stage == 0 for x in loss.recovered))
    first = next(x for x in loss.recovered if x.stage == 0)
    assert set(first.candidates) <= {"snapshot", "near-identity-0", "near-identity-0.1", "fresh"}
    loss.goes_on(len({x.stage for x in loss.lost}))


def test_workers_that_come_back_in_time_bring_the_state_with_them() -> None:
    loss = Loss()
    victims, before = loss.serving(2), loss.steps
    loss.kill(*victims, restart_s=12.0)
    loss.until(60.0, lambda: loss.steps >= before + 4)
    assert loss.lost == [] and loss.recovered == []


def test_workers_that_come_back_during_the_rebuild_end_it_with_the_state_itself() -> None:
    loss = Loss()
    victims, before = loss.serving(2), loss.steps
    loss.kill(*victims, restart_s=31.0)
    loss.goes_on()
    (back,) = loss.recovered
    assert (back.candidates, back.losses) == ((KEPT,), (UNSCORED,)) and back.step >= before
    state = loss.ledger().pipeline.stages[2]
    assert (state.generation, state.recovered_step) == (1, -1), "its optimizer goes on as well"


def test_a_host_that_dies_in_the_middle_is_replaced() -> None:
    loss = Loss()
    victims = loss.serving(2)
    names = [name for name in WORKERS if name not in victims]
    loss.world.plan(
        [Fault(loss.world.now + 0.1, "aim-crash", x, "do:TryCandidate", 40.0) for x in names[:1]]
    )
    loss.kill(*victims)
    loss.goes_on(seconds=150.0)
    hosts = [x.host for x in loss.lost if x.stage == 2]
    back = next(x for x in loss.recovered if x.stage == 2)
    assert back.host == hosts[-1]


def test_two_neighbours_that_are_lost_together_come_back_one_after_the_other() -> None:
    loss = Loss()
    victims = dict.fromkeys([*loss.serving(2), *loss.serving(3)])
    loss.kill(*victims)
    loss.goes_on(2, seconds=150.0)
    assert {x.stage for x in loss.recovered} >= {2, 3}


def test_losing_a_stage_three_times_is_survived_three_times() -> None:
    loss = Loss()
    for count in range(1, 4):
        loss.kill(*loss.serving(2), restart_s=45.0)
        loss.goes_on(count, seconds=120.0)
        loss.world.run(loss.world.now + 50.0)
    assert loss.ledger().pipeline.stages[2].generation == 3


def late_messages(seed: int) -> int:
    """A stage is lost in the middle of a step and comes back; then the step's requests come again.

    Returns how many did.
    """
    loss = Loss(seed)
    late = LateRequests(loss)
    victims = loss.serving(2)

    def half_way() -> bool:
        now = loss.ledger().pipeline.step
        hops = [request.id.hop for _, request in late.heard if request.id.step == now]
        return hops.count(3) >= 2 and hops.count(1) >= 1

    loss.until(30.0, half_way)
    step = loss.ledger().pipeline.step
    loss.kill(*victims)
    loss.until(90.0, lambda: bool(loss.recovered))
    alive = [name for name in "a" + WORKERS if name not in victims]
    loss.until(5.0, lambda: all(not loss.ledger(name).pipeline.lost() for name in alive))
    assert loss.recovered[0].step == step, "the step begins anew"
    count = late.again(step)
    loss.goes_on()
    return count


def returned_after(seed: int) -> int:
    """All who had a stage come back with it when it has been rebuilt; how often that was."""
    loss = Loss(seed)
    loss.kill(*loss.serving(2), restart_s=60.0)
    loss.goes_on()
    loss.world.run(loss.world.now + 50.0)
    before = loss.steps
    loss.until(30.0, lambda: loss.steps >= before + 4)
    return len(loss.recovered)


def test_requests_of_before_the_loss_change_nothing_after_it() -> None:
    assert late_messages(5) >= 4


def test_who_comes_back_too_late_gives_up_its_state_for_the_rebuilt_one() -> None:
    assert returned_after(5) == 1
