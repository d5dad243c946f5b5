"""A file of records that survives crashes: the disk behind ``core.Persist``.

Each record is ``u32 length, u32 CRC-32 of the record, u32 CRC-32 of these 8 bytes, record``
(little-endian). ``write`` returns when the records are durable, and leaves a seal behind them: a
head of 12 bytes that says so, itself not synced. A torn tail, which nobody was told of, is cut off
on load; damage before the end or before a seal is an error, because what was promised, a vote
perhaps, would be lost in silence. Only rot in the last batch together with a power failure that
took its seal is still taken for a torn write.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

from swarmtrain_peer.files import FileSystem, disk_errors, write_atomic
from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import CheckpointError, LocalProtocolError

_HEAD = struct.Struct("<III")
_SEALED = 0xFFFFFFFF
"""In place of a length: all before it was durable."""


def _head(length: int, checksum: int) -> bytes:
    head = struct.pack("<II", length, checksum)
    return head + zlib.crc32(head).to_bytes(4, "little")


SEAL = _head(_SEALED, 0)


def _framed(record: bytes) -> bytes:
    return _head(len(record), zlib.crc32(record)) + record


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
            if not _is_torn(data, end):
                raise CheckpointError(
                    f"{self._path} is damaged",
                    f"at byte {end}, and not by a torn write",
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
            LocalProtocolError: a record is longer than ``load`` would believe.
        """
        longest = max((len(record) for record, _ in records), default=0)
        if longest > limits.RECORD_BYTES_MAX:
            raise LocalProtocolError("record refused", f"it has {longest} bytes")
        start = max((i for i, (_, reset) in enumerate(records) if reset), default=None)
        with disk_errors("write", self._path):
            if start is not None:
                self.close()
                frames = [_framed(record) for record, _ in records[start:]]
                write_atomic(self._fs, self._path, [*frames, SEAL])
                return
            if self._file is None:
                new = not self._path.exists()
                self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
                if new:
                    self._fs.sync_folder(self._path.parent)
            self._append(memoryview(b"".join(_framed(r) for r, _ in records)))

    def _append(self, data: memoryview) -> None:
        """All of ``data``, durable, or none of it: half a record must not lie before the next."""
        assert self._file is not None
        end = os.fstat(self._file).st_size
        try:
            while data:
                data = data[os.write(self._file, data) :]
            os.fdatasync(self._file)
        except OSError:
            os.ftruncate(self._file, end)
            raise
        self._seal()

    def _seal(self) -> None:
        """Without it nothing is lost but the proof: the records are kept."""
        assert self._file is not None
        end = os.fstat(self._file).st_size
        written = 0
        with contextlib.suppress(OSError):
            written = os.write(self._file, SEAL)
        if 0 < written < len(SEAL):
            os.ftruncate(self._file, end)

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None


def _parse(data: bytes) -> tuple[list[bytes], int]:
    """Good records from the beginning, and where they end."""
    records: list[bytes] = []
    at = 0
    while True:
        if data.startswith(SEAL, at):
            at += len(SEAL)
        elif (record := _record(data, at)) is not None:
            records.append(record)
            at += _HEAD.size + len(record)
        else:
            return records, at


def _record(data: bytes, at: int) -> bytes | None:
    length = _length(data, at)
    if length is None:
        return None
    start = at + _HEAD.size
    record = data[start : start + length]
    good = len(record) == length and zlib.crc32(record) == _HEAD.unpack_from(data, at)[1]
    return record if good else None


def _length(data: bytes, at: int) -> int | None:
    """What the head at ``at`` says, if it is whole and undamaged."""
    if at + _HEAD.size > len(data):
        return None
    length, _, checksum = _HEAD.unpack_from(data, at)
    good = zlib.crc32(data[at : at + 8]) == checksum and length <= limits.RECORD_BYTES_MAX
    return int(length) if good else None


def _is_torn(data: bytes, at: int) -> bool:
    """True if a crash in mid-append explains what is at ``at``: a prefix, or blocks of zeros."""
    rest = data[at:]
    length = _length(data, at)
    if len(rest) < _HEAD.size or not any(rest):
        return True
    return length is not None and at + _HEAD.size + length >= len(data)
