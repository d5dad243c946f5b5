"""One fault at every moment of a clean run, in strides; two faults around the votes of an election.

``python -m swarmtrain_protocols.testing.sweep`` goes through all of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from swarmtrain_protocols.testing import nightly
from swarmtrain_protocols.testing.faults import Fault
from swarmtrain_protocols.testing.schedules import from_json, to_json
from swarmtrain_protocols.testing.small import run_small
from swarmtrain_protocols.testing.swarm import Outcome
from swarmtrain_protocols.testing.sweep import (
    LEADER_LOST,
    VOTES,
    Swept,
    main,
    moments,
    pairs,
    singles,
    sweep,
)

SEED = 2


def test_moments_are_those_of_the_clean_run() -> None:
    found = moments(run_small, SEED, (), ("effect", "synced"))
    effects = [number for _, label, number in found if label == "effect"]
    assert effects == list(range(1, len(effects) + 1)) and len(effects) > 500
    assert found == sorted(found) and found[-1][0] <= 8.0
    assert found == moments(run_small, SEED, (), ("effect", "synced"))


def test_one_fault_at_moments_all_over_the_run_breaks_nothing() -> None:
    told: list[str] = []
    planned = singles(run_small, SEED, ("crash", "power"), "@actor", 1.5)
    swept = sweep(run_small, SEED, planned, stride=503, offset=17, tell=told.append)
    assert swept.violations == [], told
    assert swept.moments > 1000 and swept.runs >= 3


@pytest.mark.slow
def test_two_faults_around_votes_break_nothing() -> None:
    told: list[str] = []
    planned = pairs(run_small, SEED, LEADER_LOST, VOTES[:1], ("power",), 1.0, 3.0)
    swept = sweep(run_small, SEED, planned, stride=2, tell=told.append)
    assert swept.violations == [], told
    assert swept.runs >= 1


def test_a_sweep_tells_of_what_it_finds_with_a_schedule_that_replays_it() -> None:
    """A run that is wrong if anybody dies after the 700th effect."""

    def fragile(seed: int, faults: list[Fault] | None = None, *checkers: object) -> Outcome:
        outcome = Outcome(seed, list(faults or ()))
        if any(int(fault.b.rpartition("#")[2]) >= 700 for fault in outcome.schedule):
            outcome.violation = "fragile"
        return outcome

    planned = ([Fault(0.0, "aim-crash", "@actor", f"*/effect#{n}", 1.0)] for n in (1, 699, 700))
    told: list[str] = []
    swept = sweep(fragile, 4, planned, tell=told.append)
    assert (swept.runs, swept.violations) == (3, ["fragile"])
    text = told[0]
    found = from_json(text[text.index("{") : text.rindex("}") + 1])
    assert found.listed() == [Fault(0.0, "aim-crash", "@actor", "*/effect#700", 0.062)]


def test_the_command_counts_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "2", "--faults", "pause", "--stride", "2000", "--offset", "900"]) == 0
    assert "1 run, 0 violations" in capsys.readouterr().out
    assert Swept().runs == 0


def test_nightly_runs_the_schedule_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "one.json"
    path.write_text(to_json("small", 3, [Fault(4.0, "crash", "@leader", "", 1.0)]))
    assert nightly.main(["--schedule", str(path)]) == 0
    assert "small 3: no violation" in capsys.readouterr().out
