"""The study of lost stages in small: disjoint text, repeated steps by hand, bars at their edge."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from swarmtrain.training.data import Corpus

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SIZES = {"d_model": 16, "layers": 4, "heads": 2, "context": 8}


@pytest.fixture
def recovery(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("pipeline_recovery")
    monkeypatch.setattr(module, "single_thread", lambda: None)  # it is for the whole process
    text = np.frombuffer(b"for each in range(10): print(each)\n" * 400, np.uint8)
    monkeypatch.setattr(module, "load_corpus", lambda name: Corpus(text[:5000], text[5000:]))
    return module


def test_a_small_run_writes_every_way_to_go_on(
    recovery: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "TEST_CALLS", 2)
    monkeypatch.setattr(recovery, "ROLLBACK_STEPS", (5,))
    monkeypatch.setattr(recovery, "LOST_AT", (0.44, 0.8))
    target = tmp_path / "result.json"
    arguments = ["--steps", "16", "--seeds", "1", "--lost", "2,3", "--output", str(target)]
    assert recovery.main(arguments, SIZES) == 2  # so few steps make no stage matter
    document = json.loads(target.read_text())
    runs: dict[str, dict[str, Any]] = {run["way"]: run for run in document["runs"]}
    assert list(runs) == [
        "none",
        "best",
        "best, no copy",
        "checkfree",
        "fresh",
        "rollback-5",
    ]
    assert runs["none"]["steps"] == 16 and not runs["none"]["failures"]
    assert len(runs["none"]["bypass_nats"]) == 2
    # Losses at 7 and 13: 5 steps stay of 7, 10 of 11, and 3 more follow.
    assert runs["rollback-5"]["steps"] == 13
    assert runs["checkfree"]["steps"] == 16
    assert [e["choice"] for e in runs["checkfree"]["failures"]] == ["average-squared"] * 2
    assert [e["choice"] for e in runs["fresh"]["failures"]] == ["fresh"] * 2
    # A step is 64 forwards; a loss pays for 8 forwards of 9 candidates (1.125 steps) or of 8 (1).
    assert runs["best"]["steps"] == 7 + 4 + 2
    assert runs["best, no copy"]["steps"] == 7 + 5 + 2
    for way, with_copy in (("best", True), ("best, no copy", False)):
        for event in runs[way]["failures"]:
            scores = event["calibration"]
            assert scores[event["choice"]] == min(scores.values())
            assert ("snapshot" in scores) is with_copy
            assert scores.keys() == event["test"].keys()
            assert scores != event["test"]


def test_text_that_chooses_does_not_judge(recovery: ModuleType) -> None:
    windows = np.arange(72, dtype=np.int32)[:, None]
    chosen, judges = recovery.split([windows[:30], windows[30:]])
    assert [each.ravel().tolist() for each in chosen] == [[0, 9, 18, 27, 36, 45, 54, 63]]
    assert [len(each) for each in judges] == [8] * 8
    assert sorted(int(k) for each in (*chosen, *judges) for k in each[:, 0]) == list(range(72))


def test_rollback_pays_for_the_steps_it_repeats(recovery: ModuleType) -> None:
    # Losses at 44, 62 and 80: 40 stay of 44, 50 of 58, 60 of 68, and 20 more follow.
    assert recovery.steps_left_by_rollback(100, 10) == 80
    assert recovery.steps_left_by_rollback(100, 1) == 100


def test_bars(recovery: ModuleType) -> None:
    def verdict(bypass: list[float], excess: float, ratio: float) -> int:
        chosen = [{"excess_nats": -1.0}, {"excess_nats": excess}]
        final = {"best": {"ratio": ratio}, "best, no copy": {"ratio": 2.0}}
        found: int = recovery.verdict([[1.0, 1.0, 1.0], bypass], chosen, final)
        return found

    assert verdict([0.1, 0.1, 0.09], 0.02, 1.01) == 0
    assert verdict([0.1, 0.09, 0.09], 0.02, 1.01) == 2
    assert verdict([0.1, 0.1, 0.1], 0.021, 1.01) == 1
    assert verdict([0.1, 0.1, 0.1], 0.02, 1.011) == 1
