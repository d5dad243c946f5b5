"""The store under crashes at every step, torn and flipped files, and a full disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from swarmtrain_peer.files import FileSystem
from swarmtrain_peer.store import Loaded, StateStore
from swarmtrain_protocols.codecs import get_codec
from swarmtrain_protocols.errors import CheckpointError, DiskFull, LocalProtocolError
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.state import CanonicalState, encode_chunks

CHANNEL, CHUNK, VALUES = "train/0/0", 16, 40
INT8 = get_codec("int8")


def a_state(channel: str = CHANNEL, values: int = VALUES) -> CanonicalState:
    theta = np.random.default_rng(len(channel)).standard_normal(values).astype(np.float32)
    return CanonicalState.first(channel, theta, chunk_values=CHUNK)


def result_of(round_number: int, values: int = VALUES) -> list[Any]:
    x = np.random.default_rng(100 + round_number).standard_normal(values).astype(np.float32)
    return list(encode_chunks(x, INT8, chunk_values=CHUNK))


def advance(store: StateStore, state: CanonicalState) -> None:
    """One committed round: bytes on disk first, then applied."""
    chunks = result_of(state.round, state.layout.values)
    store.store_result(state.channel, state.round, Blob.of(chunks).root, "int8", chunks)
    state.apply(chunks, INT8, 0.7, 0.9)


def roots(rounds: int, channel: str = CHANNEL) -> list[bytes]:
    """State hashes of rounds 0 … rounds, without any disk."""
    state = a_state(channel)
    found = [state.root()]
    for _ in range(rounds):
        state.apply(result_of(state.round), INT8, 0.7, 0.9)
        found.append(state.root())
    return found


def replayed(loaded: Loaded, channel: str = CHANNEL) -> CanonicalState:
    recovered = loaded.channels[channel]
    state = recovered.state
    for result in recovered.results:
        assert result.round == state.round
        assert Blob.of(result.chunks).root == result.root
        state.apply(result.chunks, get_codec(result.codec), 0.7, 0.9)
    return state


def recover(directory: Path) -> CanonicalState:
    loaded = StateStore(directory).load()
    assert not loaded.refused
    return replayed(loaded)


def recover_channel(directory: Path, channel: str) -> CanonicalState:
    loaded = StateStore(directory).load()
    assert not loaded.refused
    return replayed(loaded, channel)


def files(directory: Path, suffix: str) -> list[Path]:
    return sorted(directory.rglob(f"*{suffix}"))


def test_checkpoint_and_results_lead_back_to_the_state(tmp_path: Path) -> None:
    store, state = StateStore(tmp_path), a_state()
    store.save([state])
    for _ in range(3):
        advance(store, state)
    again = recover(tmp_path)
    assert (again.round, again.root()) == (3, roots(3)[3])
    store.save([state])
    loaded = StateStore(tmp_path).load()
    assert loaded.channels[CHANNEL].results == ()
    assert loaded.channels[CHANNEL].state.root() == roots(3)[3]


def test_an_empty_folder_is_no_error(tmp_path: Path) -> None:
    assert StateStore(tmp_path / "new").load() == Loaded()
    assert StateStore(tmp_path / "none", writable=False).load() == Loaded()
    assert not (tmp_path / "none").exists()


def test_channels_are_restored_each_at_its_round(tmp_path: Path) -> None:
    names = ["train/0/0", "train/0/1", "train/1/0", "ünï/../cödé"]
    store, states = StateStore(tmp_path), [a_state(name) for name in names]
    for count, state in enumerate(states):
        store.store_result(state.channel, 0, Blob.of(result_of(0)).root, "int8", result_of(0))
        for _ in range(count):
            state.apply(result_of(state.round), INT8, 0.7, 0.9)
    store.save(states)
    loaded = StateStore(tmp_path).load()
    assert sorted(loaded.channels) == sorted(names)
    for count, name in enumerate(names):
        assert replayed(loaded, name).root() == roots(max(count, 1), name)[max(count, 1)]
    assert all(path.resolve().is_relative_to(tmp_path) for path in tmp_path.rglob("*"))


def test_results_stop_at_a_gap(tmp_path: Path) -> None:
    store, state = StateStore(tmp_path), a_state()
    store.save([state])
    for _ in range(4):
        advance(store, state)
    files(tmp_path, ".result")[2].unlink()
    assert recover(tmp_path).root() == roots(2)[2]


def test_the_state_file_is_safetensors(tmp_path: Path) -> None:
    state = a_state()
    StateStore(tmp_path).save([state])
    tensors = load_file(files(tmp_path, ".safetensors")[0])
    both = np.concatenate([tensors[name] for name in sorted(tensors)], axis=1)
    assert both[0].tobytes() == state.theta.tobytes()
    assert both[1].tobytes() == state.momentum.tobytes()


def test_a_checkpoint_is_served_to_joiners_from_the_file(tmp_path: Path) -> None:
    store, state = StateStore(tmp_path), a_state()
    store.save([state])
    blob = store.checkpoint(CHANNEL, 0)
    assert blob.root == roots(0)[0]
    joiner = CanonicalState(CHANNEL, 0, np.zeros(VALUES, "f4"), np.zeros(VALUES, "f4"),
                            chunk_values=CHUNK)  # fmt: skip
    for index, chunk in enumerate(blob.chunks):
        joiner.load_chunk(index, chunk)
    assert joiner.root() == roots(0)[0]
    with pytest.raises(CheckpointError):
        store.checkpoint(CHANNEL, 1)


def test_a_stored_result_is_found_by_its_round(tmp_path: Path) -> None:
    store, state = StateStore(tmp_path), a_state()
    advance(store, state)
    found = store.result(CHANNEL, 0)
    assert found is not None
    assert [bytes(c) for c in found.chunks] == [bytes(c) for c in result_of(0)]
    assert store.result(CHANNEL, 1) is None
    shutil.copy(files(tmp_path, ".result")[0], tmp_path / "copy")
    (tmp_path / "copy").rename(files(tmp_path, ".result")[0].with_stem("000000000001"))
    with pytest.raises(CheckpointError, match="another round"):
        store.result(CHANNEL, 1)


# Damage


def damaged(path: Path) -> Iterator[tuple[str, bytes]]:
    """The file cut at every byte, one bit flipped in every byte, and with more at its end."""
    good = path.read_bytes()
    for length in range(len(good)):
        yield f"cut at {length}", good[:length]
    for place in range(len(good)):
        flipped = bytearray(good)
        flipped[place] ^= 1 << (place % 8)
        yield f"flip at {place}", bytes(flipped)
    yield "longer", good + b"\0"


@pytest.mark.parametrize("suffix", ["manifest.json", ".safetensors"])
def test_any_damage_to_the_newest_checkpoint_falls_back_and_is_reported(
    tmp_path: Path, suffix: str
) -> None:
    store, state = StateStore(tmp_path), a_state()
    store.save([state])
    for _ in range(2):
        advance(store, state)
    store.save([state])
    expected = roots(2)[2]
    path = files(tmp_path, suffix)[-1]
    good = path.read_bytes()
    for what, data in damaged(path):
        path.write_bytes(data)
        loaded = StateStore(tmp_path).load()
        assert len(loaded.refused) == 1, what
        assert str(path) in str(loaded.refused[0]), what
        assert loaded.channels[CHANNEL].state.round == 0, what
        assert replayed(loaded).root() == expected, what
    path.write_bytes(good)
    assert StateStore(tmp_path).load().channels[CHANNEL].state.round == 2


def test_any_damage_to_a_result_ends_the_replay_before_it(tmp_path: Path) -> None:
    store, state = StateStore(tmp_path), a_state()
    store.save([state])
    for _ in range(3):
        advance(store, state)
    path = files(tmp_path, ".result")[1]
    for what, data in damaged(path):
        path.write_bytes(data)
        loaded = StateStore(tmp_path).load()
        assert [str(path) in str(error) for error in loaded.refused] == [True], what
        assert replayed(loaded).root() == roots(1)[1], what


def test_a_damaged_checkpoint_is_never_served(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    store.save([a_state()])
    path = files(tmp_path, ".safetensors")[0]
    for _, data in damaged(path):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="safetensors"):
            store.checkpoint(CHANNEL, 0)


def test_each_channel_falls_back_on_its_own(tmp_path: Path) -> None:
    store, states = StateStore(tmp_path), [a_state("train/0/0"), a_state("train/0/1")]
    store.save(states)
    for state in states:
        advance(store, state)
    store.save(states)
    path = files(tmp_path, ".safetensors")[-1]
    assert "train-0-1" in path.name
    path.write_bytes(path.read_bytes()[:-1])
    loaded = StateStore(tmp_path).load()
    assert loaded.channels["train/0/0"].state.round == 1
    assert loaded.channels["train/0/1"].state.round == 0
    assert replayed(loaded, "train/0/1").root() == roots(1, "train/0/1")[1]


# Pruning and rewinding


def test_prune_keeps_checkpoints_and_what_replays_from_the_oldest(tmp_path: Path) -> None:
    store, state = StateStore(tmp_path), a_state()
    for _ in range(5):
        store.save([state])
        advance(store, state)
    assert store.prune(2) == []
    assert [c.entries[0].round for c in store.checkpoints()[0]] == [4, 3]
    assert [int(p.stem) for p in files(tmp_path, ".result")] == [3, 4]
    files(tmp_path, ".safetensors")[-1].write_bytes(b"")
    assert replayed(StateStore(tmp_path).load()).root() == roots(5)[5]


def test_prune_never_removes_the_only_good_checkpoint(tmp_path: Path) -> None:
    store, state = StateStore(tmp_path), a_state()
    for _ in range(4):
        store.save([state])
        advance(store, state)
    for path in files(tmp_path, ".safetensors")[1:]:
        path.write_bytes(path.read_bytes()[:-4])
    broken = StateStore(tmp_path).prune(1)
    assert len(broken) == 3
    loaded = StateStore(tmp_path).load()
    assert loaded.channels[CHANNEL].state.round == 0
    assert replayed(loaded).root() == roots(4)[4]
    with pytest.raises(LocalProtocolError):
        store.prune(0)


def test_prune_counts_for_each_channel(tmp_path: Path) -> None:
    """A channel that is saved seldom does not lose its only checkpoint to one saved often."""
    store, often, seldom = StateStore(tmp_path), a_state("train/0/0"), a_state("train/0/1")
    store.save([seldom])
    advance(store, seldom)
    for _ in range(5):
        advance(store, often)
        store.save([often])
        store.prune(1)
    assert [c.entries[0].channel for c in store.checkpoints()[0]] == ["train/0/0", "train/0/1"]
    assert recover_channel(tmp_path, "train/0/1").root() == roots(1, "train/0/1")[1]
    assert recover_channel(tmp_path, "train/0/0").root() == roots(5)[5]


def test_rewind_forgets_later_results_and_checkpoints(tmp_path: Path) -> None:
    store, state = StateStore(tmp_path), a_state()
    for round_number in range(5):
        if round_number in (0, 2, 4):
            store.save([state])
        advance(store, state)
    store.rewind({CHANNEL: 3})
    again = recover(tmp_path)
    assert (again.round, again.root()) == (3, roots(3)[3])
    assert [c.entries[0].round for c in store.checkpoints()[0]] == [2, 0]
    other = list(encode_chunks(np.ones(VALUES, "f4"), INT8, chunk_values=CHUNK))
    store.store_result(CHANNEL, 3, Blob.of(other).root, "int8", other)
    again.apply(other, INT8, 0.7, 0.9)
    assert recover(tmp_path).root() == again.root()


def test_misuse_is_told(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    for states in ([], [a_state(), a_state()]):
        with pytest.raises(LocalProtocolError):
            store.save(states)


# Crashes and full disks


class Crash(BaseException):
    """The power goes. Not an OSError: no cleanup code may run on it."""


class FaultyDisk(FileSystem):
    """Fails at call number ``at``; a crash loses what was not synced.

    ``lose``: unsynced bytes are gone (half of each file stays) and unsynced renames are undone.
    """

    def __init__(self, at: int, error: Callable[[], BaseException], lose: bool = False) -> None:
        self.calls, self.at, self.error, self.lose = 0, at, error, lose
        self.paths: dict[int, Path] = {}
        self.unsynced: set[Path] = set()
        self.renamed: list[tuple[Path, Path, Path | None]] = []
        self.dead = False

    def _call(self) -> None:
        if self.dead:
            raise self.error()
        self.calls += 1
        if self.calls == self.at:
            failure = self.error()
            self.dead = isinstance(failure, Crash)
            if self.dead and self.lose:
                self._lose()
            raise failure

    def _lose(self) -> None:
        for source, target, backup in reversed(self.renamed):
            os.replace(target, source)
            if backup is not None:
                os.replace(backup, target)
            if target in self.unsynced:
                self.unsynced.add(source)
        for path in self.unsynced:
            if path.is_file():
                os.truncate(path, path.stat().st_size // 2)

    def create(self, path: Path) -> int:
        self._call()
        descriptor = super().create(path)
        self.paths[descriptor] = path
        self.unsynced.add(path)
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        self._call()
        return super().write(descriptor, data[: max(1, len(data) // 2)])  # short writes are legal

    def sync(self, descriptor: int) -> None:
        self._call()
        self.unsynced.discard(self.paths[descriptor])

    def close(self, descriptor: int) -> None:
        super().close(descriptor)
        self._call()

    def rename(self, source: Path, target: Path) -> None:
        self._call()
        backup = None
        if target.exists():
            backup = target.parent.parent / f"{target.name}.backup"
            shutil.copy(target, backup)
        super().rename(source, target)
        self.renamed.append((source, target, backup))

    def sync_folder(self, path: Path) -> None:
        self._call()
        self.renamed = [item for item in self.renamed if item[1].parent != path]

    def make_folder(self, path: Path) -> None:
        self._call()
        super().make_folder(path)

    def remove(self, path: Path) -> None:
        self._call()
        super().remove(path)

    def remove_folder(self, path: Path) -> None:
        self._call()
        super().remove_folder(path)


def never() -> BaseException:
    return AssertionError("not reached")


def prepared(directory: Path) -> CanonicalState:
    """Two checkpoints (rounds 0 and 2) and results up to round 3."""
    store, state = StateStore(directory), a_state()
    store.save([state])
    for round_number in range(3):
        if round_number == 2:
            store.save([state])
        advance(store, state)
    return state


def work(fs: FileSystem, directory: Path, acknowledged: list[int]) -> None:
    """What a running peer does to its disk; ``acknowledged`` gets rounds that are promised."""
    store = StateStore(directory, fs=fs)
    state = replayed(store.load())
    acknowledged.append(state.round)
    advance(store, state)
    acknowledged.append(state.round)
    store.save([state])
    store.prune(2)
    advance(store, state)
    acknowledged.append(state.round)
    advance_again = result_of(4)  # stored twice: a replayed round after a restart
    store.store_result(CHANNEL, 4, Blob.of(advance_again).root, "int8", advance_again)
    store.save([state])
    store.prune(1)


def count_calls(tmp_path: Path) -> int:
    directory = tmp_path / "count"
    prepared(directory)
    disk = FaultyDisk(0, never)
    work(disk, directory, [])
    assert recover(directory).round == 5
    return disk.calls


@pytest.mark.parametrize("lose", [False, True], ids=["all written", "unsynced lost"])
def test_a_crash_at_any_call_loses_nothing_that_was_promised(tmp_path: Path, lose: bool) -> None:
    expected = roots(7)
    template = tmp_path / "template"
    prepared(template)
    calls = count_calls(tmp_path)
    assert calls > 60
    for at in range(1, calls + 1):
        directory = tmp_path / f"crash-{at}"
        shutil.copytree(template, directory)
        acknowledged = [3]
        disk = FaultyDisk(at, Crash, lose)
        with pytest.raises(Crash):
            work(disk, directory, acknowledged)
        loaded = StateStore(directory).load()
        assert not loaded.refused, at
        state = replayed(loaded)
        assert state.round >= acknowledged[-1], at
        assert state.root() == expected[state.round], at
        assert not list(directory.rglob("*.partial")), at
        round_number = state.round
        work(FaultyDisk(0, never), directory, [])  # and it goes on from there
        assert recover(directory).root() == expected[round_number + 2], at
        shutil.rmtree(directory)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_what_was_there(tmp_path: Path, code: int) -> None:
    expected = roots(4)
    directory = tmp_path / "full"
    state = prepared(directory)
    chunks = result_of(3)
    before = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    seen = 0
    for action in ("save", "store"):
        at = 0
        while True:
            at += 1
            disk = FaultyDisk(0, lambda: OSError(code, os.strerror(code)))
            store = StateStore(directory, fs=disk)
            disk.calls, disk.at = 0, at
            try:
                if action == "save":
                    store.save([state])
                else:
                    store.store_result(CHANNEL, 3, Blob.of(chunks).root, "int8", chunks)
            except DiskFull as error:
                assert str(directory) in error.what
                seen += 1
            else:
                break
            assert not list(directory.rglob("*.partial"))
            loaded = StateStore(directory).load()
            assert not loaded.refused
            again = replayed(loaded)
            assert again.root() == expected[again.round]
            assert again.round >= 3
            for path, data in before.items():
                assert path.read_bytes() == data
        state = replayed(StateStore(directory).load())
    assert seen > 20


def test_other_errors_of_the_disk_name_the_file(tmp_path: Path) -> None:
    prepared(tmp_path)
    disk = FaultyDisk(0, lambda: OSError(errno.EIO, os.strerror(errno.EIO)))
    store = StateStore(tmp_path, fs=disk)
    disk.calls, disk.at = 0, 2
    with pytest.raises(CheckpointError, match="result"):
        store.store_result(CHANNEL, 3, Blob.of(result_of(3)).root, "int8", result_of(3))
    assert recover(tmp_path).round == 3


def test_a_state_that_moves_while_it_is_saved_is_not_saved(tmp_path: Path) -> None:
    state = a_state()

    class Mover(FileSystem):
        def sync(self, descriptor: int) -> None:
            super().sync(descriptor)
            state.apply(result_of(state.round), INT8, 0.7, 0.9)

    store = StateStore(tmp_path, fs=Mover())
    with pytest.raises(LocalProtocolError, match="moved"):
        store.save([state])
    assert StateStore(tmp_path).load() == Loaded()
