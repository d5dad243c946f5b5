"""A process that is stopped, its links up: how soon the others go on, and who is wrongly suspected.

Links notice nothing here before 12 s, attempts and grace times are longer still, so whatever goes
on sooner does so because somebody who waited asked (spec 02 §2.5).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.manifest import RunKeys, make_manifest
from swarmtrain_protocols.node_events import LedgerChanged
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.testing.checks.base import Checker
from swarmtrain_protocols.testing.draws import Stream
from swarmtrain_protocols.testing.faults import Fault
from swarmtrain_protocols.testing.host import Host
from swarmtrain_protocols.testing.keyring import FakeKeyring
from swarmtrain_protocols.testing.network import NetworkModel
from swarmtrain_protocols.testing.nightly import explain
from swarmtrain_protocols.testing.site import SitePart, SwarmSpec
from swarmtrain_protocols.testing.small import small_spec
from swarmtrain_protocols.testing.swarm import Outcome, assemble, run_built
from swarmtrain_protocols.testing.world import World
from swarmtrain_protocols.tickets import Capability, sign_capability

FROZEN_AT_S = 12.0
FROZEN_S = 11.0
ROUND_S = 6.0
"""Of a clean round with these phases and delays, at most."""


def spec_of(seed: int) -> SwarmSpec:
    founder = FakeKeyring("founder")
    keys = RunKeys(codec_scatter="fp32", codec_gather="fp32", round_timeout_s=60.0, grace_s=30.0)
    manifest = make_manifest(keys, founder.peer_id, seed.to_bytes(16, "little"))
    capability = Capability(b"ticket-1", manifest.run_id, role="trainer", vote=True)
    signed = sign_capability(founder, capability)
    return replace(small_spec(seed), manifest=manifest, capability=signed)


class Clock(Checker):
    """When rounds were committed, and who was suspected when."""

    def __init__(self) -> None:
        self.commits: dict[int, float] = {}
        self.silent: list[tuple[float, str, str]] = []
        self.lasted: dict[tuple[str, str], float] = {}

    def emitted(self, world: World, host: Host, event: object) -> None:
        if isinstance(event, LedgerChanged):
            for _, body, accepted in event.entries:
                if accepted and isinstance(body, e.RoundCommitted):
                    self.commits.setdefault(body.key.round, world.now)
        if isinstance(event, fx.Notice) and event.name == "peer_silent":
            found = [n for n, p in world.peers.items() if p.hex() == event.fields["peer"]]
            self.silent.append((world.now, host.name, found[0]))


def frozen(
    seed: int, delay_s: float, faults: list[Fault], jitter: float = 0.1
) -> tuple[Clock, Outcome]:
    """Four sites in calm weather, three of which go on while these faults last."""
    low, high = (1 - jitter) * delay_s + 0.0005, (1 + jitter) * delay_s + 0.001
    model = NetworkModel(latency_s=(low, high), detection_s=(12.0, 20.0))
    parts = [SitePart(name) for name in "abcd"]
    swarm = assemble(seed, spec_of(seed), parts, model=model, within_s=2.0)
    clock = Clock()
    outcome = run_built(swarm, faults, clock, heal_at_s=FROZEN_AT_S + FROZEN_S + 3.0)
    assert outcome.violation == "", explain(outcome)
    return clock, outcome


def longest_gap_s(clock: Clock) -> float:
    """Between two commits from just before the freeze to its end."""
    times = sorted(clock.commits.values())
    near = [t for t in times if t > FROZEN_AT_S - ROUND_S]
    return max(b - a for a, b in pairwise(near) if a < FROZEN_AT_S + FROZEN_S)


@pytest.mark.parametrize(("delay_s", "clean_s"), [(0.0, 1.2), (0.08, 2.3), (0.3, 6.0)])
@pytest.mark.parametrize(
    "trigger",
    ["do:BeginAttempt", "send:held", "do:ReducePart", "send:result#2", "send:holding"],
)
def test_a_frozen_member_costs_its_detection_and_an_attempt(
    trigger: str, delay_s: float, clean_s: float
) -> None:
    """Wherever in a round it freezes: it contributes, owns a part and holds the state."""
    fault = Fault(FROZEN_AT_S, "aim-pause", "d", trigger, FROZEN_S)
    clock, outcome = frozen(1, delay_s, [fault])
    assert outcome.seen["fault:aim-pause"] == 1
    assert {who for _, _, who in clock.silent} == {"d"}
    detection_s = 2.0 + 3 * 2 * delay_s
    assert longest_gap_s(clock) < detection_s + 1.0 + 1.7 * clean_s


@pytest.mark.parametrize(("delay_s", "clean_s"), [(0.0, 1.2), (0.08, 2.3), (0.3, 6.0)])
@pytest.mark.parametrize("trigger", ["append:RoundOpened", "append:RoundSet"])
def test_a_frozen_leader_costs_an_election_more(
    trigger: str, delay_s: float, clean_s: float
) -> None:
    """The next leader does not wait to suspect whose silence has made it leader."""
    fault = Fault(FROZEN_AT_S, "aim-pause", "@leader", trigger, FROZEN_S)
    clock, outcome = frozen(1, delay_s, [fault])
    assert outcome.seen["fault:aim-pause"] == 1
    assert [who for _, _, who in clock.silent][:1] == ["a"]
    assert longest_gap_s(clock) < 6.0 + 1.7 * clean_s


@pytest.mark.parametrize("delay_s", [0.0, 0.08, 0.3])
def test_jitter_and_stalls_of_a_second_are_no_freezing(delay_s: float) -> None:
    luck = Stream(5, "stalls")
    stalls = [
        Fault(8.0 + 1.9 * i, "pause", "bcd"[luck.integer(3)], "", luck.between(0.3, 1.0))
        for i in range(8)
    ]
    clock, outcome = frozen(2, delay_s, stalls, jitter=0.5)
    assert outcome.seen["fault:pause"] == 8
    assert clock.silent == [] and outcome.aborted == 0
