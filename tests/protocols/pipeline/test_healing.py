"""The cores of recovery composed in one node: what they see of the node, and what reaches them."""

from __future__ import annotations

import math

from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.messages.member import SnapshotOffer
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.pipeline.buddy import buddy_of
from swarmtrain_protocols.pipeline.healing import Healing
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.testing.network import NetworkModel
from swarmtrain_protocols.testing.pipeline_site import PipelinePart, PipelineSite
from swarmtrain_protocols.testing.pipeline_swarm import Pipeline, build, make_spec
from swarmtrain_protocols.testing.toystage import Toy

NAMES = "abcd"


def swarm(steps: int = 3) -> Pipeline:
    parts = [PipelinePart(name, drives=name == "a") for name in NAMES]
    made = build(3, make_spec(3, Toy(3, 2, 4)), parts, model=NetworkModel())
    assert made.world.run(30.0, lambda: len(made.steps.committed) >= steps)
    return made


def site(made: Pipeline, name: str) -> PipelineSite:
    found = made.site(name)
    assert found is not None
    return found


def healing(made: Pipeline, name: str) -> Healing:
    return site(made, name).core.pipeline.healing


def named(made: Pipeline, peer: bytes) -> str:
    return next(name for name in NAMES if made.world.hosts[name].peer == peer)


def test_the_host_sees_states_that_are_here_and_at_rest() -> None:
    made = swarm()
    ledger = site(made, "a").core.ledger
    holder = named(made, ledger.pipeline.serving(1)[0])
    other = next(n for n in NAMES if made.world.hosts[n].peer not in ledger.pipeline.serving(1))
    name, part = stage_channel(1), healing(made, holder).host
    state = site(made, holder).plane.states[name]
    assert part._held(name) == (state.round, state.root())
    assert not part._fetching(name)
    site(made, holder).core.catchup.tracks[name].busy = True
    assert part._held(name) is None, "a result is being applied to it"
    assert part._fetching(name)
    assert healing(made, other).host._held(name) is None


def test_whoever_leads_the_log_watches_the_stages_and_the_others_do_not() -> None:
    made = swarm()
    (leader,) = [n for n in NAMES if healing(made, n).leader.active]
    assert site(made, leader).core.log.is_leader
    watch = healing(made, leader).leader
    for stage in range(3):
        holders = sorted(watch.ledger.pipeline.serving(stage))
        front, applying = watch._holders(stage)
        assert sorted({*front, *applying}) == holders
        assert sorted(watch._able(stage)) == holders
    peers = {healing(made, n).host.leader for n in NAMES}
    assert peers == {made.world.hosts[leader].peer}


def test_a_buddy_has_a_copy_and_offers_it_like_a_state_of_its_own() -> None:
    made = swarm(8)
    ledger = site(made, "a").core.ledger
    buddies = [(s, buddy_of(ledger, s)) for s in range(3)]
    found = [(s, named(made, k)) for s, k in buddies if k is not None]
    assert found
    for stage, name in found:
        channel = stage_channel(stage)
        ((number, root),) = site(made, name).core.catchup.snapshots[channel]
        assert ledger.channels[channel].pinned_hash(number) == root
        assert site(made, name).provide(root) is not None
        assert channel not in site(made, name).plane.states, "it is no state of this node"


def test_an_offer_reaches_what_was_asked_for_and_time_ends_it() -> None:
    made = swarm()
    part, now = healing(made, "a"), made.world.hosts["a"].local_now()
    name, peer = stage_channel(1), made.world.hosts["b"].peer
    ended: list[tuple[float, fx.Snapshot | None]] = []
    part.collector.start(
        now, name, "test", [peer], lambda at, found: ended.append((at, found)), timeout_s=60.0
    )
    assert part.deadline() <= now + 2.0
    part.offered(now + 0.5, peer, SnapshotOffer(name, (), ()))
    assert ended == [(now + 0.5, None)]
    part.collector.start(
        now, name, "test", [peer], lambda at, found: ended.append((at, found)), timeout_s=60.0
    )
    part.tick(now + 2.0)
    assert ended[1:] == [(now + 2.0, None)]


def test_a_ledger_that_replaces_another_one_reaches_every_part() -> None:
    made = swarm()
    part = healing(made, "b")
    other = Ledger()
    part.adopt_ledger(other)
    for core in (part.collector, part.buddy, part.leader, part.host):
        assert core.ledger is other
    assert part.deadline() == math.inf, "a run without stages has nothing to look after"


def test_a_new_leader_is_who_is_asked() -> None:
    part = healing(swarm(1), "b")
    part.leader_changed(None)
    assert part.host.leader is None
    part.leader_changed(PeerId(bytes(32)))
    assert part.host.leader == bytes(32)
    part.activate(5.0, True)
    assert part.leader.active and part.leader.deadline() == 5.0
    part.activate(6.0, False)
    assert not part.leader.active
