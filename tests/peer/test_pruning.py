"""What may go from a disk, and what says why it stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from swarmtrain_peer.pruning import IN_USE, NEWEST, PINNED, Curator
from swarmtrain_peer.store import StateStore
from swarmtrain_protocols.errors import CheckpointError, LocalProtocolError
from swarmtrain_protocols.state import CanonicalState

CHANNEL = "train/0/0"


def store_with(folder: Path, *rounds: int, channel: str = CHANNEL) -> StateStore:
    store = StateStore(folder)
    for number in rounds:
        theta = np.full(100, number, np.float32)
        store.save([CanonicalState.first(channel, theta, round=number)])
    return store


def numbers(store: StateStore) -> list[int]:
    return sorted(item.number for item in store.checkpoints()[0])


def spoil(store: StateStore, number: int) -> None:
    (found,) = [item for item in store.checkpoints()[0] if item.number == number]
    path = found.path / found.entries[0].file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_the_newest_stay(tmp_path: Path) -> None:
    store = store_with(tmp_path, 0, 10, 20, 30)
    told = Curator(store).prune(2)
    assert told["removed"] == [1, 2] and numbers(store) == [3, 4]
    assert [(row["number"], row["why"]) for row in told["kept"]] == [(3, NEWEST), (4, NEWEST)]


def test_a_good_one_stays_however_many_damaged_ones_are_newer(tmp_path: Path) -> None:
    store = store_with(tmp_path, 0, 10, 20, 30)
    for number in (3, 4):
        spoil(store, number)
    told = Curator(store).prune(1)
    assert 2 in numbers(store) and 1 in told["removed"]
    assert len(told["damaged"]) == 2


def test_pinned_ones_stay_until_they_are_not(tmp_path: Path) -> None:
    store = store_with(tmp_path, 0, 10, 20, 30)
    curator = Curator(store)
    curator.pin(1, True)
    told = curator.prune(1)
    assert told["removed"] == [2, 3] and numbers(store) == [1, 4]
    assert told["kept"][0] == {"number": 1, "rounds": {CHANNEL: 0}, "why": PINNED}
    store.prune(1)
    assert numbers(store) == [1, 4], "the site's own pruning leaves it alone as well"
    with pytest.raises(CheckpointError, match="pinned"):
        curator.remove(1)
    curator.pin(1, False)
    assert curator.remove(1)["removed"] == [1]
    assert numbers(StateStore(tmp_path)) == [4]


def test_the_only_good_state_of_a_channel_cannot_be_removed(tmp_path: Path) -> None:
    store = store_with(tmp_path, 0, 10)
    store_with(tmp_path, 5, channel="train/1/0")
    curator = Curator(store)
    with pytest.raises(CheckpointError, match="only good state of train/1/0"):
        curator.remove(3)
    spoil(store, 1)
    with pytest.raises(CheckpointError, match="only good state of train/0/0"):
        curator.remove(2)
    assert numbers(store) == [1, 2, 3]
    assert curator.remove(1)["removed"] == [1], "it is damaged, and another one is good"


def test_what_a_member_fetches_stays_with_the_results_behind_it(tmp_path: Path) -> None:
    store = store_with(tmp_path, 0, 10, 20, 30)
    curator = Curator(store, lambda: {CHANNEL: [10]})
    told = curator.prune(1)
    assert told["removed"] == [1, 3] and told["kept"][0]["why"] == IN_USE
    with pytest.raises(CheckpointError, match="fetches it"):
        curator.remove(2)


def test_nonsense_is_refused(tmp_path: Path) -> None:
    curator = Curator(store_with(tmp_path, 0))
    with pytest.raises(CheckpointError, match="no checkpoint 7"):
        curator.remove(7)
    with pytest.raises(CheckpointError, match="no checkpoint 7"):
        curator.pin(7, True)
    with pytest.raises(LocalProtocolError):
        curator.prune(0)
