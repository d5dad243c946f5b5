"""The store when the power goes at any call to the system, and on full or failing disks."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from swarmtrain_peer.files import FileSystem
from swarmtrain_peer.store import Loaded, StateStore
from swarmtrain_protocols.errors import CheckpointError, DiskFull, LocalProtocolError
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.state import CanonicalState
from tests.peer.store_helpers import (
    CHANNEL,
    INT8,
    OUTER,
    a_state,
    advance,
    recover,
    replayed,
    result_of,
    roots,
)


class Crash(BaseException):
    """The power goes. Not an OSError: no cleanup code may run on it."""


class FaultyDisk(FileSystem):
    """Fails at call number ``at``; a crash loses what was not synced.

    ``lose``: unsynced bytes are gone (half of each file stays) and unsynced renames are undone.
    """

    def __init__(self, at: int, error: Callable[[], BaseException], lose: bool = False) -> None:
        self.calls, self.at, self.error, self.lose = 0, at, error, lose
        self.paths: dict[int, Path] = {}
        self.unsynced: set[Path] = set()
        self.renamed: list[tuple[Path, Path, Path | None]] = []
        self.dead = False

    def _call(self) -> None:
        if self.dead:
            raise self.error()
        self.calls += 1
        if self.calls == self.at:
            failure = self.error()
            self.dead = isinstance(failure, Crash)
            if self.dead and self.lose:
                self._lose()
            raise failure

    def _lose(self) -> None:
        for source, target, backup in reversed(self.renamed):
            os.replace(target, source)
            if backup is not None:
                os.replace(backup, target)
            if target in self.unsynced:
                self.unsynced.add(source)
        for path in self.unsynced:
            if path.is_file():
                os.truncate(path, path.stat().st_size // 2)

    def create(self, path: Path) -> int:
        self._call()
        descriptor = super().create(path)
        self.paths[descriptor] = path
        self.unsynced.add(path)
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        self._call()
        return super().write(descriptor, data[: max(1, len(data) // 2)])  # short writes are legal

    def sync(self, descriptor: int) -> None:
        self._call()
        self.unsynced.discard(self.paths[descriptor])

    def close(self, descriptor: int) -> None:
        super().close(descriptor)
        self._call()

    def rename(self, source: Path, target: Path) -> None:
        self._call()
        backup = None
        if target.exists():
            backup = target.parent.parent / f"{target.name}.backup"
            shutil.copy(target, backup)
        super().rename(source, target)
        self.renamed.append((source, target, backup))

    def sync_folder(self, path: Path) -> None:
        self._call()
        self.renamed = [item for item in self.renamed if item[1].parent != path]

    def make_folder(self, path: Path) -> None:
        self._call()
        super().make_folder(path)

    def remove(self, path: Path) -> None:
        self._call()
        super().remove(path)

    def remove_folder(self, path: Path) -> None:
        self._call()
        super().remove_folder(path)


def never() -> BaseException:
    return AssertionError("not reached")


def prepared(directory: Path) -> CanonicalState:
    """Two checkpoints (rounds 0 and 2) and results up to round 3."""
    store, state = StateStore(directory), a_state()
    store.save([state])
    for round_number in range(3):
        if round_number == 2:
            store.save([state])
        advance(store, state)
    return state


def work(fs: FileSystem, directory: Path, acknowledged: list[int]) -> None:
    """What a running peer does to its disk; ``acknowledged`` gets rounds that are promised."""
    store = StateStore(directory, fs=fs)
    state = replayed(store.load())
    acknowledged.append(state.round)
    advance(store, state)
    acknowledged.append(state.round)
    store.save([state])
    store.prune(2)
    advance(store, state)
    acknowledged.append(state.round)
    advance_again = result_of(4)  # stored twice: a replayed round after a restart
    store.store_result(CHANNEL, 4, Blob.of(advance_again).root, "int8", advance_again)
    store.save([state])
    store.prune(1)


def count_calls(tmp_path: Path) -> int:
    directory = tmp_path / "count"
    prepared(directory)
    disk = FaultyDisk(0, never)
    work(disk, directory, [])
    assert recover(directory).round == 5
    return disk.calls


@pytest.mark.parametrize("lose", [False, True], ids=["all written", "unsynced lost"])
def test_a_crash_at_any_call_loses_nothing_that_was_promised(tmp_path: Path, lose: bool) -> None:
    expected = roots(7)
    template = tmp_path / "template"
    prepared(template)
    calls = count_calls(tmp_path)
    assert calls > 60
    for at in range(1, calls + 1):
        directory = tmp_path / f"crash-{at}"
        shutil.copytree(template, directory)
        acknowledged = [3]
        disk = FaultyDisk(at, Crash, lose)
        with pytest.raises(Crash):
            work(disk, directory, acknowledged)
        loaded = StateStore(directory).load()
        assert not loaded.refused, at
        state = replayed(loaded)
        assert state.round >= acknowledged[-1], at
        assert state.root() == expected[state.round], at
        assert not list(directory.rglob("*.partial")), at
        round_number = state.round
        work(FaultyDisk(0, never), directory, [])  # and it goes on from there
        assert recover(directory).root() == expected[round_number + 2], at
        shutil.rmtree(directory)


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
