"""Schedules are data: from a seed, printed, read back; and every scenario can be made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos import schedule
from tests.chaos.scenarios import SCENARIOS, Scenario
from tests.chaos.special import SPECIAL

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=lambda one: one.name)
def test_a_scenario_has_the_same_faults_for_the_same_seed(scenario: Scenario) -> None:
    first, again, other = (scenario.schedule(300.0, seed) for seed in (3, 3, 4))
    assert first == again
    assert first and all(fault["kind"] in schedule.KINDS for fault in first)
    assert all(0.0 <= fault["at_s"] <= 300.0 for fault in first)
    assert scenario.make is None or first != other
    assert set(scenario.criteria) <= set(SPECIAL)
    least = 300.0 / scenario.period_s - 1 if scenario.make else 1
    assert len(first) >= least


def test_a_schedule_is_printed_and_read_back(tmp_path: Path) -> None:
    made = SCENARIOS["C1"].schedule(120.0, 1)
    path = tmp_path / "schedule.json"
    path.write_text(schedule.text(made))
    assert schedule.read(path) == made
    assert len(path.read_text().splitlines()) == len(made) + 2
    path.write_text(json.dumps([{"at_s": 1.0, "kind": "earthquake"}]))
    with pytest.raises(ValueError, match="no fault"):
        schedule.read(path)


def test_every_scenario_of_the_table_can_be_listed() -> None:
    command = [sys.executable, "-m", "tests.chaos", "--list"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(SCENARIOS)
    wanted = {f"C{n}" for n in range(1, 13)} | {"C14"}
    assert set(SCENARIOS) == wanted
