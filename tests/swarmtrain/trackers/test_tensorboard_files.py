"""Event files that TensorBoard's own reader reads back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from swarmtrain.trackers.tensorboard_files import TensorBoardFiles
from swarmtrain_protocols.errors import ConfigError

RUN = {"run": "ab" * 32, "name": "tiny/../lm", "site": "cd" * 32, "site_name": "laptop"}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    tracker = TensorBoardFiles(tmp_path)
    tracker.begin(RUN)
    tracker.scalars(3, 100.5, {"loss/held_out": 2.5, "round/compute_s": 0.25})
    tracker.scalars(4, 101.5, {"loss/held_out": 2.25})
    tracker.close()
    (folder,) = tmp_path.iterdir()
    assert folder.name == "tiny_.._lm-cdcdcdcd"
    found = EventAccumulator(str(folder))
    found.Reload()
    assert sorted(found.Tags()["scalars"]) == ["loss/held_out", "round/compute_s"]
    losses = [(e.step, e.wall_time, e.value) for e in found.Scalars("loss/held_out")]
    assert losses == [(3, 100.5, 2.5), (4, 101.5, 2.25)]


def test_a_folder_that_cannot_be_and_a_package_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    tracker = TensorBoardFiles(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"log\.tensorboard"):
        tracker.begin(RUN)
    tracker.close()
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)
    with pytest.raises(ConfigError) as caught:
        TensorBoardFiles(tmp_path)
    assert "swarmtrain[log]" in caught.value.todo
