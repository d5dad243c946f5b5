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
            return [mutants(60, names, ["x", "y", "z"]), mutants(40, [], ["v", "w"])]
        return [report("rounds", fired // 2, violations=violations), report("rounds", fired // 2)]

    monkeypatch.setattr(nightly, "shards", shards)
    file = tmp_path / "night.json"
    flags = ["--kind", "rounds", "--schedules", "400", "--traces", "0", "--output", str(file)]
    assert nightly.main(flags) == status
    written = json.loads(file.read_text())
    assert [part["kind"] for part in written] == ["rounds", "mutants"]
    assert written[0]["ran"][0]["seeds"] == [0, 399]
    assert all(part["good"] for part in written) == (status == 0)
    printed = capsys.readouterr().out
    assert f"rounds: schedules=400 violations={violations}" in printed
    assert f"mutants: killed={100 - survivors}/100 by unit tests alone=5" in printed
    assert "survivor: log: number 0" in printed and "fault:crash" in printed
    assert f"log: {100 - survivors} of 100" in printed and "pin moved: v" in printed


def mutants(total: int, survivors: list[str], units: list[str]) -> dict[str, Any]:
    return {
        "total": total,
        "from_specs": total // 2,
        "survivors": survivors,
        "units": units,
        "moved": units[:1],
        "areas": {"log": total},
        "killed_by_area": {"log": total - len(survivors)},
    }


def test_pieces_of_a_night_are_judged_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A point that is rare in one piece may fire often enough in all of them."""
    files = [tmp_path / f"{n}.json" for n in range(3)]
    for n, fired in enumerate((5, 0)):
        ran = [{"commit": f"c{n}", "seeds": [200 * n, 200 * n + 199]}]
        files[n].write_text(json.dumps([{**report("rounds", fired), "ran": ran, "good": n == 0}]))
    scores = [{"kind": "mutants", **mutants(20, [], []), "killed": 20, "commit": "c1"}]
    files[2].write_text(json.dumps([{**part, "good": True} for part in scores]))
    out = tmp_path / "night.json"
    assert nightly.main(["--sum", *map(str, files), "--output", str(out)]) == 0
    rounds, planted = json.loads(out.read_text())
    assert (rounds["schedules"], rounds["fired"], rounds["good"]) == (400, {"fault:crash": 5}, True)
    assert [item["commit"] for item in rounds["ran"]] == ["c0", "c1"]
    assert planted["killed"] == 20
    printed = capsys.readouterr().out
    assert "rounds: schedules=400 violations=0" in printed and "killed=20/20" in printed
    files[1].write_text(json.dumps([{**report("rounds", 0, violations=1), "good": False}]))
    assert nightly.main(["--sum", *map(str, files)]) == 1


@pytest.mark.parametrize("differs", [False, True])
def test_traces_are_compared_under_each_hash_seed(
    differs: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shards(module: str, *_: object, hash_seed: str) -> list[dict[str, Any]]:
        odd = "b" if differs and hash_seed == "2" else "a"
        return [{"traces": {"0": "a", "2": "c"}}, {"traces": {"1": odd}}]

    monkeypatch.setattr(nightly, "shards", shards)
    monkeypatch.setattr(nightly, "SHARES", {"rounds": 1.0})
    flags = ["--schedules", "0", "--traces", "3", "--no-mutants"]
    assert nightly.main(flags) == (1 if differs else 0)
    printed = capsys.readouterr().out
    assert ("traces differ: rounds 1" in printed) == differs
    assert f"hash_seeds=3 agree={2 if differs else 3}/3" in printed
    assert nightly.compared("rounds", 4, 1, 0)[-1] == 3, "a seed without a trace does not agree"


def test_a_trace_is_told_by_processes_that_have_other_hash_seeds() -> None:
    flags = ("--kind", "small", "--schedules", "1", "--seed", "3", "--traces")
    (one,), (two,) = (nightly.shards(nightly.SIMULATOR, 1, *flags, hash_seed=h) for h in ("1", "2"))
    assert one["traces"] == two["traces"] and len(one["traces"]["3"]) == 64


def test_every_kind_has_its_share_of_a_night() -> None:
    assert set(nightly.SHARES) == set(KINDS)


def test_what_did_not_fire_is_not_counted_as_seen() -> None:
    made = Report()
    outcome = Outcome(1, [])
    outcome.seen.update({"fault:crash": 2, "flip:named": 0})
    made.add(outcome)
    assert dict(made.counters()) == {"fault:crash": 1}
