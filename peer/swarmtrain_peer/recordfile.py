"""A file of records that survives crashes: the disk behind ``core.Persist``.

Each record is ``u32 length, u32 CRC-32 of the record, record`` (little-endian). ``write`` returns
when the records are durable. A torn tail is cut off on load; damage before the end is an error,
because records behind it would be lost in silence.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

from swarmtrain_peer.files import FileSystem, disk_errors, write_atomic
from swarmtrain_protocols.errors import CheckpointError

_HEAD = struct.Struct("<II")
RECORD_BYTES_MAX = 32 * 1024 * 1024


def _framed(record: bytes) -> bytes:
    return _HEAD.pack(len(record), zlib.crc32(record)) + record


class RecordFile:
    """One writer at a time; calls block on the disk."""

    def __init__(self, path: Path, *, fs: FileSystem | None = None) -> None:
        self._path = path
        self._fs = fs or FileSystem()
        self._file: int | None = None

    def load(self) -> list[bytes]:
        """Records since the last reset, in order; a torn tail is removed.

        Raises:
            CheckpointError: a record before the end is damaged.
        """
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return []
        records, end = _parse(data)
        if end < len(data):
            if _more_behind(data, end):
                raise CheckpointError(
                    f"{self._path} is damaged",
                    f"at byte {end}, with records behind it",
                    "restore it from a backup, or leave and join again",
                )
            with disk_errors("repair", self._path), open(self._path, "r+b") as file:
                file.truncate(end)
                os.fsync(file.fileno())
        return records

    def write(self, records: Sequence[tuple[bytes, bool]]) -> None:
        """Append ``(record, reset)`` pairs in order; durable on return.

        A reset replaces everything before it, atomically.

        Raises:
            DiskFull, CheckpointError: nothing of these may be taken as durable.
        """
        start = max((i for i, (_, reset) in enumerate(records) if reset), default=None)
        with disk_errors("write", self._path):
            if start is not None:
                self.close()
                write_atomic(self._fs, self._path, [_framed(r) for r, _ in records[start:]])
                return
            if self._file is None:
                new = not self._path.exists()
                self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
                if new:
                    self._fs.sync_folder(self._path.parent)
            data = memoryview(b"".join(_framed(r) for r, _ in records))
            while data:
                data = data[os.write(self._file, data) :]
            os.fdatasync(self._file)

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None


def _parse(data: bytes) -> tuple[list[bytes], int]:
    records: list[bytes] = []
    at = 0
    while at + _HEAD.size <= len(data):
        length, checksum = _HEAD.unpack_from(data, at)
        end = at + _HEAD.size + length
        if length > RECORD_BYTES_MAX or end > len(data):
            break
        record = data[at + _HEAD.size : end]
        if zlib.crc32(record) != checksum:
            break
        records.append(record)
        at = end
    return records, at


def _more_behind(data: bytes, at: int) -> bool:
    """A whole good record after the damage: then it is no torn tail."""
    if at + _HEAD.size > len(data):
        return False
    length = _HEAD.unpack_from(data, at)[0]
    behind = at + _HEAD.size + length
    return length <= RECORD_BYTES_MAX and behind < len(data) and bool(_parse(data[behind:])[0])
