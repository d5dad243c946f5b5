"""What a state holder keeps on disk: checkpoints, and the result bytes of each later round.

::

    checkpoints/checkpoint-00000012/manifest.json  written last, makes it valid
                                    train-0-0.<hash>.safetensors
    results/train-0-0.<hash>/000000000417.result       one file per round, the write-ahead log

Restart is: the newest checkpoint whose hash is right, then its later results in order. Whatever
fails its hash is refused by name and reported, and the one before it is used. A checkpoint file's
data section is the state blob (see ``state.py``), so that it is served to joiners as it lies.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from swarmtrain_peer import storeformat
from swarmtrain_peer.files import (
    PARTIAL,
    FileSystem,
    disk_errors,
    make_folders,
    remove_tree,
    write_atomic,
    write_synced,
)
from swarmtrain_peer.storeformat import Entry, ResultHeader
from swarmtrain_protocols.codecs.base import Buffer
from swarmtrain_protocols.errors import CheckpointError, LocalProtocolError
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.state import CanonicalState, header_chunk

MANIFEST = "manifest.json"
PIN = "pinned"
BLOBS_CACHED_MAX = 8
"""Verified blobs that are kept: joiners ask range by range, and hashing takes a second per 5 GB."""


@dataclass(frozen=True, slots=True)
class StoredResult:
    """The result of one round as it lies on disk, verified. ``blob`` maps the file."""

    channel: str
    round: int
    root: bytes
    codec: str
    blob: Blob

    @property
    def chunks(self) -> tuple[memoryview, ...]:
        """Encoded chunks, ready for ``CanonicalState.apply``."""
        return self.blob.chunks


@dataclass(frozen=True, slots=True)
class Recovered:
    """One channel after a restart: its state, and the results that lead on from it, without gap."""

    state: CanonicalState
    results: tuple[StoredResult, ...]
    number: int
    """Of the checkpoint that has the state."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Everything that was found. ``refused`` names what was broken and therefore not used."""

    channels: dict[str, Recovered] = field(default_factory=dict)
    refused: list[CheckpointError] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint: its number, its folder and what its manifest says."""

    number: int
    path: Path
    entries: tuple[Entry, ...]

    def entry(self, channel: str) -> Entry | None:
        """What it has of a channel."""
        return next((entry for entry in self.entries if entry.channel == channel), None)


def is_pinned(path: Path) -> bool:
    """Whether somebody wants the checkpoint in this folder to stay."""
    return (path / PIN).exists()


class _BlobCache:
    """The last few verified blobs by path. Mappings outlive a file that is replaced or removed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[Path, tuple[Blob, str]] = {}
        self.changes = 0

    def get(self, path: Path) -> tuple[Blob, str] | None:
        with self._lock:
            return self._found.get(path)

    def put(self, path: Path, blob: Blob, codec: str, changes: int) -> None:
        """Remember, unless the disk has changed since ``changes`` was read."""
        with self._lock:
            if changes != self.changes:
                return
            self._found[path] = (blob, codec)
            while len(self._found) > BLOBS_CACHED_MAX:
                del self._found[next(iter(self._found))]

    def forget(self, path: Path | None = None) -> None:
        """Forget one path, or all."""
        with self._lock:
            self.changes += 1
            if path is None:
                self._found.clear()
            else:
                self._found.pop(path, None)


class StateStore:
    """The folder of one site in one run. One writer at a time; calls block on the disk.

    ``save``, ``prune`` and ``rewind`` belong on one thread, ``store_result`` may run beside them.
    With ``writable=False`` nothing on disk is changed.
    """

    def __init__(
        self, directory: Path, *, fs: FileSystem | None = None, writable: bool = True
    ) -> None:
        self._fs = fs or FileSystem()
        self._checkpoints = directory / "checkpoints"
        self._results = directory / "results"
        self._verified: set[tuple[int, str]] = set()
        self._cache = _BlobCache()
        if writable:
            with disk_errors("prepare", directory):
                make_folders(self._fs, self._checkpoints)
                make_folders(self._fs, self._results)
                self._sweep()

    # Writing

    def store_result(
        self, channel: str, round: int, root: bytes, codec: str, chunks: Sequence[Buffer]
    ) -> None:
        """Keep the encoded result of a round; durable on return. Replaces one of the same round.

        Args:
            root: Merkle root over ``chunks``, 32 bytes.

        Raises:
            DiskFull: nothing has changed on disk.
            CheckpointError: the disk failed.
        """
        path = self._result_path(channel, round)
        views = [memoryview(np.frombuffer(chunk, np.uint8).data) for chunk in chunks]
        header = ResultHeader(channel, round, root, codec, tuple(view.nbytes for view in views))
        with disk_errors("write", path):
            make_folders(self._fs, path.parent)
            write_atomic(self._fs, path, [storeformat.encode_result_header(header), *views])
        self._cache.forget(path)

    def save(self, states: Sequence[CanonicalState]) -> int:
        """Write a checkpoint of all channels; durable on return. Returns its number.

        The states must hold still: pass ``copy()`` of those that another thread moves on.

        Raises:
            DiskFull: older checkpoints are as they were.
            CheckpointError: the disk failed.
            LocalProtocolError: a channel twice, none at all, or a state that moved meanwhile.
        """
        if not states or len({state.channel for state in states}) != len(states):
            raise LocalProtocolError("a checkpoint needs each channel once")
        entries = tuple(storeformat.entry_of(state) for state in states)
        number = max(self._folders(), default=0) + 1
        target = self._checkpoints / f"checkpoint-{number:08d}"
        partial = target.with_name(target.name + PARTIAL)
        with disk_errors("write", target):
            make_folders(self._fs, self._checkpoints)  # somebody may have removed it
            try:
                self._fs.make_folder(partial)
                for state, entry in zip(states, entries, strict=True):
                    pieces = storeformat.state_pieces(state, entry)
                    write_synced(self._fs, partial / entry.file, pieces)
                for state, entry in zip(states, entries, strict=True):
                    if (state.round, state.root()) != (entry.round, entry.root):
                        raise LocalProtocolError(f"{state.channel} moved while it was saved")
                manifest = storeformat.encode_manifest(entries)
                write_synced(self._fs, partial / MANIFEST, [manifest])
                self._fs.sync_folder(partial)
                self._fs.rename(partial, target)
            except (OSError, LocalProtocolError):
                with contextlib.suppress(OSError):
                    remove_tree(self._fs, partial)
                raise
            self._fs.sync_folder(self._checkpoints)
        return number

    def has(self, number: int) -> bool:
        """Whether the checkpoint of that number is there; its bytes are not looked at."""
        return (self._checkpoints / f"checkpoint-{number:08d}" / MANIFEST).exists()

    def pin(self, checkpoint: Checkpoint, pinned: bool) -> None:
        """Have it stay, or not.

        Raises:
            CheckpointError: the disk failed.
        """
        path = checkpoint.path / PIN
        with disk_errors("pin", path):
            if pinned:
                write_atomic(self._fs, path, [])
            elif path.exists():
                self._fs.remove(path)
                self._fs.sync_folder(path.parent)

    def drop(self, checkpoint: Checkpoint) -> None:
        """Remove one checkpoint, whatever it is good for.

        Raises:
            CheckpointError: the disk failed.
        """
        self._cache.forget()
        with disk_errors("clean up", self._checkpoints):
            remove_tree(self._fs, checkpoint.path)
            self._fs.sync_folder(self._checkpoints)

    def prune(
        self,
        keep: int,
        since: Mapping[str, int] | None = None,
        held: Collection[int] = (),
    ) -> list[CheckpointError]:
        """Keep the newest ``keep`` good states of each channel, and all results since the oldest.

        ``since``: by channel a round from which on results are kept in any case, for those who
        fetch a state that has just been replaced by a newer one. Pinned checkpoints, and those with
        numbers in ``held``, stay beside the newest.

        States that count are verified by hash, so the only good one of a channel is never removed,
        however many broken ones are newer. Returns what was found broken.

        Raises:
            CheckpointError: the disk failed.
        """
        if keep < 1:
            raise LocalProtocolError("at least one checkpoint must be kept")
        found, broken = self.checkpoints()
        good: dict[str, list[int]] = {}
        unneeded: list[Checkpoint] = []
        for checkpoint in found:
            needed = False
            for entry in checkpoint.entries:
                rounds = good.setdefault(entry.channel, [])
                if len(rounds) == keep:
                    continue
                needed = True
                try:
                    self._verify(checkpoint, entry)
                except CheckpointError as error:
                    broken.append(error)
                else:
                    rounds.append(entry.round)
            if not needed and checkpoint.number not in held and not is_pinned(checkpoint.path):
                unneeded.append(checkpoint)
        self._cache.forget()
        with disk_errors("clean up", self._checkpoints):
            for checkpoint in reversed(unneeded):
                remove_tree(self._fs, checkpoint.path)
            for channel, rounds in sorted(good.items()):
                if len(rounds) == keep:
                    wanted = (since or {}).get(channel, min(rounds))
                    self._prune_results(channel, min(wanted, *rounds))
        return broken

    def forget(self, channel: str) -> None:
        """Remove all checkpoints and results of a channel; other channels keep theirs.

        Raises:
            CheckpointError: the disk failed.
        """
        self._cache.forget()
        with disk_errors("clean up", self._checkpoints):
            for checkpoint in self.checkpoints()[0]:
                if [entry.channel for entry in checkpoint.entries] == [channel]:
                    remove_tree(self._fs, checkpoint.path)
            self._fs.sync_folder(self._checkpoints)
            folder = self._result_folder(channel)
            if folder.is_dir():
                remove_tree(self._fs, folder)
                self._fs.sync_folder(self._results)

    def rewind(self, rounds: dict[str, int]) -> None:
        """Forget everything of these channels that is later than the state of the given round.

        For a new generation: results of the old one must not be replayed. A checkpoint that has
        one of the channels at a later round goes as a whole. Repeat it if it was interrupted.

        Raises:
            CheckpointError: the disk failed.
        """
        self._cache.forget()
        with disk_errors("rewind", self._checkpoints):
            for checkpoint in self.checkpoints()[0]:
                if any(entry.round > rounds.get(entry.channel, entry.round)
                       for entry in checkpoint.entries):  # fmt: skip
                    remove_tree(self._fs, checkpoint.path)
            self._fs.sync_folder(self._checkpoints)
            for channel, round in sorted(rounds.items()):
                folder = self._result_folder(channel)
                for number, path in sorted(_result_files(folder).items(), reverse=True):
                    if number >= round:
                        self._fs.remove(path)
                if folder.is_dir():
                    self._fs.sync_folder(folder)

    # Reading

    def load(self) -> Loaded:
        """Verify and read, per channel, the newest good state and the results that follow it.

        Broken files are skipped and listed, never raised. The caller compares hashes with the log.
        """
        loaded = Loaded()
        found, broken = self.checkpoints()
        loaded.refused.extend(broken)
        for channel in sorted({entry.channel for item in found for entry in item.entries}):
            for checkpoint in found:
                entry = checkpoint.entry(channel)
                if entry is None:
                    continue
                try:
                    state = self.state(checkpoint, entry)
                except CheckpointError as error:
                    loaded.refused.append(error)
                    continue
                results = self._results_from(channel, state.round, loaded.refused)
                loaded.channels[channel] = Recovered(state, results, checkpoint.number)
                break
        return loaded

    def checkpoints(self) -> tuple[list[Checkpoint], list[CheckpointError]]:
        """Complete checkpoints, newest first, by their manifests; and those without a good one."""
        found: list[Checkpoint] = []
        broken: list[CheckpointError] = []
        for number, path in sorted(self._folders().items(), reverse=True):
            try:
                entries = storeformat.read_manifest(path / MANIFEST)
            except CheckpointError as error:
                broken.append(error)
            else:
                found.append(Checkpoint(number, path, entries))
        return found, broken

    def state(self, checkpoint: Checkpoint, entry: Entry) -> CanonicalState:
        """One channel of a checkpoint, read and verified.

        Raises:
            CheckpointError: it is broken.
        """
        return storeformat.read_state(checkpoint.path / entry.file, entry)

    def checkpoint(self, channel: str, round: int) -> Blob:
        """The saved state of a channel at a round, as a blob over the mapped file, verified.

        Raises:
            CheckpointError: no checkpoint has it, or those that do are broken.
        """
        last: CheckpointError | None = None
        for found in self.checkpoints()[0]:
            entry = found.entry(channel)
            if entry is None or entry.round != round:
                continue
            path = found.path / entry.file
            cached, changes = self._cache.get(path), self._cache.changes
            if cached is not None:
                return cached[0]
            try:
                data = storeformat.map_file(path)
                chunks = storeformat.state_chunks(path, data, entry)
            except CheckpointError as error:
                last = error
                continue
            blob = Blob.of([header_chunk(channel, round, entry.values, entry.slots), *chunks])
            if blob.root == entry.root:
                self._cache.put(path, blob, "", changes)
                return blob
            last = storeformat.refusal(path, "its hash is wrong")
        raise last or CheckpointError(f"no checkpoint of {channel} at round {round}")

    def result(self, channel: str, round: int) -> StoredResult | None:
        """The stored result of a round, verified, or None if there is none.

        Raises:
            CheckpointError: its file is broken.
        """
        path = self._result_path(channel, round)
        if not path.exists():
            return None
        cached, changes = self._cache.get(path), self._cache.changes
        if cached is not None:
            return StoredResult(channel, round, cached[0].root, cached[1], cached[0])
        data = storeformat.map_file(path)
        header, chunks = storeformat.parse_result(path, data)
        if (header.channel, header.round) != (channel, round):
            raise storeformat.refusal(path, "it belongs to another round")
        blob = Blob.of(chunks)
        if blob.root != header.root:
            raise storeformat.refusal(path, "its hash is wrong")
        self._cache.put(path, blob, header.codec, changes)
        return StoredResult(channel, round, header.root, header.codec, blob)

    def mapped_result(self, channel: str, round: int, leaves: Sequence[bytes]) -> Blob:
        """A stored result as a blob over its mapped file, with leaves known from before.

        Nothing is hashed here: whoever fetches from it checks every chunk.

        Raises:
            CheckpointError: the file is missing or broken.
        """
        path = self._result_path(channel, round)
        if not path.exists():
            raise storeformat.refusal(path, "it is gone")
        chunks = storeformat.parse_result(path, storeformat.map_file(path))[1]
        if len(chunks) != len(leaves):
            raise storeformat.refusal(path, "it has another number of chunks")
        return Blob(chunks, leaves)

    # Inside

    def _results_from(
        self, channel: str, first: int, refused: list[CheckpointError]
    ) -> tuple[StoredResult, ...]:
        results: list[StoredResult] = []
        while True:
            try:
                found = self.result(channel, first + len(results))
            except CheckpointError as error:
                refused.append(error)
                break
            if found is None:
                break
            results.append(found)
        return tuple(results)

    def _verify(self, checkpoint: Checkpoint, entry: Entry) -> None:
        key = checkpoint.number, entry.channel
        if key not in self._verified:
            storeformat.read_state(checkpoint.path / entry.file, entry)
            self._verified.add(key)

    def _prune_results(self, channel: str, oldest: int) -> None:
        for number, path in sorted(_result_files(self._result_folder(channel)).items()):
            if number < oldest:
                self._fs.remove(path)

    def _sweep(self) -> None:
        """Remove what a crash left half-written or half-removed."""
        folders = [self._checkpoints, *(p for p in sorted(self._results.iterdir()) if p.is_dir())]
        for folder in folders:
            for path in sorted(folder.iterdir()):
                if path.name.endswith(PARTIAL):
                    remove_tree(self._fs, path)

    def _folders(self) -> dict[int, Path]:
        found: dict[int, Path] = {}
        if self._checkpoints.is_dir():
            for path in self._checkpoints.iterdir():
                name = path.name.removeprefix("checkpoint-")
                if name != path.name and name.isdecimal():
                    found[int(name)] = path
        return found

    def _result_folder(self, channel: str) -> Path:
        return self._results / storeformat.file_name(channel)

    def _result_path(self, channel: str, round: int) -> Path:
        return self._result_folder(channel) / f"{round:012d}.result"


def _result_files(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    return {
        int(p.stem): p for p in folder.iterdir() if p.suffix == ".result" and p.stem.isdecimal()
    }
