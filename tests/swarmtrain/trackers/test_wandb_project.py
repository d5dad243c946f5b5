"""Weights & Biases in offline mode: what its package writes is read back with its own schema."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from swarmtrain.trackers.wandb_project import WandbProject
from swarmtrain_protocols.errors import ConfigError
from tests.swarm.harness import poll_until

RUN = {"run": "ab" * 32, "name": "tiny-lm", "site": "cd" * 32, "site_name": "laptop"}


BLOCK, HEAD, FILE_HEAD = 32768, 7, 7


def records_of(data: bytes) -> Iterator[bytes]:
    """The records of a log in the format of LevelDB, behind the package's own head."""
    assert data[:4] in (b":W&B", b"")
    at, begun = FILE_HEAD, b""
    while at + HEAD <= len(data):
        if BLOCK - at % BLOCK < HEAD:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        begun += data[at + HEAD : at + HEAD + length]
        at += HEAD + length
        if kind in (1, 4):  # the whole record, or its last piece
            yield begun
            begun = b""


def read_back(file: Path) -> tuple[Any, list[dict[str, Any]], bool]:
    """The run and the rows in a file that `wandb sync` would send, and whether it is whole."""
    run, rows, whole = None, [], False
    for data in records_of(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            run = record.run
        elif record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
        whole = whole or record.WhichOneof("record_type") == "exit"
    return run, rows, whole


def test_what_is_reported_offline_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    tracker = WandbProject("swarms", tmp_path)
    tracker.begin(RUN)
    tracker.scalars(3, 100.5, {"loss/held_out": 2.5})
    tracker.scalars(4, 101.5, {"loss/held_out": 2.25, "run/members": 3.0})
    tracker.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    # A process of the package writes it, which may be behind.
    run, rows = poll_until(lambda: read_back(file) if read_back(file)[2] else None, "no end")[:2]
    assert (run.project, run.display_name, run.run_group) == ("swarms", "laptop", "ab" * 8)
    assert [(row["round"], row["loss/held_out"]) for row in rows] == [(3, 2.5), (4, 2.25)]
    assert rows[1]["run/members"] == 3.0


def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError) as caught:
        WandbProject("swarms", tmp_path)
    assert "swarmtrain[log]" in caught.value.todo


def test_what_keeps_it_from_starting_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = WandbProject("swarms", tmp_path)

    def refused(**unused: object) -> None:
        raise wandb.errors.UsageError("no API key")

    monkeypatch.setattr(wandb, "init", refused)
    with pytest.raises(ConfigError, match="no API key") as caught:
        tracker.begin(RUN)
    assert "WANDB_MODE=offline" in caught.value.todo
    tracker.close()
