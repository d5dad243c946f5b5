"""A model that does not fit is refused before anything is allocated for it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from swarmtrain_peer import budget
from swarmtrain_peer.budget import RESERVE_BYTES, check_memory, free_bytes, needed_bytes
from swarmtrain_protocols.errors import NoDevice
from swarmtrain_protocols.manifest import RunKeys

FP32 = RunKeys(codec_scatter="fp32", codec_gather="fp32")


def test_what_is_needed_grows_with_values_and_codecs() -> None:
    assert needed_bytes(1_000_000, FP32) - RESERVE_BYTES == 36_000_000
    assert needed_bytes(1_000_000, RunKeys()) < needed_bytes(1_000_000, FP32)


def test_a_model_that_does_not_fit_is_refused_with_both_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(budget, "free_bytes", lambda: 1_000_000_000)
    check_memory(20_000_000, FP32)
    with pytest.raises(NoDevice, match=r"needs 3\.67 GB, 1\.00 GB are free") as refused:
        check_memory(100_000_000, FP32)
    assert refused.value.exit_code == 9


def test_the_limit_of_a_control_group_counts(tmp_path: Path) -> None:
    machine = psutil.virtual_memory().available
    assert abs(free_bytes(tmp_path) - machine) < 2e9
    for name, text in {
        "memory.max": "500000000\n",
        "memory.current": "400000000\n",
        "memory.stat": "anon 300000000\ninactive_file 50000000\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert free_bytes(tmp_path) == 150_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(tmp_path) > 150_000_000
