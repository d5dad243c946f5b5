"""The disk of one host: an append-only record file and named files, with honest syncs.

Nothing is durable before its sync is over. At a crash, what was pending is a matter of luck: a
prefix of the pending records and any of the pending files may have reached the platter, the rest is
lost; a power cut takes all of it. A torn record fails its checksum when it is read, so tearing
equals losing; it is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from swarmtrain_protocols.core import Persist
from swarmtrain_protocols.testing.draws import Stream


class Disk:
    """``records`` and ``files`` survive a crash; ``pending`` may not."""

    def __init__(self, luck: Stream, seen: Counter[str], now: Callable[[], float]) -> None:
        self.records: list[bytes] = []
        self.files: dict[str, bytes] = {}
        self._pending: list[Persist] = []
        self._pending_files: dict[str, bytes | None] = {}
        self.full_until = 0.0
        self._luck = luck
        self._seen = seen
        self._now = now

    @property
    def full(self) -> bool:
        """There is no space for anything now."""
        return self.full_until > self._now()

    def append(self, batch: list[Persist]) -> None:
        """Begin to write records; they are durable after ``sync``."""
        self._pending += batch

    def sync(self) -> None:
        """All appended records are durable now, in order."""
        self._keep(len(self._pending))
        self._pending.clear()

    def write(self, name: str, data: bytes | None) -> bool:
        """Begin to replace (or with None to delete) a file; durable after ``sync_file``.

        False: there is no space for it, and nothing has changed.
        """
        if data is not None and self.full:
            self._seen["disk:no-space"] += 1
            return False
        self._pending_files[name] = data
        return True

    def sync_file(self, name: str) -> None:
        """The pending version of ``name`` is durable now (written aside and renamed: atomic)."""
        if name in self._pending_files:
            self._keep_file(name, self._pending_files.pop(name))

    def read(self, name: str) -> bytes | None:
        """What a running process reads: its own writes, synced or not."""
        if name in self._pending_files:
            return self._pending_files[name]
        return self.files.get(name)

    def rot(self, luck: Stream) -> str:
        """Flip one bit of one stored file; its name, or '' if there is none."""
        names = [name for name in sorted(self.files) if self.files[name]]
        if not names:
            return ""
        name = names[luck.integer(len(names))]
        broken = bytearray(self.files[name])
        broken[luck.integer(len(broken))] ^= 1 << luck.integer(8)
        self.files[name] = bytes(broken)
        return name

    def crash(self, *, unsynced: bool = True) -> None:
        """Lose, keep or tear what was not synced, by seed; with ``unsynced`` False lose all."""
        if not unsynced:
            self._seen["disk:lost"] += bool(self._pending)
            self._seen["disk:file-lost"] += bool(self._pending_files)
            self._pending.clear()
            self._pending_files.clear()
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
