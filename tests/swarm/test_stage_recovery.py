"""All who serve a stage are killed at once: for good, for a moment, or until others went on."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarmtrain_peer.events import Record
from swarmtrain_protocols.pipeline.book import stage_channel
from tests.swarm.harness import poll_until
from tests.swarm.stage_crew import LONG_S, Crew, tiny

STAGES, BATCHES, STEPS = 4, 4, 80
KEYS = tiny(
    STAGES,
    BATCHES,
    STEPS,
    checkpoint_every_rounds=4,
)
ALWAYS = {"average-plain", "copy-left", "copy-right", "near-identity-0", "fresh"}


def lost_and_found(crew: Crew, stage: int) -> Record:
    """The stage is rebuilt with the candidate that scored best; returns the log's word on it."""
    lost = crew.witness.wait_event("stage_lost", timeout_s=LONG_S)
    back = crew.witness.wait_event("stage_recovered", timeout_s=LONG_S)
    assert (lost["stage"], back["stage"], back["step"]) == (stage, stage, lost["step"])
    scores = dict(zip(back["candidates"], back["losses"], strict=True))
    assert {*scores} >= ALWAYS, "both neighbours are there"
    assert all(0.0 < loss < 8.0 for loss in scores.values()), scores
    assert scores[back["choice"]] == min(scores.values())
    host = next(seat for seat in crew.seats if seat.id == back["host"])
    adopted = host.wait_event("stage_adopted")
    assert (adopted["stage"], adopted["step"]) == (stage, back["step"])
    assert adopted["choice"] == back["choice"]
    return back


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stage_whose_sites_are_gone_for_good_is_rebuilt(tmp_path: Path) -> None:
    """A copy of it that a worker of the next stage has kept is among what is tried."""
    with Crew(tmp_path) as crew:
        crew.open(6, replicas_min=2, **KEYS)
        crew.wait_step(20)
        stage, victims = crew.only_stage(2, 3)
        assert len(victims) > 1
        channel = stage_channel(stage)
        crew.copied(channel)
        crew.destroy(*victims)
        back = lost_and_found(crew, stage)
        assert back["host"] not in [seat.id for seat in victims]
        host = next(seat for seat in crew.seats if seat.id == back["host"])
        made = host.wait_event("candidates_built")
        assert made["inputs"]["snapshot"] in crew.copied(channel), made
        assert "snapshot" in back["candidates"]
        crew.witness.wait_event("run_ended", timeout_s=LONG_S)
        crew.check_steps(STEPS, BATCHES)
        assert crew.check_replicas({stage: back["step"]})[stage] > 10
        done = crew.witness.events("step_committed")
        assert done[-1]["loss"] < done[back["step"] - 1]["loss"] - 0.3
        assert len(crew.witness.events("stage_lost")) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_stages_beside_each_other_are_lost_at_once(tmp_path: Path) -> None:
    """Each is rebuilt from what is left; while one is missing the other is scored without it."""
    with Crew(tmp_path) as crew:
        crew.open(6, replicas_min=1, **KEYS)
        crew.wait_step(20)
        victims = {seat.name: seat for stage in (2, 3) for seat in crew.assigned(stage)}
        crew.destroy(*victims.values())
        for stage in (2, 3):
            crew.witness.wait_event(
                "stage_recovered", lambda r, stage=stage: r["stage"] == stage, timeout_s=LONG_S
            )
        crew.witness.wait_event("run_ended", timeout_s=LONG_S)
        crew.check_steps(STEPS, BATCHES)
        back = {r["stage"]: r for r in crew.witness.events("stage_recovered")}
        assert set(back) == {2, 3}
        for record in back.values():
            scores = dict(zip(record["candidates"], record["losses"], strict=True))
            assert scores[record["choice"]] == min(scores.values()) > 0.0, record
        crew.check_replicas({stage: record["step"] for stage, record in back.items()})


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sites_that_are_back_in_time_have_kept_their_stage(tmp_path: Path) -> None:
    with Crew(tmp_path) as crew:
        crew.open(6, replicas_min=2, **KEYS)
        crew.wait_step(20)
        stage, victims = crew.only_stage(2, 3)
        crew.destroy(*victims)
        crew.revive(*victims)
        crew.witness.wait_event("run_ended", timeout_s=LONG_S)
        assert not crew.witness.events("stage_lost")
        crew.check_steps(STEPS, BATCHES)
        assert crew.check_replicas()[stage] > 10


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_who_comes_back_after_others_went_on_trains_with_them(tmp_path: Path) -> None:
    """The only site of a stage returns with a state that the log has replaced: nobody takes it."""
    with Crew(tmp_path) as crew:
        crew.open(5, replicas_min=1, **KEYS)
        crew.wait_step(20)
        stage, victims = crew.only_stage(2, 3)
        assert len(victims) == 1
        crew.destroy(*victims)
        back = lost_and_found(crew, stage)
        seq = victims[0].last_seq
        crew.revive(*victims)
        victims[0].wait_event("state_applied", since_seq=seq, timeout_s=LONG_S)
        crew.witness.wait_event("run_ended", timeout_s=LONG_S)
        crew.check_steps(STEPS, BATCHES)
        crew.check_replicas({stage: back["step"]})


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stage_that_steps_by_itself_is_rebuilt(tmp_path: Path) -> None:
    """Mode ``diloco``: rounds of the others go on, and those of the new stage after them."""
    rounds = 12
    keys = {**KEYS, "pipeline_mode": "diloco", "inner_steps": 4, "max_rounds": rounds}
    with Crew(tmp_path) as crew:
        crew.open(6, replicas_min=1, total_steps=4 * rounds, **keys)
        crew.witness.wait_event("round_committed", lambda r: r["round"] >= 3, timeout_s=LONG_S)
        stage, victims = crew.only_stage(2, 3)
        crew.destroy(*victims)
        lost = crew.witness.wait_event("stage_lost", timeout_s=LONG_S)
        back = crew.witness.wait_event("stage_recovered", timeout_s=LONG_S)
        assert lost["stage"] == back["stage"] == stage
        scores = dict(zip(back["candidates"], back["losses"], strict=True))
        assert scores[back["choice"]] == min(scores.values()) > 0.0, scores
        crew.witness.wait_event("run_ended", timeout_s=LONG_S)
        for channel in (stage_channel(number) for number in range(STAGES + 1)):
            poll_until(
                lambda channel=channel: any(rounds in s.hashes(channel) for s in crew.seats),
                f"the last state of {channel}",
            )
            found: dict[int, set[str]] = {}
            for seat in crew.seats:
                for round_, hashes in seat.hashes(channel).items():
                    found.setdefault(round_, set()).update(hashes)
            last = [hashes for round_, hashes in found.items() if round_ > back["step"]]
            assert all(len(hashes) == 1 for hashes in last), channel
