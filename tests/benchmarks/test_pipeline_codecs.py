"""Codecs between stages in small: bytes by hand, bars at their edge, a result that can be read."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from swarmtrain.training.data import Corpus

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
WIDTH, CONTEXT, BATCH = 64, 16, 8


@pytest.fixture
def codecs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("pipeline_codecs")
    monkeypatch.setattr(module, "single_thread", lambda: None)  # it is for the whole process
    text = np.frombuffer(b"for each in range(10): print(each)\n" * 200, np.uint8)
    monkeypatch.setattr(module, "load_corpus", lambda name: Corpus(text[:5000], text[5000:]))
    monkeypatch.setattr(module, "EVALUATION_BATCHES", 2)
    monkeypatch.setattr(module, "GRADIENT_BATCHES", 1)
    return module


def test_a_small_run_writes_losses_and_exact_bytes(codecs: ModuleType, tmp_path: Path) -> None:
    sizes = {"d_model": WIDTH, "layers": 4, "heads": 2, "context": CONTEXT}
    target = tmp_path / "result.json"
    code = codecs.main(["--steps", "2", "--seeds", "1", "--output", str(target)], sizes)
    document = json.loads(target.read_text())
    summary = document["summary"]
    assert list(summary) == ["fp32", "repeat", "int8", "fp8", "control"]
    assert code == (0 if all(codecs.passes(summary[name]) for name in ("int8", "fp8")) else 1)
    # Five activations and five gradients for each of two micro-batches.
    tokens = BATCH * CONTEXT
    sent = {run["codec"]: run["boundary_bytes_per_step"] for run in document["runs"]}
    assert sent["fp32"] == 2 * 10 * (16 + 4 * tokens * WIDTH)
    assert sent["int8"] == sent["fp8"] == 2 * 10 * (16 + tokens * (4 + WIDTH))
    losses = {run["codec"]: (run["loss_first"], run["loss_last"]) for run in document["runs"]}
    assert all(last < first for first, last in losses.values())
    assert losses["repeat"] != losses["fp32"] == pytest.approx(losses["repeat"], abs=0.1)
    equal = document["equal_weights"]
    assert 0 < equal["int8"]["gradient_error"] < equal["fp8"]["gradient_error"] < 0.1
    assert equal["fp8"]["gradient_error"] < equal["control"]["gradient_error"]
    assert equal["int8"]["loss_ratio"] == pytest.approx(1, abs=1e-3)
    assert equal["int8"]["loss_ratio"] != 1
    assert abs(losses["control"][0] - losses["fp32"][0]) > 1e-5


def test_bars_and_comparisons(codecs: ModuleType) -> None:
    assert codecs.passes({"loss_ratio": 1.005, "bytes_ratio": 0.27})
    assert not codecs.passes({"loss_ratio": 1.0051, "bytes_ratio": 0.27})
    assert not codecs.passes({"loss_ratio": 0.99, "bytes_ratio": 0.2701})
    with pytest.raises(SystemExit):
        codecs.main(["--codecs", "fp32,int8"])
    runs = [
        {"codec": codec, "seed": seed, "loss_last": loss, "boundary_bytes_per_step": nbytes}
        for codec, seed, loss, nbytes in (
            ("fp32", 1, 2.0, 400.0),
            ("int8", 1, 2.1, 100.0),
            ("fp32", 2, 4.0, 400.0),
            ("int8", 2, 3.8, 100.0),
        )
    ]
    found = codecs.summarised(runs)["int8"]
    assert found["loss_ratio"] == pytest.approx(1.0)
    assert found["loss_ratio_worst_seed"] == pytest.approx(1.05)
    assert found["bytes_ratio"] == 0.25
