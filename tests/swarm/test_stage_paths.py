"""Micro-batches that take the stages in another order, on real processes, through a death."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.swarm.stage_crew import LONG_S, Crew, tiny

STAGES, BATCHES, STEPS = 4, 4, 24
KEYS = tiny(
    STAGES,
    BATCHES,
    STEPS,
    total_steps=STEPS,
    inner_warmup_steps=2,
    replicas_min=2,
    swapped=True,
    skip_fraction=0.25,
)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_exchanged_stages_go_on_through_the_death_of_a_site(tmp_path: Path) -> None:
    """Both schedules' gradients arrive: no micro-batch is missing, and all replicas agree."""
    with Crew(tmp_path) as crew:
        crew.open(5, **KEYS)
        crew.wait_step(6)
        _, victims = crew.only_stage(1, 2, 3, 4)
        crew.destroy(victims[0])
        crew.witness.wait_event("run_ended", timeout_s=LONG_S)
        crew.check_steps(STEPS, BATCHES)
        compared = crew.check_replicas()
        assert all(compared[stage] >= 5 for stage in range(STAGES + 1)), compared
        done = crew.witness.events("step_committed")
        assert done[-1]["loss"] < done[0]["loss"] - 0.3
