"""The smallest swarm that can lose somebody: three sites, each a steward, a holder and a trainer.

Its clean run lasts eight seconds, so that a fault can be tried at every moment of it (``sweep``).
"""

from __future__ import annotations

from collections.abc import Sequence

from swarmtrain_protocols.manifest import RunKeys, make_manifest
from swarmtrain_protocols.testing.checks.base import Checker
from swarmtrain_protocols.testing.draws import Stream
from swarmtrain_protocols.testing.faults import MORE_KINDS, PLAIN_KINDS, Fault, Plan, generate
from swarmtrain_protocols.testing.keyring import FakeKeyring
from swarmtrain_protocols.testing.network import NetworkModel
from swarmtrain_protocols.testing.site import SitePart, SwarmSpec
from swarmtrain_protocols.testing.swarm import AIMS, TRIGGERS, Outcome, assemble, run_built
from swarmtrain_protocols.tickets import Capability, sign_capability

NAMES = ("a", "b", "c")
START_S = 0.5
HEAL_AT_S = 8.0


def small_spec(seed: int) -> SwarmSpec:
    """Forty values in one channel, rounds of a second or two; the codec is the seed's."""
    codec = ("int8", "fp32", "bf16")[Stream(seed, "small").integer(3)]
    founder = FakeKeyring("founder")
    keys = RunKeys(codec_scatter=codec, codec_gather=codec, round_timeout_s=4.0, grace_s=1.0)
    manifest = make_manifest(keys, founder.peer_id, seed.to_bytes(16, "little"))
    capability = Capability(b"ticket-1", manifest.run_id, role="trainer", vote=True)
    return SwarmSpec(
        manifest=manifest,
        capability=sign_capability(founder, capability),
        founder_site="a",
        layout=(("train/0/0", 40),),
        chunk_values=16,
        phase_s=(0.5, 1.0),
        work_s=(0.001, 0.01),
    )


def small_plan() -> Plan:
    """What may go wrong there, for random schedules."""
    return Plan(
        NAMES,
        start_s=2.0,
        end_s=7.0,
        count=(1, 5),
        kinds=PLAIN_KINDS,
        triggers=TRIGGERS,
        more=(*MORE_KINDS, "diskfull", "rot", "flip"),
        aims=AIMS,
    )


def run_small(seed: int, schedule: Sequence[Fault] | None = None, *checkers: Checker) -> Outcome:
    """One schedule, in calm weather otherwise; that of the seed unless given."""
    faults = list(schedule) if schedule is not None else generate(seed, small_plan())
    parts = [SitePart(name) for name in NAMES]
    model = NetworkModel()
    swarm = assemble(seed, small_spec(seed), parts, model=model, within_s=START_S)
    return run_built(swarm, faults, *checkers, heal_at_s=HEAL_AT_S)
