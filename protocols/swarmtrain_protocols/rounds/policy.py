"""What the leader of rounds goes by: run keys, and the patience that is not one of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from swarmtrain_protocols import limits
from swarmtrain_protocols.changes import changed_at, front
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.schedule import is_measured


@dataclass(frozen=True, slots=True)
class RoundPolicy:
    """Run keys that the leader goes by. Zero means: derived from what is measured."""

    scatter_codec: str = "int8"
    gather_codec: str = "int8"
    min_peers: int = 1
    start_peers: int = 1
    grace_s: float = 0.0
    round_timeout_s: float = 0.0
    max_rounds: int = 0
    max_base_age_rounds: int = 2
    measure_overlap: bool = False
    """The overlap mode is ``auto``: it follows from what contributors measure."""
    overlap: str = "auto"
    group_grace_s: float = 2.0
    expect_grace_s: float = 30.0
    """For group calls that say how many they expect."""
    lost_grace_s: float = 1.0
    chunk_values: int = limits.CHUNK_VALUES


def policy_of(keys: RunKeys, chunk_values: int = limits.CHUNK_VALUES) -> RoundPolicy:
    """The policy that a run's keys ask for."""
    return RoundPolicy(
        scatter_codec=keys.codec_scatter,
        gather_codec=keys.codec_gather,
        min_peers=keys.min_peers,
        start_peers=keys.start_peers,
        grace_s=keys.grace_s,
        round_timeout_s=keys.round_timeout_s,
        max_rounds=keys.max_rounds,
        max_base_age_rounds=keys.max_base_age_rounds,
        measure_overlap=is_measured(keys),
        overlap=keys.overlap,
        chunk_values=chunk_values,
    )


_IN_FLIGHT = ("min_peers", "grace_s", "round_timeout_s", "max_rounds")


def policy_at(policy: RoundPolicy, ledger: Ledger) -> RoundPolicy:
    """The policy for the next rounds: that of the manifest, with what was changed in flight."""
    if not ledger.changes:
        return policy
    changed = changed_at(ledger, front(ledger))
    return replace(policy, **{key: changed[key] for key in _IN_FLIGHT if key in changed})
