"""One hash, whatever happens to one member: paused through an election, or with a flipped bit."""

from __future__ import annotations

import numpy as np
import pytest

from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.testing.checks.base import Checker
from swarmtrain_protocols.testing.faults import Fault
from swarmtrain_protocols.testing.host import Host
from swarmtrain_protocols.testing.network import NetworkModel
from swarmtrain_protocols.testing.nightly import explain
from swarmtrain_protocols.testing.site import SitePart
from swarmtrain_protocols.testing.small import run_small, small_spec
from swarmtrain_protocols.testing.swarm import Swarm, assemble, run_built
from swarmtrain_protocols.testing.world import World

PAUSE_S = 6.0
AT_S = 3.0
FP32 = [seed for seed in range(40) if small_spec(seed).manifest.keys.codec_scatter == "fp32"]


class Watch(Checker):
    """Who led when the member was paused and when it went on, and who threw its state away."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.paused: tuple[int, int] | None = None
        """Term and round at that time."""
        self.resumed_term = 0
        self.resyncs: list[tuple[str, fx.Resync]] = []
        self.results: list[tuple[int, str, bytes]] = []
        """Committed bytes, since the pause: round, who applied them, and what they were."""

    def always(self, world: World, host: Host) -> None:
        member = world.hosts[self.name]
        if member.paused_until > world.now and self.paused is None and member.node is not None:
            core = member.node.core
            channel = core.ledger.channels["train/0/0"]
            self.paused = core.log.term, channel.round
        terms = [h.node.core.log.term for h in world.hosts.values() if h.node is not None]
        if member.paused_until > world.now:
            self.resumed_term = max(terms)

    def emitted(self, world: World, host: Host, event: object) -> None:
        if isinstance(event, fx.Resync):
            self.resyncs.append((host.name, event))
        elif isinstance(event, fx.StateAdvanced) and self.paused is not None:
            root = host.node.core.ledger.channels[event.channel].outcome(event.round - 1).root
            blob = host.node.provide(root)
            if blob is not None:  # else it came by a snapshot
                assert Blob.of(blob.chunks).root == root
                whole = b"".join(bytes(chunk) for chunk in blob.chunks)
                self.results.append((event.round - 1, host.name, whole))


def dumped_mean(swarm: Swarm, number: int) -> bytes:
    """What the contributions of a round give, as they were made: member by member in fp32."""
    key = swarm.rounds.keys["train/0/0", number]
    opened, chosen = swarm.rounds.opened[key], swarm.rounds.chosen[key]
    mean = np.zeros(opened.values, np.float32)
    for item in chosen.coefficients:
        made = swarm.truth.contributions[opened.contributors[item.index].root]
        given = np.frombuffer(b"".join(made.chunks), np.float32)
        mean = mean + np.float32(item.value) * given
    return mean.tobytes()


@pytest.mark.parametrize("seed", FP32[:2])
def test_paused_between_two_owners_and_resumed_after_an_election(seed: int) -> None:
    """A member has heard one owner; the leader dies; when it goes on, another term has begun."""
    parts = [SitePart(name) for name in "abcd"]
    swarm = assemble(seed, small_spec(seed), parts, model=NetworkModel(), within_s=0.5)
    watch = Watch("c")
    faults = [
        Fault(AT_S, "aim-pause", "c", "receive:result", PAUSE_S),
        Fault(AT_S, "aim-crash", "@leader", "c/receive:result", 1.0),
    ]
    outcome = run_built(swarm, faults, watch, heal_at_s=AT_S + 2 * PAUSE_S)
    assert outcome.violation == "", explain(outcome)
    assert outcome.seen["fault:aim-pause"] == outcome.seen["fault:aim-crash"] == 1
    assert watch.paused is not None and watch.resumed_term > watch.paused[0]
    hosts = swarm.world.hosts.values()
    states = {(s.round, s.root()) for h in hosts for s in h.node.plane.states.values()}
    assert len(states) == 1
    struck = watch.paused[1]
    assert {number for number, _, _ in watch.results} >= {struck, struck + 1}
    assert len({name for number, name, _ in watch.results if number == struck}) >= 3
    for number, _, data in watch.results:
        assert data == dumped_mean(swarm, number)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("kind", "known_by"), [("flip", "its hash"), ("misstep", "the pinned hash")]
)
def test_a_flipped_bit_is_named_and_mended_in_the_next_round(
    kind: str, known_by: str, seed: int
) -> None:
    """By the member itself, and by nobody else, though it may be the first at the next round."""
    name = "abc"[seed % 3]
    watch = Watch(name)
    outcome = run_small(seed, [Fault(4.0 + 0.3 * seed, kind, name)], watch)
    assert outcome.violation == "", explain(outcome, run=run_small)
    assert outcome.seen["spoilt:" + kind] == outcome.seen["flip:named"] == 1
    assert outcome.seen["flip:mended"] == 1
    assert [who for who, event in watch.resyncs] == [name]
    assert watch.resyncs[0][1].reason.startswith("own state differs from " + known_by)
