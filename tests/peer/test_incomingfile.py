"""A download that outlives its process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from swarmtrain_peer.files import FileSystem
from swarmtrain_peer.incomingfile import PAGE, IncomingFile, find_begun
from swarmtrain_protocols.errors import CheckpointError
from swarmtrain_protocols.rounds.effects import Snapshot
from swarmtrain_protocols.state import CanonicalState

VALUES = 5000
CHUNK = 512
CHANNEL = "train/0/0"


def state(round_: int = 7) -> CanonicalState:
    theta = np.random.default_rng(round_).standard_normal(VALUES, np.float32)
    return CanonicalState.first(CHANNEL, theta, round=round_, chunk_values=CHUNK)


def open_for(folder: Path, of: CanonicalState) -> IncomingFile:
    snapshot = Snapshot(of.channel, of.round, of.root(), VALUES)
    return IncomingFile(folder, snapshot, [len(chunk) for chunk in of.blob().chunks])


def put(file: IncomingFile, of: CanonicalState, *indices: int) -> None:
    for index in indices:
        file.chunks[index][:] = of.chunk(index)
        file.proven(index, [of.leaves[index]])


def test_what_was_proven_is_there_in_the_next_life(tmp_path: Path) -> None:
    wanted = state()
    put(open_for(tmp_path, wanted), wanted, 0, 3, 10)
    (begun,) = find_begun(tmp_path)
    assert (begun.head.channel, begun.head.round, begun.head.root) == (CHANNEL, 7, wanted.root())
    again = open_for(tmp_path, wanted)
    assert again.there() == [0, 3, 10]
    assert all(bytes(again.chunks[i]) == wanted.chunk(i) for i in again.there())


def test_bytes_that_were_lost_or_flipped_are_not_believed(tmp_path: Path) -> None:
    wanted = state()
    file = open_for(tmp_path, wanted)
    put(file, wanted, 0, 3, 10)
    file.chunks[3][17] ^= 1
    file.chunks[5][:] = wanted.chunk(5)  # in place, but nobody has said that it is proven
    assert open_for(tmp_path, wanted).there() == [0, 10]


def test_chunks_that_were_on_their_way_count_once_they_are_whole(tmp_path: Path) -> None:
    """Their leaf hashes are known before they come; the process is killed in between."""
    wanted = state()
    file = open_for(tmp_path, wanted)
    file.expect(2, wanted.leaves[2:8])
    for index in (2, 3, 6):
        file.chunks[index][:] = wanted.chunk(index)
    file.chunks[4][:50] = wanted.chunk(4)[:50]
    again = open_for(tmp_path, wanted)
    assert again.there() == [2, 3, 6]


def test_another_snapshot_takes_its_place(tmp_path: Path) -> None:
    put(open_for(tmp_path, state(7)), state(7), 0, 1, 2)
    assert open_for(tmp_path, state(8)).there() == []
    (begun,) = find_begun(tmp_path)
    assert begun.head.root == state(8).root()
    assert open_for(tmp_path, state(7)).there() == []


def test_closed_its_file_is_gone_and_its_memory_is_not(tmp_path: Path) -> None:
    wanted = state()
    file = open_for(tmp_path, wanted)
    put(file, wanted, *range(len(file.chunks)))
    file.close()
    assert find_begun(tmp_path) == [] and list(tmp_path.iterdir()) == []
    assert bytes(file.chunks[4]) == wanted.chunk(4)
    file.close()


@pytest.mark.parametrize("damage", ["head", "short", "empty"])
def test_a_damaged_file_is_removed_or_begun_anew(tmp_path: Path, damage: str) -> None:
    wanted = state()
    put(open_for(tmp_path, wanted), wanted, 0, 3)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "head":
        data[20] ^= 1
    path.write_bytes({"head": data, "short": data[:PAGE], "empty": b""}[damage])
    assert open_for(tmp_path, wanted).there() == []
    path.write_bytes({"head": data, "short": data[:PAGE], "empty": b""}[damage])
    if damage != "short":
        assert find_begun(tmp_path) == [] and not path.exists()


def test_a_disk_that_fails_says_so(tmp_path: Path) -> None:
    class Broken(FileSystem):
        def create(self, path: Path) -> int:
            raise PermissionError(13, "Permission denied")

    snapshot = Snapshot(CHANNEL, 7, state().root(), VALUES)
    with pytest.raises(CheckpointError, match="Permission denied"):
        IncomingFile(tmp_path, snapshot, [10, 20], Broken())
