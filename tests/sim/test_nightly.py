"""A night adds up its shards, prints what was seen, and fails when it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from swarmtrain_protocols.testing.nightly import KINDS, Report
from swarmtrain_protocols.testing.swarm import Outcome
from tests import nightly


def report(kind: str, fired: int, schedules: int = 200, violations: int = 0) -> dict[str, Any]:
    return {
        "kind": kind,
        "schedules": schedules,
        "violations": [[seed, "AR2"] for seed in range(violations)],
        "committed": 10,
        "aborted": 1,
        "simulated_s": 5.0,
        "recovery_s_max": float(fired),
        "fired": {"fault:crash": fired},
        "sometimes": ["fault:crash"],
    }


def test_shards_are_added() -> None:
    total = nightly.added([report("rounds", 2), report("rounds", 1, violations=2)])
    assert (total["schedules"], total["committed"], total["recovery_s_max"]) == (400, 20, 2.0)
    assert total["fired"] == {"fault:crash": 3} and len(total["violations"]) == 2


def test_a_point_is_rare_below_one_of_a_hundred_rounded_up() -> None:
    assert nightly.rare(report("rounds", 2, schedules=200)) == []
    assert nightly.rare(report("rounds", 2, schedules=201)) == ["fault:crash"]
    assert nightly.rare(report("rounds", 1, schedules=30)) == []
    assert nightly.rare(report("rounds", 0, schedules=1)) == ["fault:crash"]


@pytest.mark.parametrize(
    ("fired", "violations", "survivors", "status"),
    [(4, 0, 5, 0), (4, 1, 5, 1), (3, 0, 5, 1), (4, 0, 6, 1)],
)
def test_a_night_fails_for_a_violation_a_rare_point_or_too_many_survivors(
    fired: int,
    violations: int,
    survivors: int,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def shards(module: str, workers: int, *flags: str) -> list[dict[str, Any]]:
        if module == "tests.mutants":
            names = [f"log: number {n}" for n in range(survivors)]
            return [
                {"total": 60, "units": 3, "survivors": names},
                {"total": 40, "units": 2, "survivors": []},
            ]
        return [report("rounds", fired // 2, violations=violations), report("rounds", fired // 2)]

    monkeypatch.setattr(nightly, "shards", shards)
    file = tmp_path / "night.json"
    flags = ["--kind", "rounds", "--schedules", "400", "--output", str(file)]
    assert nightly.main(flags) == status
    written = json.loads(file.read_text())
    assert [part["kind"] for part in written] == ["rounds", "mutants"]
    assert all(part["good"] for part in written) == (status == 0)
    printed = capsys.readouterr().out
    assert f"rounds: schedules=400 violations={violations}" in printed
    assert f"mutants: killed={100 - survivors}/100 by unit tests alone=5" in printed
    assert "survivor: log: number 0" in printed and "fault:crash" in printed


def test_every_kind_has_its_share_of_a_night() -> None:
    assert set(nightly.SHARES) == set(KINDS)


def test_what_did_not_fire_is_not_counted_as_seen() -> None:
    made = Report()
    outcome = Outcome(1, [])
    outcome.seen.update({"fault:crash": 2, "flip:named": 0})
    made.add(outcome)
    assert dict(made.counters()) == {"fault:crash": 1}
