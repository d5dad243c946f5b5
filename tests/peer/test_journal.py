"""Records that others rely on wait for space; those that nobody relies on do not hold up a site."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from swarmtrain_peer import recordfile
from swarmtrain_peer.alarm import DiskAlarm
from swarmtrain_peer.events import EventLog
from swarmtrain_peer.journal import Journal
from swarmtrain_peer.recordfile import RecordFile
from swarmtrain_protocols.core import Persist
from swarmtrain_protocols.errors import CheckpointError

WAIT_S = 10.0


class Disk:
    """Stands in for ``os.write``: a disk with so many bytes left, or a broken one."""

    def __init__(self) -> None:
        self.free_bytes = 1 << 20
        self.broken = False

    def write(self, descriptor: int, data: memoryview) -> int:
        if self.broken:
            raise OSError(errno.EIO, "Input/output error")
        if not self.free_bytes:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = os.write(descriptor, data[: self.free_bytes])
        self.free_bytes -= done
        return done


class Bench:
    def __init__(self, folder: Path, disk: Disk) -> None:
        self.disk = disk
        self.path = folder / "log"
        self.events = EventLog(folder / "events.jsonl", "ab" * 32)
        self.released: list[str] = []
        self.notices: list[object] = []
        self.moved = asyncio.Event()
        self.pool = ThreadPoolExecutor(1)
        self.journal = Journal(
            RecordFile(self.path),
            self.pool,
            DiskAlarm(self.events, folder),
            failed=self.note,
            blocked=lambda: self.note("blocked"),
            retry_s=0.01,
            patience_s=0.05,
        )

    def note(self, what: object) -> None:
        self.notices.append(what)
        self.moved.set()

    def write(self, name: str, *, relied: bool, reset: bool = False) -> None:
        def done() -> None:
            self.released.append(name)
            self.moved.set()

        self.journal.write([Persist(name.encode(), reset=reset, relied=relied)], done)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not holds():
                self.moved.clear()
                await self.moved.wait()

    async def told(self, name: str) -> None:
        """Until the event log has an event of that name."""
        end = self.events.subscribe(lambda record: self.moved.set())
        await self.until(lambda: bool(self.events.query(name=name)))
        end()

    def on_disk(self) -> list[bytes]:
        return RecordFile(self.path).load()


def run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, story: Callable[[Bench], Awaitable[None]]
) -> None:
    disk = Disk()

    class Patched:
        def __getattr__(self, name: str) -> object:
            return disk.write if name == "write" else getattr(os, name)

    monkeypatch.setattr(recordfile, "os", Patched())

    async def main() -> None:
        bench = Bench(folder, disk)
        await story(bench)
        bench.journal.close()
        bench.pool.shutdown()

    asyncio.run(main())


def test_what_others_rely_on_waits_for_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(bench: Bench) -> None:
        bench.write("vote", relied=True)
        await bench.until(lambda: bench.released == ["vote"])
        bench.disk.free_bytes = 5  # in the middle of a record
        bench.write("entry", relied=True)
        await bench.until(lambda: bench.notices == ["blocked"])
        assert bench.released == ["vote"] and bench.journal.stuck
        assert bench.on_disk() == [b"vote"], "half a record is nowhere"
        bench.disk.free_bytes = 1 << 20
        await bench.until(lambda: bench.released == ["vote", "entry"])
        assert not bench.journal.stuck
        assert bench.on_disk() == [b"vote", b"entry"]
        names = [record["name"] for record in bench.events.query()]
        assert names == ["disk_full", "disk_freed"]

    run(tmp_path, monkeypatch, story)


def test_what_nobody_relies_on_lets_the_site_go_on_and_is_written_later_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(bench: Bench) -> None:
        bench.disk.free_bytes = 0
        for name in ("a", "b", "c"):
            bench.write(name, relied=False)
            await bench.until(lambda name=name: bench.released[-1:] == [name])  # type: ignore[misc]
        bench.write("vote", relied=True)
        await bench.until(lambda: bench.notices == ["blocked"])
        assert bench.released == ["a", "b", "c"], "a vote waits, and for all before it"
        bench.disk.free_bytes = 1 << 20
        await bench.until(lambda: bench.released[-1:] == ["vote"])
        assert bench.on_disk() == [b"a", b"b", b"c", b"vote"]

    run(tmp_path, monkeypatch, story)


def test_a_snapshot_takes_the_place_of_what_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(bench: Bench) -> None:
        bench.disk.free_bytes = 0
        bench.write("old", relied=False)
        await bench.until(lambda: bench.released == ["old"])
        bench.write("snapshot", relied=False, reset=True)
        await bench.until(lambda: len(bench.released) == 2)
        bench.disk.free_bytes = 1 << 20
        await bench.told("disk_freed")
        assert bench.on_disk() == [b"snapshot"]

    run(tmp_path, monkeypatch, story)


def test_what_waits_in_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarmtrain_protocols.limits.RECORDS_WAITING_MAX", 2)

    async def story(bench: Bench) -> None:
        bench.disk.free_bytes = 0
        for name in ("a", "b"):
            bench.write(name, relied=False)
            await bench.until(lambda name=name: bench.released[-1:] == [name])  # type: ignore[misc]
        bench.write("c", relied=False)
        await bench.until(lambda: bench.notices == ["blocked"])
        assert bench.released == ["a", "b"]

    run(tmp_path, monkeypatch, story)


def test_a_broken_disk_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(bench: Bench) -> None:
        bench.disk.broken = True
        bench.write("vote", relied=True)
        await bench.until(lambda: bool(bench.notices))
        (error,) = bench.notices
        assert isinstance(error, CheckpointError)
        assert bench.released == []

    run(tmp_path, monkeypatch, story)
