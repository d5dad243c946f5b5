"""Files that are either there, whole and durable, or not there.

POSIX promises little after a crash: data is safe once the file is synced, a new name once its
folder is synced. So everything is written under a name ending in ``.partial``, synced, renamed, and
the folder synced. Each call to the system goes through ``FileSystem``, so that tests can stop at
every one of them.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from swarmtrain_protocols.errors import CheckpointError, DiskFull

PARTIAL = ".partial"
WRITE_BYTES = 16 * 1024 * 1024
"""Largest single write: Linux refuses 2 GiB, and smaller ones fail sooner on a full disk."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Nothing can be written, what is there is whole, and somebody can change that meanwhile. A disk
that may be remounted read-only at its first error is one of these, its errors themselves are not:
after a failed sync nobody knows what is on it.
"""


class FileSystem:
    """The calls that change the disk. Override to inject faults."""

    def create(self, path: Path) -> int:
        """Create or truncate a file; returns its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write some of ``data``; returns how many bytes."""
        return os.write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        """Make the file's bytes durable."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a descriptor of ``create``."""
        os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Rename atomically, replacing a file."""
        os.replace(source, target)

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def make_folder(self, path: Path) -> None:
        """Create one folder."""
        path.mkdir(mode=0o700)

    def remove(self, path: Path) -> None:
        """Remove a file."""
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        """Remove an empty folder."""
        path.rmdir()


@contextlib.contextmanager
def disk_errors(action: str, path: Path) -> Iterator[None]:
    """Turn the system's errors into ours.

    Raises:
        DiskFull: no space or quota left, or mounted read-only.
        CheckpointError: any other error of the system, naming ``path``.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            todo = "Free some space" if error.errno != errno.EROFS else "Make it writable"
            todo += "; training goes on, but nothing is saved until then."
            raise DiskFull(f"cannot {action} {path}", reason, todo) from error
        raise CheckpointError(f"cannot {action} {path}", reason, "Check the disk.") from error


def write_synced(fs: FileSystem, path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a new file and sync its bytes, but not yet its name. On an error it is removed."""
    descriptor = fs.create(path)
    try:
        try:
            for piece in pieces:
                rest = memoryview(piece).cast("B")
                while rest.nbytes:
                    rest = rest[fs.write(descriptor, rest[:WRITE_BYTES]) :]
            fs.sync(descriptor)
        finally:
            fs.close(descriptor)
    except OSError:
        with contextlib.suppress(OSError):
            fs.remove(path)
        raise


def write_atomic(fs: FileSystem, path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file whole and durable, replacing an older one; on an error the older one stays."""
    partial = path.with_name(path.name + PARTIAL)
    write_synced(fs, partial, pieces)
    try:
        fs.rename(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            fs.remove(partial)
        raise
    fs.sync_folder(path.parent)


def reserve(handle: int, nbytes: int) -> None:
    """Take the room of an open file now: writing into a mapping cannot fail politely."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, nbytes)
    else:
        os.ftruncate(handle, nbytes)


def make_folders(fs: FileSystem, path: Path) -> None:
    """Create a folder and those above it, durably."""
    if path.is_dir():
        return
    make_folders(fs, path.parent)
    with contextlib.suppress(FileExistsError):
        fs.make_folder(path)
    fs.sync_folder(path.parent)


def remove_tree(fs: FileSystem, path: Path) -> None:
    """Remove a folder of plain files, or a file.

    The folder gets a ``.partial`` name first, durably: half of it must not come back as a whole.
    """
    if not path.is_dir():
        fs.remove(path)
        return
    if not path.name.endswith(PARTIAL):
        renamed = path.with_name(path.name + PARTIAL)
        fs.rename(path, renamed)
        fs.sync_folder(path.parent)
        path = renamed
    for item in sorted(path.iterdir()):
        fs.remove(item)
    fs.remove_folder(path)
