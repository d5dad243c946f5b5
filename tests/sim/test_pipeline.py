"""Whole pipelines under seeded trouble: every gradient once, everywhere alike, and steps go on."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from swarmtrain_protocols.pipeline.step_policy import StepPolicy
from swarmtrain_protocols.pipeline.worker import WorkerCore
from swarmtrain_protocols.testing.nightly import Report, explain, run_many
from swarmtrain_protocols.testing.pipeline_audit import (
    DRIVER_STATES,
    LEADER_STATES,
    WORKER_PHASES,
    Audit,
    run_audit,
)
from swarmtrain_protocols.testing.pipeline_swarm import LIVENESS_S, run_pipeline

ROOT = Path(__file__).resolve().parents[2]
SCHEDULES = max(18, int(os.environ.get("SWARMTRAIN_SIM_SEEDS", "0")) // 8)
CHUNKS = 3
LEASE_S = StepPolicy().lease_ttl_s
NOTICED_S = 0.4
"""Until a death is noticed, and drivers have told a new leader what they work at."""


@functools.cache
def chunk(index: int) -> Report:
    return run_many(range(index, SCHEDULES, CHUNKS), run=run_pipeline)


@pytest.mark.parametrize("index", range(CHUNKS))
def test_schedules_break_no_promise(index: int) -> None:
    report = chunk(index)
    assert report.schedules >= SCHEDULES // CHUNKS
    assert not report.failures, explain(report.failures[0], run=run_pipeline)
    assert report.recovery_s_max <= LIVENESS_S


def test_trouble_and_ways_out_occur() -> None:
    """A checker that never sees an undo, a retry or an aborted step has checked nothing."""
    seen: dict[str, int] = {}
    for index in range(CHUNKS):
        for names in chunk(index).seen:
            seen.update(names)
    wanted = [
        *("step:committed", "step:aborted", "pipeline:undo", "trainer:killed", "send:reopen"),
        *("event:HopDone:timeout", "event:HopDone:closing", "event:HopDone:not_ready"),
        *("event:HopDone:disconnected", "fault:crash", "net:lost", "net:doubled"),
    ]
    assert [name for name in wanted if name not in seen] == []
    assert sum(chunk(index).committed for index in range(CHUNKS)) >= 2 * SCHEDULES


def check(audit: Audit, steps: int) -> None:
    """Every step holds every micro-batch once, at every hop."""
    outcome = audit.outcome
    assert outcome.violation == "", outcome.text
    assert outcome.committed >= steps and audit.lost == 0, audit.summary()
    assert outcome.compared >= 5 * steps


def test_a_worker_killed_at_each_phase_in_turn_costs_no_gradient() -> None:
    """5 % of the replies are lost and 5 % of the requests come twice, and every third step a worker
    dies at the next phase of a step.
    """
    audit = run_audit(42, WORKER_PHASES, 3)
    check(audit, 42)
    assert len(audit.dealt) >= len(WORKER_PHASES) - 1, audit.dealt
    assert audit.outcome.seen["hop:lost"] >= 10 and audit.outcome.seen["hop:doubled"] >= 10
    assert audit.outcome.seen["pipeline:undo"] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5, 9))
def test_two_hundred_steps_and_a_death_every_ten(seed: int) -> None:
    audit = run_audit(200, WORKER_PHASES, 10, seed=seed)
    check(audit, 200)
    assert sum(audit.dealt.values()) >= 18
    assert audit.outcome.seen["hop:lost"] >= 100 and audit.outcome.seen["hop:doubled"] >= 100


def test_with_duplicates_let_through_the_audit_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same audit as above: it bites."""
    defaults = {**WorkerCore.__init__.__kwdefaults__, "suppress_duplicates": False}
    monkeypatch.setattr(WorkerCore.__init__, "__kwdefaults__", defaults)
    audit = run_audit(42, WORKER_PHASES, 3)
    assert audit.outcome.violation == "PL1", audit.summary()


@pytest.mark.parametrize("seed", [5, 6])
def test_the_leader_killed_in_each_state_costs_a_lease_and_a_step(seed: int) -> None:
    """The lease runs from the last sign of the old leader, while a new one is elected.

    In seed 6 two followers once fed each other, and knew of no new leader for six seconds.
    """
    audit = run_audit(36, LEADER_STATES, 3, drivers="ab", lost=0.0, doubled=0.0, seed=seed)
    check(audit, 36)
    assert len(audit.dealt) >= len(LEADER_STATES) - 1, audit.dealt
    patience_s = NOTICED_S + LEASE_S + audit.step_s
    assert all(pause_s <= patience_s for _, pause_s in audit.pauses), audit.pauses


@pytest.mark.parametrize("seed", [5, 9])
def test_a_driver_killed_in_each_state_costs_a_lease_and_a_step(seed: int) -> None:
    """In seed 9 the driver also led, and two followers once fed each other."""
    audit = run_audit(30, DRIVER_STATES, 3, drivers="ab", lost=0.0, doubled=0.0, seed=seed)
    check(audit, 30)
    assert len(audit.dealt) >= len(DRIVER_STATES), audit.dealt
    patience_s = NOTICED_S + LEASE_S + audit.step_s
    alone = [item for item in audit.pauses if not item[0].startswith("worker")]
    assert all(pause_s <= patience_s for name, pause_s in alone if "again" not in name), alone


def test_without_trouble_nothing_is_redone_or_aborted() -> None:
    audit = run_audit(12, (), 1, lost=0.0, doubled=0.0)
    check(audit, 12)
    seen = audit.outcome.seen
    assert audit.outcome.aborted == seen["event:HopDone:timeout"] == seen["pipeline:undo"] == 0
    entries = seen["entry:StepClosed"] + seen["entry:StepOutcome"]
    assert entries == 2 * audit.outcome.committed, "two entries of the log a step"


def test_a_seed_replays_under_any_hash_seed() -> None:
    code = (
        "from swarmtrain_protocols.testing.pipeline_swarm import run_pipeline\n"
        "print(run_pipeline(2).trace)"
    )
    path = os.pathsep.join(str(ROOT / name) for name in (".", "peer", "protocols"))
    outputs = []
    for hash_seed in ("0", "1", "777"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] == outputs[2] and len(outputs[0]) > 64
