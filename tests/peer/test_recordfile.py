"""Durable records on a real disk, cut and damaged at every byte."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import pytest

from swarmtrain_peer.files import FileSystem
from swarmtrain_peer.recordfile import SEAL, RecordFile
from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import CheckpointError, DiskFull, LocalProtocolError

RECORDS = [b"", b"one", b"two" * 100, bytes(range(256))]


def written(path: Path, records: list[bytes]) -> bytes:
    file = RecordFile(path)
    file.write([(r, False) for r in records])
    file.close()
    return path.read_bytes()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert RecordFile(path).load() == []
    data = written(path, RECORDS)
    heads = [struct.pack("<II", len(r), zlib.crc32(r)) for r in RECORDS]
    framed = (h + struct.pack("<I", zlib.crc32(h)) + r for h, r in zip(heads, RECORDS, strict=True))
    seal = struct.pack("<II", 0xFFFFFFFF, 0)
    assert data == b"".join(framed) + seal + struct.pack("<I", zlib.crc32(seal))
    assert RecordFile(path).load() == RECORDS
    assert written(path, [b"more"])[: len(data)] == data
    assert RecordFile(path).load() == [*RECORDS, b"more"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_reset_replaces_everything_before_it(tmp_path: Path) -> None:
    path = tmp_path / "log"
    file = RecordFile(path)
    file.write([(b"old", False)])
    file.write([(b"older", False), (b"base", True), (b"tail", False)])
    file.write([(b"next", False)])
    file.close()
    assert RecordFile(path).load() == [b"base", b"tail", b"next"]
    assert os.listdir(tmp_path) == ["log"]


def test_a_torn_tail_at_any_byte_is_cut_off_and_writing_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log"
    data = written(path, RECORDS)
    ends = [0]
    for record in RECORDS:
        ends.append(ends[-1] + 12 + len(record))
    for cut in range(len(data) - len(SEAL)):
        path.write_bytes(data[:cut])
        whole = sum(1 for end in ends[1:] if end <= cut)
        assert RecordFile(path).load() == RECORDS[:whole]
        assert path.stat().st_size == ends[whole]
    written(path, [b"after"])
    assert RecordFile(path).load() == [*RECORDS[:3], b"after"]
    for cut in range(len(SEAL) + 1):  # nor does it matter where the seal was torn
        path.write_bytes(data[: len(data) - cut])
        assert RecordFile(path).load() == RECORDS
        written(path, [b"after"])
        assert RecordFile(path).load() == [*RECORDS, b"after"]


def test_any_damage_that_no_torn_write_explains_is_an_error(tmp_path: Path) -> None:
    """Every byte, one batch or two: a vote that rots is missed, and not only taken for torn."""
    path = tmp_path / "log"
    records = [b"first", b"second", b"third"]
    written(path, records[:2])
    data = written(path, records[2:])
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
        with pytest.raises(CheckpointError, match="damaged"):
            RecordFile(path).load()


def test_without_its_seal_the_last_record_may_be_a_torn_write(tmp_path: Path) -> None:
    path = tmp_path / "log"
    data = written(path, [b"first", b"third"])[: -len(SEAL)]
    torn = len(data) - len(b"third")  # the last record may be half written; its head is whole
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
        if at < torn:
            with pytest.raises(CheckpointError, match="damaged"):
                RecordFile(path).load()
        else:
            assert RecordFile(path).load() == [b"first"]


def test_a_disk_that_has_no_room_for_the_seal_has_kept_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write

    def write(descriptor: int, data: bytes) -> int:
        if bytes(data) != SEAL:
            return real(descriptor, data)
        if room := rooms.pop():
            return real(descriptor, bytes(data)[:room])
        raise OSError(28, "No space left on device")

    path, rooms = tmp_path / "log", [5, 0]
    monkeypatch.setattr(os, "write", write)
    while rooms:
        written(path, [b"kept"])
    assert RecordFile(path).load() == [b"kept", b"kept"]
    assert path.read_bytes().count(SEAL) == 0


def test_blocks_of_zeros_at_the_end_are_a_torn_write(tmp_path: Path) -> None:
    path = tmp_path / "log"
    data = written(path, RECORDS)
    path.write_bytes(data + bytes(4096))
    assert RecordFile(path).load() == RECORDS
    assert path.read_bytes() == data


def test_a_record_that_could_not_be_read_again_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "RECORD_BYTES_MAX", 10)
    file = RecordFile(tmp_path / "log")
    with pytest.raises(LocalProtocolError, match="11 bytes"):
        file.write([(b"x" * 11, False)])
    assert file.load() == []


class _Torn(FileSystem):
    """Fails after the temporary file was written, before it took the place of the old one."""

    def rename(self, source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")


def test_a_reset_that_fails_leaves_the_old_records(tmp_path: Path) -> None:
    path = tmp_path / "log"
    written(path, [b"old"])
    with pytest.raises(DiskFull):
        RecordFile(path, fs=_Torn()).write([(b"new", True)])
    assert RecordFile(path).load() == [b"old"]


def test_every_append_is_synced_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    real = os.fdatasync

    def sync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", sync)
    file = RecordFile(tmp_path / "log")
    file.write([(b"a", False), (b"b", False)])
    file.write([(b"c", False)])
    file.close()
    assert synced == [26, 39 + len(SEAL)]
