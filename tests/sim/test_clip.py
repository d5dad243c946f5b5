"""Loud members in the simulator: clipped alike by owners, deputies and everybody who recomputes.

``testing.checks.clip`` compares every set's norms and coefficients with those of the true
contributions, and ``ar2`` the committed bytes with the sum that these coefficients give.
"""

from __future__ import annotations

from collections import Counter

import pytest

from swarmtrain_protocols.rounds import clip
from swarmtrain_protocols.testing.swarm import run_swarm, spec_of
from tests.mutants.suites import owners_die

LOUD = [seed for seed in range(60) if spec_of(seed)[1][0].loud > 1.0]
QUIET = [seed for seed in range(60) if spec_of(seed)[1][0].loud == 1.0]


def test_a_loud_member_counts_in_part_wherever_its_parts_are_summed() -> None:
    """Owners die in each of these swarms; which of them have a deputy sum a loud part is chance."""
    seen: Counter[str] = Counter()
    for seed in LOUD[-6:-1]:
        outcome = run_swarm(seed, owners_die(seed))
        assert not outcome.violation, outcome.text
        counted, told = (outcome.seen[f"clip:{x}"] for x in ("counted", "loud"))
        assert told >= counted and outcome.seen["notice:contribution_clipped:"] >= counted
        seen["both"] += counted > 0 and outcome.seen["notice:fallback:deputy"] > 0
    assert seen["both"] >= 2


@pytest.mark.parametrize("seed", QUIET[:1])
def test_without_anybody_loud_a_run_is_the_same_event_by_event(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the factor taken out every message, sum and state has the same bits."""
    usual = run_swarm(seed, [])
    assert not usual.violation, usual.text
    assert usual.committed and not usual.seen["clip:loud"]
    monkeypatch.setattr(clip, "factor_of", lambda length, reference: 1.0)
    assert run_swarm(seed, []).trace == usual.trace
