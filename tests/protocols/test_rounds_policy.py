"""The leader's policy is what the run's keys say."""

from __future__ import annotations

from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.rounds.policy import RoundPolicy, policy_of


def test_run_keys_become_the_policy() -> None:
    keys = RunKeys(
        codec_scatter="bf16",
        codec_gather="fp32",
        min_peers=2,
        start_peers=3,
        grace_s=4.0,
        round_timeout_s=5.0,
        max_rounds=6,
        max_base_age_rounds=7,
    )
    policy = policy_of(keys, 8)
    assert policy == RoundPolicy(
        scatter_codec="bf16",
        gather_codec="fp32",
        min_peers=2,
        start_peers=3,
        grace_s=4.0,
        round_timeout_s=5.0,
        max_rounds=6,
        max_base_age_rounds=7,
        measure_overlap=True,
        chunk_values=8,
    )


def test_every_field_that_has_a_run_key_follows_it() -> None:
    shared = set(RoundPolicy.__slots__) & set(RunKeys.__struct_fields__)
    assert shared == {
        "min_peers",
        "start_peers",
        "grace_s",
        "round_timeout_s",
        "max_rounds",
        "max_base_age_rounds",
        "overlap",
    }
    assert not policy_of(RunKeys(overlap="eager")).measure_overlap
    assert policy_of(RunKeys(overlap="eager")).overlap == "eager"
    assert not policy_of(RunKeys(delay=1)).measure_overlap
    default = policy_of(RunKeys())
    assert all(getattr(default, name) == getattr(RunKeys(), name) for name in shared)
