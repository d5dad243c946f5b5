"""The store when the power goes at any call to the system, and on full or failing disks."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from swarmtrain_peer.files import FileSystem
from swarmtrain_peer.store import Loaded, StateStore
from swarmtrain_protocols.errors import CheckpointError, DiskFull, LocalProtocolError
from swarmtrain_protocols.merkle import Blob
from tests.crash_points import ENDINGS, Ending, FaultyDisk, crash_points, prepared
from tests.peer.store_helpers import (
    CHANNEL,
    INT8,
    OUTER,
    a_state,
    recover,
    replayed,
    result_of,
    roots,
)


@pytest.mark.parametrize("ending", [ENDINGS[0], ENDINGS[7]], ids=lambda one: one.name)
def test_a_crash_at_any_call_loses_nothing_that_was_promised(
    tmp_path: Path, ending: Ending
) -> None:
    """``python -m tests.crash_points`` tries all endings: two thousand points and more."""
    found = list(crash_points(tmp_path, [ending]))
    assert len(found) > 60 and not [point for point in found if point.wrong]


def test_a_store_that_forgets_to_sync_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FaultyDisk, "sync", lambda self, descriptor: self._call())
    lost = next(one for one in ENDINGS if one.undo and one.kept == 0.0)
    assert any(point.wrong for point in crash_points(tmp_path, [lost]))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_keeps_what_was_there(tmp_path: Path, code: int) -> None:
    expected = roots(4)
    directory = tmp_path / "full"
    state = prepared(directory)
    chunks = result_of(3)
    before = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    seen = 0
    for action in ("save", "store"):
        at = 0
        while True:
            at += 1
            disk = FaultyDisk(0, lambda: OSError(code, os.strerror(code)))
            store = StateStore(directory, fs=disk)
            disk.calls, disk.at = 0, at
            try:
                if action == "save":
                    store.save([state])
                else:
                    store.store_result(CHANNEL, 3, Blob.of(chunks).root, "int8", chunks)
            except DiskFull as error:
                assert str(directory) in error.what
                seen += 1
            else:
                break
            assert not list(directory.rglob("*.partial"))
            loaded = StateStore(directory).load()
            assert not loaded.refused
            again = replayed(loaded)
            assert again.root() == expected[again.round]
            assert again.round >= 3
            for path, data in before.items():
                assert path.read_bytes() == data
        state = replayed(StateStore(directory).load())
    assert seen > 20


def test_other_errors_of_the_disk_name_the_file(tmp_path: Path) -> None:
    prepared(tmp_path)
    disk = FaultyDisk(0, lambda: OSError(errno.EIO, os.strerror(errno.EIO)))
    store = StateStore(tmp_path, fs=disk)
    disk.calls, disk.at = 0, 2
    with pytest.raises(CheckpointError, match="result"):
        store.store_result(CHANNEL, 3, Blob.of(result_of(3)).root, "int8", result_of(3))
    assert recover(tmp_path).round == 3


def test_a_state_that_moves_while_it_is_saved_is_not_saved(tmp_path: Path) -> None:
    state = a_state()

    class Mover(FileSystem):
        def sync(self, descriptor: int) -> None:
            super().sync(descriptor)
            state.apply(result_of(state.round), INT8, OUTER)

    store = StateStore(tmp_path, fs=Mover())
    with pytest.raises(LocalProtocolError, match="moved"):
        store.save([state])
    assert StateStore(tmp_path).load() == Loaded()
