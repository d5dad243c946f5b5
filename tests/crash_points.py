"""Crashes of a checkpoint store at every call to the system, and what the power leaves of each.

``python -m tests.crash_points``: a peer's disk work (results, checkpoints, pruning) is cut off at
each call in turn, every write being two, and of what was not synced there stays nothing, all, or a
part of every file, with renames undone or not. Each point must leave a checkpoint that loads, with
all that was promised before, and from which the work goes on. Prints how many points there were.
Exit code 1: something was lost.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from swarmtrain_peer.files import FileSystem
from swarmtrain_peer.store import StateStore
from swarmtrain_protocols.errors import SwarmError
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.state import CanonicalState
from tests.peer.store_helpers import CHANNEL, a_state, advance, recover, replayed, result_of, roots


class Crash(BaseException):
    """The power goes. Not an OSError: no cleanup code may run on it."""


@dataclass(frozen=True)
class Ending:
    """What the power leaves of that which was not synced.

    ``kept``: share of each file's bytes. ``undo``: renames are undone.
    """

    kept: float
    undo: bool

    @property
    def name(self) -> str:
        return f"{self.kept:.0%} kept, renames {'undone' if self.undo else 'done'}"


@dataclass(frozen=True)
class Point:
    """One crash and what came of it; ``wrong`` is empty if all is well."""

    at: int
    ending: Ending
    wrong: str


class FaultyDisk(FileSystem):
    """Fails at call number ``at``; a crash loses what was not synced, as ``ending`` says."""

    def __init__(
        self, at: int, error: Callable[[], BaseException], ending: Ending | None = None
    ) -> None:
        self.calls, self.at, self.error, self.ending = 0, at, error, ending
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
            if self.dead and self.ending is not None:
                self._lose(self.ending)
            raise failure

    def _lose(self, ending: Ending) -> None:
        for source, target, backup in reversed(self.renamed) if ending.undo else ():
            os.replace(target, source)
            if backup is not None:
                os.replace(backup, target)
            if target in self.unsynced:
                self.unsynced.add(source)
        for path in self.unsynced:
            if path.is_file():
                os.truncate(path, round(path.stat().st_size * ending.kept))

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
        self.unsynced.discard(target)
        if source in self.unsynced:  # the name is new, the bytes still are not on the disk
            self.unsynced.remove(source)
            self.unsynced.add(target)
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


SHARES = (1.0, 0.0, 0.05, 0.5, 0.95)
ENDINGS = tuple(Ending(kept, undo) for kept in SHARES for undo in (False, True))
"""The first: everything is written though nothing was synced."""


def crash_points(folder: Path, endings: Sequence[Ending] = ENDINGS) -> Iterator[Point]:
    """Every call to the system with each of these endings, in an empty folder."""
    expected = roots(7)
    template = folder / "template"
    prepared(template)
    calls = count_calls(folder)
    for ending in endings:
        for at in range(1, calls + 1):
            directory = folder / "crash"
            shutil.copytree(template, directory)
            yield Point(at, ending, _outcome(directory, at, ending, expected))
            shutil.rmtree(directory)


def _outcome(directory: Path, at: int, ending: Ending, expected: list[bytes]) -> str:
    """Crash, start again, go on; what was wrong."""
    acknowledged = [3]
    try:
        work(FaultyDisk(at, Crash, ending), directory, acknowledged)
        return "no crash"
    except Crash:
        pass
    try:
        loaded = StateStore(directory).load()
        if loaded.refused:
            return f"refused: {loaded.refused}"
        state = replayed(loaded)
        if state.round < acknowledged[-1]:
            return f"round {acknowledged[-1]} was promised, {state.round} is here"
        if state.root() != expected[state.round]:
            return f"another state of round {state.round}"
        if list(directory.rglob("*.partial")):
            return "a partial file stays"
        round_number = state.round
        work(FaultyDisk(0, never), directory, [])
        if recover(directory).root() != expected[round_number + 2]:
            return "it does not go on from there"
    except (SwarmError, AssertionError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash_points")
    parser.add_argument("--points", type=int, default=1 << 30, help="at most so many")
    options = parser.parse_args()
    begin_s, points, wrong = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for point in crash_points(Path(folder)):
            points += 1
            if point.wrong:
                wrong += 1
                sys.stdout.write(f"call {point.at}, {point.ending.name}: {point.wrong}\n")
            if points >= options.points:
                break
    sys.stdout.write(
        f"{points:,} crash points, {points - wrong:,} left a loadable checkpoint "
        f"({time.monotonic() - begin_s:.0f} s)\n"
    )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
