"""Real processes train stages that step by themselves, and a trainer that is killed comes back."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarmtrain_peer.spawn import stop_process
from tests.swarm.harness import WAIT_S, Swarm
from tests.swarm.test_stages import trainer

STAGES, ROUNDS, STEPS = 2, 4, 5
KEYS = {
    "seed": 7,
    "stages": STAGES,
    "pipeline_mode": "diloco",
    "inner_steps": STEPS,
    "model": {"layers": STAGES},
    "micro_batches": 4,
    "replicas_min": 2,
    "max_rounds": ROUNDS,
    "total_steps": ROUNDS * STEPS,
    "inner_warmup_steps": 2,
    "start_peers": 3,
    "grace_s": 20.0,
}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_stages_step_by_themselves_through_the_death_of_a_trainer(tmp_path: Path) -> None:
    """Every stage has its rounds, members of a stage agree after each, and the loss falls."""
    with Swarm(tmp_path) as swarm:
        founder = swarm.found(**KEYS)
        seats = [founder, *(swarm.enter(f"site-{n}", founder.ticket()) for n in range(1, 3))]
        processes = {seat.name: trainer(seat) for seat in seats}
        try:
            founder.wait_event("round_committed", timeout_s=3 * WAIT_S)
            victim = seats[1]
            processes[victim.name].kill()
            processes[victim.name].wait(WAIT_S)
            victim.wait_event("trainer_lost")
            processes[victim.name] = trainer(victim)
            founder.wait_event("run_ended", timeout_s=5 * WAIT_S)
            ended = founder.wait_event(
                "evaluated", lambda r: r["round"] == ROUNDS, timeout_s=2 * WAIT_S
            )
        finally:
            for process in processes.values():
                stop_process(process)
        first = min(founder.events("evaluated"), key=lambda r: r["round"])
        assert first["round"] < ROUNDS
        assert ended["loss"] < first["loss"] - 0.2
        assert not founder.events("step_committed")
        for stage in range(STAGES + 1):
            found: dict[int, set[str]] = {}
            holders = 0
            for seat in seats:
                mine = seat.hashes(f"train/{stage}/0")
                holders += bool(mine)
                for round_, hashes in mine.items():
                    found.setdefault(round_, set()).update(hashes)
            assert set(found) >= set(range(1, ROUNDS + 1)), f"stage {stage}: {sorted(found)}"
            assert max(found) == ROUNDS and holders >= 2
            assert all(len(hashes) == 1 for hashes in found.values()), found
