"""One alarm for a full disk, however many writers feel it; taken back when the last one wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarmtrain_peer.alarm import DiskAlarm
from swarmtrain_peer.events import EventLog
from swarmtrain_protocols.errors import CheckpointError, DiskFull


def alarm_in(folder: Path) -> tuple[DiskAlarm, EventLog]:
    events = EventLog(folder / "events.jsonl", "ab" * 32)
    return DiskAlarm(events, folder), events


def names(events: EventLog) -> list[str]:
    return [record["name"] for record in events.query()]


def test_it_is_raised_once_and_taken_back_once(tmp_path: Path) -> None:
    alarm, events = alarm_in(tmp_path)
    alarm.written("log")
    assert names(events) == []
    alarm.full("log", DiskFull("cannot write", "no space"))
    alarm.full("log", DiskFull("cannot write", "no space"))
    alarm.full("results", DiskFull("cannot write", "no space"))
    assert names(events) == ["disk_full"]
    assert alarm.failing == ("log", "results")
    (raised,) = events.query()
    assert (raised["what"], raised["reason"]) == ("log", "cannot write: no space")
    assert raised["free_bytes"] > 0
    alarm.written("log")
    alarm.written("log")
    assert names(events) == ["disk_full"]
    alarm.written("results")
    assert names(events) == ["disk_full", "disk_freed"]
    assert alarm.failing == ()


def test_work_is_attempted_and_other_trouble_passes_through(tmp_path: Path) -> None:
    alarm, events = alarm_in(tmp_path)

    def fails(error: Exception) -> None:
        raise error

    assert not alarm.attempt("position", lambda: fails(DiskFull("x")))
    assert alarm.attempt("position", lambda: None)
    assert names(events) == ["disk_full", "disk_freed"]
    with pytest.raises(CheckpointError):
        alarm.attempt("position", lambda: fails(CheckpointError("x")))
    assert names(events) == ["disk_full", "disk_freed"]


def test_what_cannot_fit_is_not_tried(tmp_path: Path) -> None:
    alarm, _ = alarm_in(tmp_path)
    alarm.need(1)
    with pytest.raises(DiskFull, match="are needed"):
        alarm.need(1 << 62)
