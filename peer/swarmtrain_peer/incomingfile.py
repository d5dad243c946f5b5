"""A state that is being fetched, over a mapped file: what has come outlives the process.

::

    incoming/train-0-0.<hash>.incoming    one page that says which state, then the leaf hashes
                                          that are known (else zeros), then the chunks

Whoever finds such a file hashes what has a leaf: some chunks were on their way, and pages may have
been lost in a power cut.
There is one per channel, of the snapshot that was asked for last.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from blake3 import blake3

from swarmtrain_peer.files import FileSystem, disk_errors, make_folders, reserve
from swarmtrain_peer.storeformat import file_name
from swarmtrain_protocols import limits
from swarmtrain_protocols.incoming import Incoming
from swarmtrain_protocols.merkle import HASH_BYTES, leaf_hash
from swarmtrain_protocols.messages.common import Channel, Count, Hash
from swarmtrain_protocols.rounds.effects import Snapshot

MAGIC = b"swinc\x00\x00\x01"
PAGE = 4096
SUFFIX = ".incoming"
_ABSENT = bytes(HASH_BYTES)


class Head(msgspec.Struct, frozen=True):
    """Which state a file is for."""

    channel: Channel
    round: Count
    root: Hash
    nbytes: Count


_decoder = msgspec.msgpack.Decoder(Head)


@dataclass(frozen=True, slots=True)
class Begun:
    """A file of an earlier life."""

    path: Path
    head: Head


def find_begun(folder: Path) -> list[Begun]:
    """What earlier lives have begun to fetch; what cannot be read is removed."""
    found = []
    for path in sorted(folder.glob(f"*{SUFFIX}")) if folder.is_dir() else ():
        head = _read_head(path)
        if head is None:
            path.unlink(missing_ok=True)
        else:
            found.append(Begun(path, head))
    return found


def _read_head(path: Path) -> Head | None:
    try:
        with path.open("rb") as file:
            page = file.read(PAGE)
    except OSError:
        return None
    size = int.from_bytes(page[8:12], "little")
    body, digest = page[: 12 + size], page[12 + size : 12 + size + HASH_BYTES]
    if page[:8] != MAGIC or size > PAGE // 2 or blake3(body).digest() != digest:
        return None
    try:
        return _decoder.decode(body[12:])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


class IncomingFile(Incoming):
    """One state on its way, on disk. ``close`` removes the file; its memory stays readable.

    Raises:
        DiskFull: the room for the whole state is taken at once.
        CheckpointError: the disk failed.
    """

    def __init__(
        self, folder: Path, snapshot: Snapshot, sizes: Sequence[int], fs: FileSystem | None = None
    ) -> None:
        fs = fs or FileSystem()
        self._path = folder / f"{file_name(snapshot.channel)}{SUFFIX}"
        head = Head(snapshot.channel, snapshot.round, snapshot.root, sum(sizes))
        start = -(-(PAGE + HASH_BYTES * len(sizes)) // PAGE) * PAGE
        with disk_errors("write", self._path):
            make_folders(fs, folder)
            again = _read_head(self._path) == head
            if not again or self._path.stat().st_size != start + head.nbytes:
                again = False
                fs.close(fs.create(self._path))
            handle = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            try:
                reserve(handle, start + head.nbytes)
                data = memoryview(mmap.mmap(handle, start + head.nbytes))
            except OSError:
                self._path.unlink(missing_ok=True)
                raise
            finally:
                os.close(handle)
        self._table = data[PAGE : PAGE + HASH_BYTES * len(sizes)]
        chunks: list[memoryview] = []
        for size in sizes:
            chunks.append(data[start : start + size])
            start += size
        super().__init__(snapshot.root, chunks)
        if again:
            self._look()
        else:
            body = msgspec.msgpack.encode(head)
            front = MAGIC + len(body).to_bytes(4, "little") + body
            data[: len(front) + HASH_BYTES] = front + blake3(front).digest()

    def _look(self) -> None:
        """What an earlier life has left that matches its leaf hash."""
        for index, chunk in enumerate(self.chunks):
            leaf = bytes(self._table[index * HASH_BYTES : (index + 1) * HASH_BYTES])
            if leaf != _ABSENT and leaf_hash(chunk) == leaf:
                self._proven[index] = leaf

    def proven(self, first: int, leaves: Sequence[bytes]) -> None:
        super().proven(first, leaves)
        self._write(first, leaves)

    def expect(self, first: int, leaves: Sequence[bytes]) -> None:
        super().expect(first, leaves)
        self._write(first, leaves)

    def _write(self, first: int, leaves: Sequence[bytes]) -> None:
        self._table[first * HASH_BYTES : (first + len(leaves)) * HASH_BYTES] = b"".join(leaves)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


assert limits.CHANNEL_NAME_CHARS_MAX < PAGE // 4
