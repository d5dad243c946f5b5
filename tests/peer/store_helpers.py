"""States, results and recovery for the tests of the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from swarmtrain_peer.store import Loaded, StateStore
from swarmtrain_protocols.codecs import get_codec
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.rules import outer_rule
from swarmtrain_protocols.state import CanonicalState, encode_chunks

CHANNEL, CHUNK, VALUES = "train/0/0", 16, 40
INT8 = get_codec("int8")
OUTER = outer_rule(0.7, 0.9)


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
    state.apply(chunks, INT8, OUTER)


def roots(rounds: int, channel: str = CHANNEL) -> list[bytes]:
    """State hashes of rounds 0 … rounds, without any disk."""
    state = a_state(channel)
    found = [state.root()]
    for _ in range(rounds):
        state.apply(result_of(state.round), INT8, OUTER)
        found.append(state.root())
    return found


def replayed(loaded: Loaded, channel: str = CHANNEL) -> CanonicalState:
    recovered = loaded.channels[channel]
    state = recovered.state
    for result in recovered.results:
        assert result.round == state.round
        assert Blob.of(result.chunks).root == result.root
        state.apply(result.chunks, get_codec(result.codec), OUTER)
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
