"""What has come of a state, and what of it need not come."""

from __future__ import annotations

import numpy as np

from swarmtrain_protocols.incoming import Incoming
from swarmtrain_protocols.state import CanonicalState

CHUNK = 8
VALUES = 20


def state(round_: int, change: int | None = None) -> CanonicalState:
    theta = np.arange(VALUES, dtype=np.float32)
    if change is not None:
        theta[change] += 1
    momentum = {"momentum": np.ones(VALUES, np.float32)}
    return CanonicalState("train/0/0", round_, theta, momentum, chunk_values=CHUNK)


def begin(of: CanonicalState) -> Incoming:
    return Incoming.in_memory(of.root(), [len(chunk) for chunk in of.blob().chunks])


def test_without_a_state_of_its_own_there_is_nothing_to_compare() -> None:
    incoming = begin(state(7))
    assert incoming.prepare(None) == ((), False)
    incoming.proven(2, [state(7).leaves[2]])
    assert incoming.prepare(None) == ((2,), False)


def test_only_chunks_that_differ_are_left() -> None:
    """The header has the round in it; of the arrays only the chunk with value 9 has changed."""
    wanted, old = state(7), state(3, change=9)
    incoming = begin(wanted)
    assert incoming.prepare(old) == ((), True)
    incoming.expect(0, wanted.leaves[:2])
    assert incoming.prepare(old) == ((), True), "half of the hashes are not enough"
    incoming.expect(2, wanted.leaves[2:])
    assert incoming.prepare(old) == ((1, 3), False)
    for index in (1, 3):
        assert bytes(incoming.chunks[index]) == wanted.chunk(index)
    assert bytes(incoming.chunks[2]) != old.chunk(2), "what differs is not copied"


def test_a_state_of_another_length_is_no_help() -> None:
    longer = CanonicalState.first("train/0/0", np.zeros(99, np.float32), chunk_values=CHUNK)
    assert begin(state(7)).prepare(longer) == ((), False)


def test_what_a_failed_fetch_has_brought_is_not_asked_for_again() -> None:
    wanted = state(7)
    incoming = begin(wanted)
    for chunk in incoming.chunks:
        chunk[:] = bytes(len(chunk))  # fresh memory may hold anything, the right bytes too
    assert not incoming.was_asked_for(1)
    incoming.expect(0, wanted.leaves)
    assert incoming.was_asked_for(1) and incoming.missing(0, 4) == (0, 4)
    incoming.chunks[0][:] = wanted.chunk(0)
    incoming.chunks[3][:] = wanted.chunk(3)
    incoming.chunks[2][:9] = wanted.chunk(2)[:9]
    assert incoming.missing(0, 4) == (1, 2)
    incoming.chunks[1][:] = wanted.chunk(1)
    incoming.chunks[2][:] = wanted.chunk(2)
    assert incoming.missing(0, 4) == (0, 0) and incoming.there() == [0, 1, 2, 3]


def test_with_everything_here_no_hashes_are_wanted() -> None:
    incoming = begin(state(7))
    incoming.proven(0, state(7).leaves)
    assert incoming.prepare(state(3)) == ((0, 1, 2, 3), False)


def test_a_chunk_in_which_a_bit_has_flipped_is_not_taken_for_what_it_was() -> None:
    wanted, old = state(7), state(3)
    incoming = begin(wanted)
    incoming.expect(0, wanted.leaves)
    assert old.root() != wanted.root()  # hashes it
    old.theta.view(np.uint32)[9] ^= 1
    assert incoming.prepare(old) == ((1, 3), False)
