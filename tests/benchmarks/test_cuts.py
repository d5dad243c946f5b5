"""Decoders of the real transformers library, cut into stages: equal gradients, or a refusal."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_families_are_cut_with_equal_gradients_or_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    cuts = importlib.import_module("cuts")
    wanted = ("llama", "qwen2", "gpt2", "opt")
    monkeypatch.setattr(cuts, "CASES", [case for case in cuts.CASES if case[0] in wanted])
    monkeypatch.setattr(cuts, "FAMILIES_MIN", 3)
    target = tmp_path / "result.json"
    assert cuts.main(["--output", str(target)]) == 0
    rows = json.loads(target.read_text())["rows"]
    cut = {row["family"]: row["difference"] for row in rows if "difference" in row}
    assert list(cut) == ["llama", "qwen2", "gpt2"] and max(cut.values()) <= 1e-5
    refused = {row["family"]: row["refused"] for row in rows if "refused" in row}
    assert list(refused) == ["gpt2", "opt"] and all(refused.values())
    assert "dropout" in refused["gpt2"].lower()
