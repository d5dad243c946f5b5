"""Stages that step by themselves in small: exact bytes, exchanges one after the other, bars."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from swarmtrain.training.data import Corpus

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SIZES = {"d_model": 16, "layers": 4, "heads": 2, "context": 16}
STEPS = 12
MODES = "sync,diloco"


@pytest.fixture
def diloco(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("pipeline_diloco")
    monkeypatch.setattr(module, "single_thread", lambda: None)  # it is for the whole process
    text = np.frombuffer(b"for each in range(10): print(each)\n" * 200, np.uint8)
    monkeypatch.setattr(module, "load_corpus", lambda name: Corpus(text[:5000], text[5000:]))
    monkeypatch.setattr(module, "EVALUATION_BATCHES", 2)
    monkeypatch.setattr(module, "INNER_STEPS", 5)
    return module


def test_a_small_run_learns_and_sends_a_fifth(diloco: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    arguments = ["--steps", str(STEPS), "--seeds", "1", "--modes", MODES, "--output", str(target)]
    diloco.main(arguments, SIZES)
    document = json.loads(target.read_text())
    assert list(document["summary"]) == ["sync", "diloco"]
    runs = {run["mode"]: run for run in document["runs"]}
    assert all(run["loss_last"] < run["loss_first"] for run in runs.values())
    # The ends meet after 5 and 10 steps, stages 1 to 4 after 1 … 4, 6 … 9 and 11, 12.
    ends, block = (diloco.exchanged_nbytes(n, 2) for n in _values(diloco))
    sent = 2 * ends + (3 + 3 + 2 + 2) * block
    assert runs["diloco"]["stage_bytes_per_step"] * STEPS == sent
    assert runs["sync"]["stage_bytes_per_step"] == ends + 4 * block


def _values(diloco: ModuleType) -> tuple[int, int]:
    keys = {"preset": "decoder-tiny", "model": SIZES, "stages": 4, "seed": 1, "batch_size": 8}
    runtime = diloco.StageRuntime.build({**keys, "boundary_codec": "int8"}, ())
    return runtime.values[0], runtime.values[1]


def test_bars(diloco: ModuleType) -> None:
    assert diloco.passes({"loss_ratio": 1.10, "bytes_ratio": 0.11})
    assert not diloco.passes({"loss_ratio": 1.1001, "bytes_ratio": 0.11})
    assert not diloco.passes({"loss_ratio": 1.0, "bytes_ratio": 0.1101})
    with pytest.raises(SystemExit):
        diloco.main(["--modes", "sync,half"])
    runs = [
        {"mode": mode, "seed": seed, "loss_last": loss, "stage_bytes_per_step": nbytes}
        for mode, seed, loss, nbytes in (
            ("sync", 1, 2.0, 400.0),
            ("diloco", 1, 2.1, 40.0),
            ("sync", 2, 4.0, 400.0),
            ("diloco", 2, 4.0, 44.0),
        )
    ]
    row = diloco.summarised(runs)["diloco"]
    assert row["loss_ratio"] == pytest.approx(1.025)
    assert (row["loss_ratio_worst_seed"], row["bytes_ratio"]) == (1.05, 0.11)
