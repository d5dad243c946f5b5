"""One channel's moves, apart from the entries that cause them (those are in test_ledger)."""

from __future__ import annotations

import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.channels import ChannelState, are_ranges
from tests.protocols.rounds_kit import TRAIN, VALUES, A, B, Log, hash_of, opening


def begun(scale: float | None = None) -> ChannelState:
    log = Log(A, B)
    channel = ChannelState(TRAIN, VALUES)
    body = opening(log.ledger, [A, B])
    channel.begin(5, body, 8)
    channel.chosen = e.RoundSet(body.key, (e.Coefficient(1, 1.0),))
    assert channel.is_open(body.key)
    if scale is not None:
        channel.commit(7, hash_of("result"), (A,), 1, scale)
    return channel


def test_a_commit_remembers_whom_the_result_is_made_of_and_its_scale() -> None:
    channel = begun(0.25)
    (done,) = channel.history
    assert (done.round, done.index, done.scale, done.held_by) == (0, 7, 0.25, (A,))
    assert done.contributors == ((max(A, B), 4.0, 1.0),)
    assert (channel.round, channel.open, channel.last_index) == (1, None, 7)
    assert channel.outcome(0) is done and channel.outcome(1) is None


def test_what_is_open_pins_its_state_and_who_was_listed() -> None:
    channel = begun()
    assert channel.pinned_hash(0) == hash_of("state 0")
    assert channel.listed[A] == (5, hash_of(f"given {A.hex()[:8]}"))
    channel.abort("lost")
    assert (channel.attempt, channel.aborted, channel.last_abort) == (1, 1, "lost")
    assert channel.pinned_hash(0) is None


def test_a_restart_forgets_what_comes_after_it() -> None:
    channel = begun(1.0)
    channel.restart(1, hash_of("rebuilt"))
    assert [x.round for x in channel.history] == [0]
    assert channel.pinned_hash(1) == hash_of("rebuilt")
    channel.restart(0, hash_of("first"))
    assert channel.history == [] and channel.pinned_hash(0) == hash_of("first")


def test_two_attempts_at_once_or_a_commit_of_nothing_are_bugs() -> None:
    channel = begun()
    opened = channel.open
    assert opened is not None
    with pytest.raises(AssertionError):
        channel.begin(6, opened, 8)
    channel.abort("x")
    with pytest.raises(AssertionError):
        channel.commit(7, hash_of("result"), (), 1)


@pytest.mark.parametrize("ranges", [((3, 3),), ((0, 11),), ((5, 7), (6, 8)), ((4, 5), (1, 2))])
def test_bad_ranges_are_found(ranges: tuple[tuple[int, int], ...]) -> None:
    assert are_ranges((), 10) and are_ranges(((0, 10),), 10) and are_ranges(((0, 5), (5, 10)), 10)
    assert not are_ranges(ranges, 10)
