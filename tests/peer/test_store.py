"""The store: restart, damage of every kind, pruning and rewinding."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from swarmtrain_peer.store import Loaded, StateStore
from swarmtrain_protocols.errors import CheckpointError, LocalProtocolError
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.state import CanonicalState, encode_chunks
from tests.peer.store_helpers import (
    CHANNEL,
    CHUNK,
    INT8,
    OUTER,
    VALUES,
    a_state,
    advance,
    files,
    recover,
    recover_channel,
    replayed,
    result_of,
    roots,
)


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
            state.apply(result_of(state.round), INT8, OUTER)
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
    assert both[1].tobytes() == state.slots["momentum"].tobytes()


def test_each_channel_keeps_the_slots_it_has(tmp_path: Path) -> None:
    store, states = StateStore(tmp_path), []
    for stage, names in enumerate(((), ("m", "v"), ("momentum",))):
        theta = np.random.default_rng(stage).standard_normal(VALUES).astype(np.float32)
        state = CanonicalState.first(f"train/{stage}/0", theta, names, round=7, chunk_values=CHUNK)
        for array in state.slots.values():
            array[:] = theta * 2
        states.append(state)
    store.save(states)
    found = StateStore(tmp_path).load()
    assert not found.refused
    for state in states:
        again = found.channels[state.channel].state
        assert (again.round, again.slot_names, again.root()) == (7, state.slot_names, state.root())
        blob = store.checkpoint(state.channel, 7)
        assert blob.root == state.root() and bytes(blob.chunks[0]) == state.header
    path = next(p for p in files(tmp_path, ".safetensors") if p.name.startswith("train-1-0"))
    assert {t.shape[0] for t in load_file(path).values()} == {3}


def test_a_forgotten_channel_leaves_the_others_alone(tmp_path: Path) -> None:
    store, state, other = StateStore(tmp_path), a_state("train/1/0"), a_state("train/2/0")
    for each in (state, other):
        store.save([each])
        advance(store, each)
        advance(store, each)
        store.save([each])
    store.forget("train/1/0")
    found = StateStore(tmp_path).load()
    assert list(found.channels) == ["train/2/0"] and not found.refused
    assert replayed(found, "train/2/0").root() == other.root()
    assert StateStore(tmp_path).result("train/1/0", 0) is None
    assert StateStore(tmp_path).result("train/2/0", 1) is not None
    store.save([state])
    assert list(StateStore(tmp_path).load().channels) == ["train/1/0", "train/2/0"]
    store.forget("train/9/0")


def test_a_checkpoint_is_served_to_joiners_from_the_file(tmp_path: Path) -> None:
    store, state = StateStore(tmp_path), a_state()
    store.save([state])
    blob = store.checkpoint(CHANNEL, 0)
    assert blob.root == roots(0)[0]
    joiner = CanonicalState.first(CHANNEL, np.zeros(VALUES, "f4"), chunk_values=CHUNK)
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


def test_what_was_verified_once_is_not_hashed_again(tmp_path: Path) -> None:
    store, state = StateStore(tmp_path), a_state()
    store.save([state])
    advance(store, state)
    assert store.checkpoint(CHANNEL, 0) is store.checkpoint(CHANNEL, 0)
    first, second = store.result(CHANNEL, 0), store.result(CHANNEL, 0)
    assert first is not None
    assert second is not None
    assert first.blob is second.blob
    assert first == second
    other = result_of(9)
    store.store_result(CHANNEL, 0, Blob.of(other).root, "int8", other)
    replaced = store.result(CHANNEL, 0)
    assert replaced is not None
    assert replaced.root == Blob.of(other).root
    assert [bytes(c) for c in first.chunks] == [bytes(c) for c in result_of(0)]
    store.rewind({CHANNEL: 0})
    assert store.result(CHANNEL, 0) is None


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
    again.apply(other, INT8, OUTER)
    assert recover(tmp_path).root() == again.root()


def test_misuse_is_told(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    for states in ([], [a_state(), a_state()]):
        with pytest.raises(LocalProtocolError):
            store.save(states)
