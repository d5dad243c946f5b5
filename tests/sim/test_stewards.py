"""Whole swarms with five and seven stewards, under faults: the set grows as members come."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from swarmtrain_protocols.manifest import make_manifest
from swarmtrain_protocols.testing import swarm
from swarmtrain_protocols.testing.keyring import FakeKeyring
from swarmtrain_protocols.testing.site import SitePart, SwarmSpec
from swarmtrain_protocols.tickets import Capability, sign_capability

plain = swarm.spec_of


def larger(stewards: int, sites: int, seed: int) -> tuple[SwarmSpec, tuple[SitePart, ...]]:
    """The swarm of a seed with more sites and another run key."""
    spec, _ = plain(seed)
    founder = FakeKeyring("founder")
    keys = msgspec.structs.replace(spec.manifest.keys, stewards=stewards)
    manifest = make_manifest(keys, founder.peer_id, seed.to_bytes(16, "little"))
    grant = Capability(b"ticket-1", manifest.run_id, role="trainer", vote=True)
    parts = tuple(SitePart(name) for name in "abcdefgh"[:sites])
    changed = {"manifest": manifest, "capability": sign_capability(founder, grant)}
    return spec.__class__(**{**_fields(spec), **changed}), parts


def _fields(spec: SwarmSpec) -> dict[str, object]:
    return {name: getattr(spec, name) for name in spec.__dataclass_fields__}


@pytest.mark.parametrize(("stewards", "sites"), [(5, 6), (7, 7)])
def test_swarms_with_more_stewards_keep_every_promise(
    stewards: int, sites: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swarm, "spec_of", lambda seed: larger(stewards, sites, seed))
    sizes: Counter[int] = Counter()
    built = swarm.build

    def build(*args: object, **named: object) -> swarm.Swarm:
        made = built(*args, **named)  # type: ignore[arg-type]
        swarms.append(made)
        return made

    swarms: list[swarm.Swarm] = []
    monkeypatch.setattr(swarm, "build", build)
    for seed in range(4):
        found = swarm.run_swarm(seed)
        assert not found.violation, f"seed {seed}: {found.text}"
        assert found.committed >= 2
        nodes = [swarms[-1].site(part.name) for part in larger(stewards, sites, seed)[1]]
        sizes.update(len(node.core.ledger.voters) for node in nodes if node is not None)
    assert sizes[stewards] > 0, sizes
