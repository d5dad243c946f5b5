"""Corpora on disk: built from text files of this machine, or filled chunk by chunk (spec 12).

One file per corpus, ``<hash>.corpus``, mapped by whoever reads or serves it::

    body (train bytes, held-out bytes)   leaf hashes of its chunks   descriptor

What is still incomplete lies in the same form under a name that ends in ``.partial``. A leaf of
zeros stands for a chunk that is not there yet, and every other chunk is hashed again when a
download goes on, so no crash can leave something behind that passes for the corpus.

Sources: see ``corpus_sources.py``. A file belongs to the held-out part by the hash of its bytes, so
two copies of one file are always on the same side. Nothing here holds more than a few chunks in
memory.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from swarmtrain_peer.corpus_sources import Unit, parse_source, units_of
from swarmtrain_peer.files import (
    PARTIAL,
    FileSystem,
    disk_errors,
    make_folders,
    reserve,
    write_synced,
)
from swarmtrain_protocols import limits
from swarmtrain_protocols.corpus import (
    DESCRIPTOR_BYTES,
    Descriptor,
    chunk_count,
    parse_descriptor,
)
from swarmtrain_protocols.errors import DataUnavailable, PeerFault
from swarmtrain_protocols.merkle import HASH_BYTES, Blob, leaf_hash, merkle_root

SUFFIX = ".corpus"
HELD_OUT_OF_256 = 26
_ABSENT = bytes(HASH_BYTES)


def corpus_path(folder: Path, corpus_hash: bytes) -> Path:
    """Where the corpus of that hash lies in ``folder``."""
    return folder / f"{corpus_hash.hex()}{SUFFIX}"


class CorpusFile:
    """A whole corpus, mapped. ``train`` and ``held_out`` are views of the file's bytes."""

    def __init__(self, path: Path, descriptor: Descriptor, mapped: memoryview) -> None:
        self.path = path
        self.descriptor = descriptor
        self.hash = descriptor.hash
        self.train = mapped[: descriptor.train_bytes]
        self.held_out = mapped[descriptor.train_bytes : descriptor.nbytes]
        self._mapped = mapped

    def blobs(self) -> tuple[Blob, Blob]:
        """What others fetch: the descriptor, and the body by its chunks, over the mapped file."""
        leaves = _leaves(self._mapped, self.descriptor)
        chunks = list(_body_chunks(self._mapped, self.descriptor))
        return Blob.of([self.descriptor.to_bytes()]), Blob(chunks, leaves)


def _body_chunks(data: memoryview, descriptor: Descriptor) -> Iterator[memoryview]:
    for index in range(descriptor.chunks):
        begin = index * limits.CORPUS_CHUNK_BYTES
        yield data[begin : begin + descriptor.chunk_nbytes(index)]


def _leaves(data: memoryview, descriptor: Descriptor) -> list[bytes]:
    begin = descriptor.nbytes
    return [
        bytes(data[begin + i * HASH_BYTES : begin + (i + 1) * HASH_BYTES])
        for i in range(descriptor.chunks)
    ]


def _file_bytes(descriptor: Descriptor) -> int:
    return descriptor.nbytes + descriptor.chunks * HASH_BYTES + DESCRIPTOR_BYTES


def _damaged(path: Path, why: str) -> DataUnavailable:
    return DataUnavailable("corpus", f"{path}: {why}", "remove that file")


def open_corpus(path: Path) -> CorpusFile:
    """Map a corpus file and check every chunk; blocks for about a second per gigabyte.

    Raises:
        DataUnavailable: missing, or not what its name promises.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < DESCRIPTOR_BYTES:
                raise _damaged(path, "it is cut off")
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    try:
        descriptor = parse_descriptor(data[-DESCRIPTOR_BYTES:])
    except PeerFault as fault:
        raise _damaged(path, fault.why) from fault
    if data.nbytes != _file_bytes(descriptor) or path.stem != descriptor.hash.hex():
        raise _damaged(path, "its size or name does not fit what it says it is")
    leaves = _leaves(data, descriptor)
    found = [leaf_hash(chunk) for chunk in _body_chunks(data, descriptor)]
    if found != leaves or merkle_root(leaves) != descriptor.root:
        raise _damaged(path, "its hash is wrong")
    return CorpusFile(path, descriptor, data)


# -- building ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Text:
    """A unit of a source as it was when it was first read."""

    unit: Unit
    nbytes: int
    digest: bytes


class CorpusText:
    """The text files of a source, in the order of the body. Reads them once, for their hashes.

    Raises:
        DataUnavailable: no such source here, empty, too large, or a file cannot be read.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.item_bytes = parse_source(name).item_bytes
        with _reading(name):
            texts = self._looked(units_of(name))
        held_out = [text for text in texts if text.digest[0] < HELD_OUT_OF_256]
        train = [text for text in texts if text.digest[0] >= HELD_OUT_OF_256]
        self.nbytes = sum(text.nbytes for text in texts)
        self.train_bytes = sum(text.nbytes for text in train)
        if not self.train_bytes:
            raise DataUnavailable(
                f"corpus {name}", "no text files there", "name a folder of text files"
            )
        # A folder of very few files may have none held out: then its last twentieth is.
        if self.train_bytes == self.nbytes:
            items = self.train_bytes // self.item_bytes
            self.train_bytes -= items // 20 * self.item_bytes
        self._texts = [*train, *held_out]

    def _looked(self, units: Sequence[Unit]) -> list[_Text]:
        known = sum(unit.nbytes for unit in units)
        if known > limits.CORPUS_BYTES_MAX:
            why = f"{known} bytes, at most {limits.CORPUS_BYTES_MAX}"
            raise DataUnavailable(f"corpus {self.name}", why, "use a part of it")
        found, total = [], 0
        for unit in units:
            hasher, nbytes = blake3(), 0
            for piece in unit.pieces():
                hasher.update(piece)
                nbytes += len(piece)
                if total + nbytes > limits.CORPUS_BYTES_MAX:
                    why = f"more than {limits.CORPUS_BYTES_MAX} bytes"
                    raise DataUnavailable(f"corpus {self.name}", why, "use a part of it")
            total += nbytes
            found.append(_Text(unit, nbytes, hasher.digest()))
        return found

    def chunks(self) -> Iterator[bytes]:
        """The body in chunks; reads the files again.

        Raises:
            DataUnavailable: a file has changed since.
        """
        size = limits.CORPUS_CHUNK_BYTES
        rest = bytearray()
        with _reading(self.name):
            for text in self._texts:
                for piece in self._unchanged(text):
                    rest += piece
                    while len(rest) >= size:
                        yield bytes(rest[:size])
                        del rest[:size]
        if rest:
            yield bytes(rest)

    def _unchanged(self, text: _Text) -> Iterator[bytes]:
        hasher = blake3()
        for piece in text.unit.pieces():
            hasher.update(piece)
            yield piece
        if hasher.digest() != text.digest:
            why = f"{text.unit.label} changed while it was read"
            raise DataUnavailable(f"corpus {self.name}", why, "try again")

    def describe(self, leaves: Sequence[bytes]) -> Descriptor:
        """The descriptor, given the leaf hashes of all chunks."""
        root = merkle_root(leaves)
        return Descriptor(self.train_bytes, self.nbytes - self.train_bytes, root)


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = f"{error.filename}: {error.strerror}" if error.strerror else str(error)
        raise DataUnavailable(f"corpus {name}", why, "check that it can be read") from error


def hash_corpus(name: str) -> bytes:
    """The hash of a corpus of this machine; writes nothing.

    Raises:
        DataUnavailable: it is not here, or changes while it is read.
    """
    text = CorpusText(name)
    return _described(text).hash


def _described(text: CorpusText) -> Descriptor:
    return text.describe([leaf_hash(chunk) for chunk in text.chunks()])


def build_corpus(
    name: str, folder: Path, expect: bytes = b"", *, fs: FileSystem | None = None
) -> CorpusFile:
    """Write the corpus of a source of this machine to ``folder``, whole and durable, and map it.

    Args:
        expect: what the run pins, 32 bytes; empty: whatever it is.

    Raises:
        DataUnavailable: it is not here, or is not what the run pins.
        DiskFull, CheckpointError: it cannot be written.
    """
    fs, text = fs or FileSystem(), CorpusText(name)
    descriptor = _described(text)
    if expect and descriptor.hash != expect:
        raise DataUnavailable(
            f"corpus {name}",
            f"its hash here is {descriptor.hash.hex()[:16]}, the run's is {expect.hex()[:16]}",
            "another version of Python, or other files? Members with the run's can send it",
        )

    def pieces() -> Iterator[bytes]:
        leaves: list[bytes] = []
        for chunk in text.chunks():
            leaves.append(leaf_hash(chunk))
            yield chunk
        yield b"".join(leaves)
        yield descriptor.to_bytes()

    building, path = folder / f"building{PARTIAL}", corpus_path(folder, descriptor.hash)
    with disk_errors("write", building):
        make_folders(fs, folder)
        try:
            write_synced(fs, building, pieces())
        except DataUnavailable:
            fs.remove(building)
            raise
        fs.rename(building, path)
        fs.sync_folder(folder)
    _forget_others(fs, folder, path)
    return open_corpus(path)


def _forget_others(fs: FileSystem, folder: Path, path: Path) -> None:
    """One corpus per folder: others, and incomplete ones, are of no more use."""
    for other in sorted(folder.iterdir()):
        if other != path and other.suffix in (SUFFIX, PARTIAL):
            with contextlib.suppress(FileNotFoundError):
                fs.remove(other)


def local_corpus(name: str, folder: Path, expect: bytes) -> CorpusFile:
    """The pinned corpus without anybody's help: its file if there is one, else built.

    Raises:
        DataUnavailable: neither; a damaged file is removed.
        DiskFull, CheckpointError: it cannot be written.
    """
    path = corpus_path(folder, expect)
    if path.exists():
        try:
            return open_corpus(path)
        except DataUnavailable:
            path.unlink(missing_ok=True)
    return build_corpus(name, folder, expect)


# -- downloading ------------------------------------------------------------------------------


class PartialCorpus:
    """The file of a download. Methods block on the disk, except ``place`` and ``proven``.

    Args:
        folder: made if it is not there; another half of the same corpus is gone on with.

    Raises:
        DiskFull: the room for the whole corpus is taken at once.
        CheckpointError: the disk failed.
    """

    def __init__(self, folder: Path, descriptor: Descriptor, *, fs: FileSystem | None = None):
        self.descriptor = descriptor
        self.path = corpus_path(folder, descriptor.hash)
        self._fs = fs or FileSystem()
        self._partial = self.path.with_name(self.path.name + PARTIAL)
        size = _file_bytes(descriptor)
        with disk_errors("write", self._partial):
            make_folders(self._fs, folder)
            if not self._partial.exists() or self._partial.stat().st_size != size:
                self._fs.close(self._fs.create(self._partial))
            handle = os.open(self._partial, os.O_RDWR | os.O_CLOEXEC)
            try:
                reserve(handle, size)
                mapped = mmap.mmap(handle, size)
            finally:
                os.close(handle)
        self._data = memoryview(mapped)

    def there(self) -> list[int]:
        """Chunks that are in place: hashes all that ever came."""
        return [
            index
            for index, leaf in enumerate(_leaves(self._data, self.descriptor))
            if leaf != _ABSENT and leaf_hash(self.place(index)) == leaf
        ]

    def place(self, index: int) -> memoryview:
        """Where chunk ``index`` belongs; writable."""
        begin = index * limits.CORPUS_CHUNK_BYTES
        return self._data[begin : begin + self.descriptor.chunk_nbytes(index)]

    def proven(self, first: int, leaves: Iterable[bytes]) -> None:
        """Chunks ``first …`` are in place and their leaves lead to the root."""
        at = self.descriptor.nbytes + first * HASH_BYTES
        for leaf in leaves:
            self._data[at : at + HASH_BYTES] = leaf
            at += HASH_BYTES

    def finish(self) -> CorpusFile:
        """Give the file its name once all of it is proven.

        Raises:
            DataUnavailable: as a whole it is not the corpus; nothing of it is kept.
            CheckpointError: the disk failed.
        """
        leaves = _leaves(self._data, self.descriptor)
        if merkle_root(leaves) != self.descriptor.root:
            self.forget()
            raise _damaged(self._partial, "its hash is wrong")
        self._data[-DESCRIPTOR_BYTES:] = self.descriptor.to_bytes()
        with disk_errors("write", self._partial):
            # Mapped and written pages are the same ones: a sync of the file takes both.
            handle = os.open(self._partial, os.O_RDWR | os.O_CLOEXEC)
            try:
                self._fs.sync(handle)
            finally:
                os.close(handle)
            self._fs.rename(self._partial, self.path)
            self._fs.sync_folder(self.path.parent)
        try:
            return open_corpus(self.path)
        except DataUnavailable:
            self.path.unlink(missing_ok=True)
            raise

    def forget(self) -> None:
        """Mark everything as absent."""
        absent = _ABSENT * self.descriptor.chunks
        self._data[self.descriptor.nbytes : self.descriptor.nbytes + len(absent)] = absent


assert chunk_count(limits.CORPUS_CHUNK_BYTES + 1) == 2
