"""The study of lost edge stages in small: both schedules, the neighbours that are copied."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from swarmtrain.training.data import Corpus

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SIZES = {"d_model": 16, "layers": 4, "heads": 2, "context": 8}


def test_a_small_run_compares_both_schedules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    edges = importlib.import_module("pipeline_edges")
    recovery = importlib.import_module("pipeline_recovery")
    monkeypatch.setattr(recovery, "TEST_CALLS", 2)
    monkeypatch.setattr(edges, "single_thread", lambda: None)
    text = np.frombuffer(b"for each in range(10): print(each)\n" * 400, np.uint8)
    monkeypatch.setattr(edges, "load_corpus", lambda name: Corpus(text[:5000], text[5000:]))
    target = tmp_path / "result.json"
    code = edges.main(["--steps", "6", "--seeds", "1", "--output", str(target)], SIZES)
    document = json.loads(target.read_text())
    worst = max(each["excess_nats"] for each in document["chosen"])
    assert code == (0 if worst <= 0.02 else 1)
    assert f"{worst:+.4f}" in capsys.readouterr().out.splitlines()[-1]
    runs = {(run["schedule"], run["way"]): run for run in document["runs"]}
    ways = ["none", "best", "best, no copy", "neighbour", "fresh"]
    assert list(runs) == [(schedule, way) for schedule in ("plain", "swapped") for way in ways]
    for (_, way), run in runs.items():
        events = run["failures"]
        assert [e["stage"] for e in events] == ([] if way == "none" else [1, 4])
        if way == "neighbour":
            assert [e["choice"] for e in events] == ["copy-right", "copy-left"]
        if way == "best, no copy":
            assert "snapshot" not in events[0]["calibration"]
            assert "average-plain" not in events[0]["calibration"]
    # The schedules train differently from the first step on.
    assert runs["plain", "none"]["loss_last"] != runs["swapped", "none"]["loss_last"]
    rows = {(row["schedule"], row["way"]): row for row in document["final"]}
    swapped, plain = rows["swapped", "none"], rows["plain", "none"]
    assert swapped["ratio"] == 1.0
    assert swapped["ratio_to_plain"] == pytest.approx(swapped["loss"] / plain["loss"])
