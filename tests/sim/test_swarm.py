"""Whole swarms under seeded trouble: always safe, live after healing, and never too quiet."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from swarmtrain_protocols.testing.faults import Fault
from swarmtrain_protocols.testing.nightly import SOMETIMES, Report, explain, main, run_many
from swarmtrain_protocols.testing.swarm import LIVENESS_S, run_swarm, spec_of

ROOT = Path(__file__).resolve().parents[2]
SCHEDULES = int(os.environ.get("SWARMTRAIN_SIM_SEEDS", "300"))
CHUNKS = 30


@functools.cache
def chunk(index: int) -> Report:
    return run_many(range(index, SCHEDULES, CHUNKS))


@pytest.mark.parametrize("index", range(CHUNKS))
def test_schedules_break_no_promise(index: int) -> None:
    report = chunk(index)
    assert report.schedules >= SCHEDULES // CHUNKS
    assert not report.failures, explain(report.failures[0])
    assert report.recovery_s_max <= LIVENESS_S


def test_every_kind_of_trouble_and_every_way_out_occurs() -> None:
    """ "Sometimes" points: a fault or a recovery that never happens is not tested."""
    total = Report()
    for index in range(CHUNKS):
        total.seen += chunk(index).seen
        total.committed += chunk(index).committed
    assert total.missing() == []
    assert total.committed >= 10 * SCHEDULES


def test_without_trouble_nothing_goes_wrong_and_hardly_anything_aborts() -> None:
    for seed in range(4):
        outcome = run_swarm(seed, [])
        assert outcome.violation == "", explain(outcome)
        assert outcome.committed >= 8
        assert not any(name.startswith("fault:") for name in outcome.seen)


def test_a_seed_replays_under_any_hash_seed() -> None:
    code = (
        "from swarmtrain_protocols.testing.swarm import run_swarm\n"
        "print([run_swarm(s).trace for s in (3, 11)])"
    )
    path = os.pathsep.join(str(ROOT / name) for name in (".", "peer", "protocols"))
    outputs = []
    for hash_seed in ("0", "1", "777"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(outputs[0]) > 2 * 64


def test_all_sites_restarting_at_once_lose_nothing_that_was_committed() -> None:
    """A power cut: every disk keeps what it has synced, and the run goes on from there."""
    for seed in range(6):
        power_cut = [Fault(12.0, "crash", name, "", 2.0) for name in "abcde"]
        outcome = run_swarm(seed, _existing(seed, power_cut))
        assert outcome.violation == "", explain(outcome)
        assert outcome.seen["fault:crash"] >= 3


def first_holder_lost(seed: int) -> list[Fault]:
    """One site is lost for good as it applies a result that the others were about to store.

    They die with it all in memory, between the last byte and the word that they hold it.
    """
    names = [part.name for part in spec_of(seed)[1]]
    first = names[seed % 3]
    others = [Fault(12.0, "aim-crash", n, "do:StoreResult", 2.0) for n in names if n != first]
    return [*others, Fault(12.0, "aim-vanish", first, "do:ApplyResult")]


def test_no_commit_rests_on_a_single_one_of_several_holders() -> None:
    lost = 0
    for seed in range(12):
        outcome = run_swarm(seed, first_holder_lost(seed))
        assert outcome.violation == "", explain(outcome)
        lost += outcome.seen["fault:aim-vanish"] - outcome.seen["excused"]
    assert lost >= 6


def _existing(seed: int, schedule: list[Fault]) -> list[Fault]:
    names = [part.name for part in spec_of(seed)[1]]
    return [fault for fault in schedule if fault.a in names]


def test_nightly_prints_counters_and_says_what_is_too_rare(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--schedules", "2", "--seed", "5", "--shard", "1/2"]) == 1
    printed = capsys.readouterr().out
    assert "schedules=1 violations=0" in printed
    assert "too rare: " in printed  # one schedule cannot contain everything
    assert len(SOMETIMES) > 40
