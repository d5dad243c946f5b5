"""The disk of one host: an append-only record file and named files, with honest syncs.

Nothing is durable before its sync is over. At a crash, what was pending is a matter of luck: a
prefix of the pending records and any of the pending files may have reached the platter, the rest is
lost. A torn record fails its checksum when it is read, so tearing equals losing; it is counted.
"""

from __future__ import annotations

from collections import Counter

from swarmtrain_protocols.core import Persist
from swarmtrain_protocols.testing.draws import Stream


class Disk:
    """``records`` and ``files`` survive a crash; ``pending`` may not."""

    def __init__(self, luck: Stream, seen: Counter[str]) -> None:
        self.records: list[bytes] = []
        self.files: dict[str, bytes] = {}
        self._pending: list[Persist] = []
        self._pending_files: dict[str, bytes | None] = {}
        self._luck = luck
        self._seen = seen

    def append(self, batch: list[Persist]) -> None:
        """Begin to write records; they are durable after ``sync``."""
        self._pending += batch

    def sync(self) -> None:
        """All appended records are durable now, in order."""
        self._keep(len(self._pending))
        self._pending.clear()

    def write(self, name: str, data: bytes | None) -> None:
        """Begin to replace (or with None to delete) a file; durable after ``sync_file``."""
        self._pending_files[name] = data

    def sync_file(self, name: str) -> None:
        """The pending version of ``name`` is durable now (written aside and renamed: atomic)."""
        if name in self._pending_files:
            self._keep_file(name, self._pending_files.pop(name))

    def read(self, name: str) -> bytes | None:
        """What a running process reads: its own writes, synced or not."""
        if name in self._pending_files:
            return self._pending_files[name]
        return self.files.get(name)

    def crash(self) -> None:
        """Lose, keep or tear what was not synced, by seed."""
        if self._pending:
            kept = self._luck.integer(len(self._pending) + 1)
            self._keep(kept)
            if kept < len(self._pending):
                self._seen["disk:torn" if self._luck.chance(0.5) else "disk:lost"] += 1
        for name in sorted(self._pending_files):
            if self._luck.chance(0.5):
                self._keep_file(name, self._pending_files[name])
            else:
                self._seen["disk:file-lost"] += 1
        self._pending.clear()
        self._pending_files.clear()

    def _keep(self, count: int) -> None:
        for item in self._pending[:count]:
            if item.reset:
                self.records = []
            self.records.append(item.record)

    def _keep_file(self, name: str, data: bytes | None) -> None:
        if data is None:
            self.files.pop(name, None)
        else:
            self.files[name] = data
