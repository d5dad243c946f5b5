"""Which numbers a tracker gets: those that are numbers, and nobody's name."""

from __future__ import annotations

import math
from pathlib import Path

from swarmtrain.trackers.base import open_trackers, scalars_of_event, scalars_of_status

STATUS = {
    "run": "ab" * 32,
    "name": "tiny-lm",
    "members": 3,
    "connected": 2,
    "rounds_committed": 7,
    "listen": ["127.0.0.1:1"],
    "is_leader": True,
    "ended": None,
    "channels": {"train/0/0": {"round": 6}, "train/0/1": {"round": 7}},
    "trainer": {"attached": True, "step": 120, "compute_utilization": 0.97, "device": "cpu"},
    "data": {"epochs": 1.25, "shards": 8, "samples_counted": 500, "digest": "ff"},
    "scalars": {"accuracy": 0.5, "broken": math.nan},
}


def test_events_with_numbers() -> None:
    assert scalars_of_event({"name": "evaluated", "round": 5, "loss": 2.5}) == (
        5,
        {"loss/held_out": 2.5},
    )
    figures = {"name": "round_figures", "round": 5, "loss": 3.0, "compute_s": 1.5, "wait_s": None}
    assert scalars_of_event({**figures, "channel": "train/0/0", "send_s": math.inf}) == (
        5,
        {"loss/train": 3.0, "round/compute_s": 1.5},
    )
    assert scalars_of_event({"name": "step_committed", "round": None, "step": 9, "loss": 1.0}) == (
        9,
        {"loss/train": 1.0},
    )


def test_events_without() -> None:
    assert scalars_of_event({"name": "member_joined", "round": None, "peer": "ab"}) is None
    assert scalars_of_event({"name": "evaluated", "round": 5, "loss": None}) is None
    assert scalars_of_event({"name": "evaluated", "round": None, "loss": 2.0}) is None


def test_how_the_run_stands() -> None:
    step, values = scalars_of_status(STATUS)
    assert step == 7
    assert values["run/members"] == 3.0 and values["run/rounds_committed"] == 7.0
    assert values["data/epochs"] == 1.25 and values["user/accuracy"] == 0.5
    assert values["trainer/compute_utilization"] == 0.97
    assert not {"user/broken", "run/name", "data/digest", "trainer/device"} & set(values)
    assert scalars_of_status({}) == (0, {})


def test_only_what_was_asked_for_is_opened(tmp_path: Path) -> None:
    assert open_trackers("", "", tmp_path) == []
    both = open_trackers(str(tmp_path / "boards"), "swarms", tmp_path)
    assert [type(one).__name__ for one in both] == ["TensorBoardFiles", "WandbProject"]
