"""Swarms whose data are dealt in shards, under seeded trouble: each sample counts once.

Planted bugs: ``tests/mutants``, found by these schedules or by those of ``shards_kit``, which has
no network and thousands of orders of events.
"""

from __future__ import annotations

import functools

import pytest

from swarmtrain_protocols.testing.faults import Fault
from swarmtrain_protocols.testing.shard_swarm import run_data_swarm
from swarmtrain_protocols.testing.swarm import Outcome, spec_of

SEEDS = (0, 1, 2, 3, 4, 8)


@functools.cache
def outcome(seed: int) -> Outcome:
    return run_data_swarm(seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_each_sample_counts_once_through_any_trouble(seed: int) -> None:
    found = outcome(seed)
    assert found.violation == "", found.text
    assert found.seen["data:counted"] >= 260 or found.seen["excused"]


def test_trouble_occurred_and_claims_stay_small() -> None:
    seen = outcome(SEEDS[0]).seen.copy()
    for seed in SEEDS[1:]:
        seen += outcome(seed).seen
    for what in ("data:committed", "data:aborted", "data:excluded"):
        assert seen[what] >= 1, what
    assert max(outcome(seed).seen["data:bytes"] for seed in SEEDS) <= 5 * 16


def test_a_site_that_is_gone_for_good_leaves_nothing_unfinished() -> None:
    seed = next(s for s in range(20) if len(spec_of(s)[1]) >= 4)
    found = run_data_swarm(seed, [Fault(14.0, "vanish", "c")])
    assert found.violation == "" and not found.seen["excused"], found.text
    assert found.seen["entry:MemberLeft"] >= 1
