"""A leader that dies in the middle of a round of which it computes a part. Spec 08 §2.4, §2.5.

The next leader names deputies as soon as it leads. Whoever hears that before the log tells who
leads must not forget it: the round would stand until its deadline. The swarms of other tests have
short deadlines, which hides that; here they are those of a run that sets none.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from swarmtrain_protocols.manifest import make_manifest
from swarmtrain_protocols.testing.checks.base import Checker
from swarmtrain_protocols.testing.faults import Fault
from swarmtrain_protocols.testing.host import Host
from swarmtrain_protocols.testing.keyring import FakeKeyring
from swarmtrain_protocols.testing.network import NetworkModel
from swarmtrain_protocols.testing.swarm import Swarm, assemble, run_built, spec_of
from swarmtrain_protocols.testing.world import World
from swarmtrain_protocols.tickets import Capability, sign_capability

OUTAGE_UNTIL_S = 25.0
GAP_S_MAX = 8.0
"""An election (3 s at most), a second of grace, and the next phase of the slowest trainer."""


class Gaps(Checker):
    """The longest time from one committed round to the next after the trouble began."""

    def __init__(self, swarm: Swarm, since_s: float) -> None:
        self.longest_s, self._seen, self._last_s = 0.0, 0, since_s
        self._swarm, self._since_s = swarm, since_s

    def always(self, world: World, host: Host) -> None:
        count = len(self._swarm.rounds.committed)
        if world.now >= self._since_s and count > self._seen:
            self.longest_s = max(self.longest_s, world.now - self._last_s)
            self._seen, self._last_s = count, world.now


def unhurried(seed: int) -> Swarm:
    """The swarm of a seed in calm weather, with the deadlines of a run that sets none."""
    spec, parts = spec_of(seed)
    founder = FakeKeyring("founder")
    keys = msgspec.structs.replace(spec.manifest.keys, round_timeout_s=0.0)
    manifest = make_manifest(keys, founder.peer_id, seed.to_bytes(16, "little"))
    capability = Capability(b"ticket-1", manifest.run_id, role="trainer", vote=True)
    spec = replace(spec, manifest=manifest, capability=sign_capability(founder, capability))
    return assemble(seed, spec, parts, model=NetworkModel(), within_s=3.0)


@pytest.mark.parametrize(
    ("seed", "moment"),
    [(13, "fetched#2"), (37, "send:result#2"), (80, "entry:RoundSet#1"), (108, "fetched#1")],
)
def test_a_round_whose_leader_dies_ends_long_before_its_deadline(seed: int, moment: str) -> None:
    swarm = unhurried(seed)
    gaps = Gaps(swarm, 3.0)
    dies = Fault(5.0, "aim-crash", "@leader", moment, 60.0)
    outcome = run_built(swarm, [dies], gaps, heal_at_s=OUTAGE_UNTIL_S)
    assert not outcome.violation, outcome.text
    assert outcome.seen["fault:aim-crash"] == 1
    assert 0.0 < gaps.longest_s <= GAP_S_MAX, gaps.longest_s
