"""Real processes train one model in a pipeline, and a worker that is killed comes back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from swarmtrain_peer.spawn import start_process, stop_process
from tests.swarm.harness import WAIT_S, Seat, Swarm, poll_until
from tests.swarm.text import listen

STAGES, STEPS, BATCHES = 2, 24, 4
KEYS = {
    "seed": 7,
    "stages": STAGES,
    "model": {"layers": STAGES},
    "micro_batches": BATCHES,
    "replicas_min": 1,
    "max_rounds": STEPS,
    "start_peers": 3,
    "checkpoint_every_rounds": 4,
}


def trainer(seat: Seat) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-m", "swarmtrain.training.trainer", str(seat.site.folder)]
    output = seat.site.folder / "trainer.log"
    return start_process([*arguments, "--device", "cpu", "--wait-s", "60"], output, nice=5)


def check_product(seat: Seat, ids: set[str]) -> None:
    """What a member shows of the pipeline is what goes on, also at the others."""

    def told() -> Any:
        pipeline = seat.status()["pipeline"]
        stages = pipeline["coverage"]
        at_work = all(one["ready"] and one["busy"] and one["state"] == "ok" for one in stages)
        return pipeline if at_work and set(pipeline["drivers"]) == ids else None

    pipeline = poll_until(told, "every stage is served, busy and told of")
    assert (pipeline["mode"], pipeline["stages"], pipeline["trouble"]) == ("sync", STAGES, [])
    assert pipeline["micro_batches_per_s"] > 0
    peers = seat.call("peers")["peers"]
    served = {one["stage"] for peer in peers for one in peer["stages"]}
    assert served == set(range(STAGES + 1))
    steps = [one for one in seat.call("rounds")["rounds"] if one["outcome"] == "committed"]
    assert {one["channel"] for one in steps} == {"steps"}
    assert all(len(one["stages"]) == STAGES + 1 for one in steps)
    pairs = [sum(c["samples"] for c in one["contributors"]) for one in steps]
    assert set(pairs) == {float(BATCHES * (STAGES + 2))}, "every hop of every micro-batch once"


@pytest.mark.timeout(118)
def test_stages_train_through_the_death_of_a_trainer(tmp_path: Path) -> None:
    """Every step commits all micro-batches, replicas agree, and the loss falls."""
    with Swarm(tmp_path) as swarm:
        founder = swarm.found(**KEYS)
        seats = [founder, *(swarm.enter(f"site-{n}", founder.ticket()) for n in range(1, 3))]
        processes = {seat.name: trainer(seat) for seat in seats}
        try:
            founder.wait_event("step_committed", lambda r: r["step"] >= 2, timeout_s=3 * WAIT_S)
            text = listen(seats[2], b"def ", 6)
            assert min(text.versions) >= 2 and sorted(text.versions) == text.versions
            check_product(seats[2], {seat.id for seat in seats})
            victim = seats[1]
            processes[victim.name].kill()
            processes[victim.name].wait(WAIT_S)
            victim.wait_event("trainer_lost")
            processes[victim.name] = trainer(victim)
            founder.wait_event("run_ended", timeout_s=3 * WAIT_S)
        finally:
            for process in processes.values():
                stop_process(process)
        done = founder.events("step_committed")
        assert [record["step"] for record in done] == list(range(STEPS))
        assert all(record["micro_batches"] == BATCHES for record in done)
        assert done[-1]["loss"] < done[0]["loss"] - 0.5
        for stage in range(STAGES + 1):
            found: dict[int, set[str]] = {}
            for seat in seats:
                for round_, hashes in seat.hashes(f"train/{stage}/0").items():
                    found.setdefault(round_, set()).update(hashes)
            assert set(found) >= set(range(1, STEPS + 1)), f"stage {stage}: {sorted(found)}"
            assert all(len(hashes) == 1 for hashes in found.values()), found
