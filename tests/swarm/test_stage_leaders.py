"""The site that founded a pipeline, leads it, drives it and computes in it is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.swarm.harness import poll_until
from tests.swarm.stage_crew import LONG_S, Crew, tiny

STAGES, BATCHES, STEPS = 3, 4, 60
KEYS = tiny(
    STAGES,
    BATCHES,
    STEPS,
    checkpoint_every_rounds=4,
    replicas_min=2,
)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_steps_go_on_without_the_site_that_led_drove_and_computed(tmp_path: Path) -> None:
    """No step is lost, none counts a micro-batch less, and no stage needs to be rebuilt."""
    with Crew(tmp_path) as crew:
        crew.open_equal(5, **KEYS)
        crew.wait_step(10)
        leader = crew.leader()
        served = [stage for stage in range(STAGES + 1) if leader in crew.assigned(stage)]
        assert leader is crew.seats[0] and served
        poll_until(lambda: all(len(crew.assigned(s)) > 1 for s in served), "no second worker")
        assert crew.last_step() < STEPS - 10, "too late to show anything"
        crew.destroy(leader)
        crew.witness.wait_event("run_ended", timeout_s=LONG_S)
        crew.check_steps(STEPS, BATCHES)
        crew.check_replicas()
        assert not crew.witness.events("stage_lost")
        led = [r["leader"] for r in crew.witness.events("leader_changed") if r["leader"]]
        assert led[0] == leader.id and led[-1] != leader.id
        done = crew.witness.events("step_committed")
        assert done[-1]["loss"] < done[0]["loss"] - 1.0
