"""The book of times: unions of spans, bytes by attempt, offsets from ROUND_OPENED."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain_peer import roundclock
from swarmtrain_peer.roundclock import RoundClock, merge
from swarmtrain_protocols.messages import RoundKey


def key(number: int, attempt: int = 0, channel: str = "train/0/0") -> RoundKey:
    return RoundKey(0, channel, number, attempt)


def test_figures_count_from_the_opening() -> None:
    clock = RoundClock()
    clock.opened(key(3), 100.0, b"own")
    clock.sent(b"own", 500, 100.5, 101.0)
    clock.sent(b"own", 500, 100.75, 101.5)  # to another peer at the same time
    clock.received(key(3), 700, 100.25, 100.5)
    clock.received(key(3), 300, 102.0, 102.25)
    clock.worked(key(3), "reduce", 101.5, 101.75)
    clock.worked(key(3), "apply", 103.0, 103.5)
    assert clock.figures([key(3)], 99.0) == {
        "bytes_up": 1000,
        "bytes_down": 1000,
        "t_open_offset_s": -1.0,
        "send_s": 1.0,
        "t_send_offset_s": 0.5,
        "send_spans_s": [[0.5, 1.5]],
        "receive_s": 0.5,
        "t_receive_offset_s": 0.25,
        "receive_spans_s": [[0.25, 0.5], [2.0, 2.25]],
        "reduce_s": 0.25,
        "t_reduce_offset_s": 1.5,
        "apply_s": 0.5,
        "t_apply_offset_s": 3.0,
    }


def test_attempts_are_apart_and_roots_follow_the_newest() -> None:
    clock = RoundClock()
    clock.opened(key(3), 10.0, b"own")
    clock.sent(b"own", 1, 10.0, 11.0)
    clock.opened(key(3, 1), 20.0, b"own")  # the same contribution, tried again
    clock.sent(b"own", 2, 20.0, 21.0)
    clock.names(b"result", key(3))
    clock.sent(b"result", 4, 20.0, 21.0)
    clock.sent(b"of nobody", 8, 20.0, 21.0)
    assert clock.figures([key(3)])["bytes_up"] == 5
    assert clock.figures([key(3, 1)])["bytes_up"] == 2
    assert clock.latest("train/0/0", 3) == key(3, 1)
    assert clock.latest("train/0/1", 3) is None


def test_what_was_not_seen_to_open_has_no_figures() -> None:
    clock = RoundClock()
    clock.received(key(1), 5, 0.0, 1.0)
    clock.worked(key(1), "apply", 0.0, 1.0)
    assert clock.figures([key(1)]) == {}
    assert not clock.is_busy(key(1))
    clock.opened(key(1), 0.0)
    assert not clock.is_busy(key(1))
    clock.worked(key(1), "apply", 0.0, 1.0)
    assert clock.is_busy(key(1))


def test_the_book_is_bounded() -> None:
    clock = RoundClock()
    for number in range(roundclock.ATTEMPTS_KEPT + 1):
        clock.opened(key(number), float(number))
    assert clock.figures([key(0)]) == {}
    assert clock.figures([key(1)]) != {}
    for number in range(roundclock.ROOTS_KEPT + 1):
        clock.names(number.to_bytes(4, "big"), key(1))
    clock.sent((0).to_bytes(4, "big"), 1, 0.0, 1.0)  # forgotten
    clock.sent((1).to_bytes(4, "big"), 2, 0.0, 1.0)
    assert clock.figures([key(1)])["bytes_up"] == 2


def test_few_spans_are_told_and_the_widest_gaps_stay() -> None:
    spans = [(0.0, 1.0), (1.1, 2.0), (9.0, 10.0), (10.2, 11.0)]
    assert merge(spans, 2) == [(0.0, 2.0), (9.0, 11.0)]
    assert merge(spans, 3) == [(0.0, 2.0), (9.0, 10.0), (10.2, 11.0)]


@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 6)).map(lambda p: (p[0], p[0] + p[1])),
        max_size=12,
    )
)
def test_a_union_is_disjoint_and_covers_the_same_seconds(spans: list[tuple[int, int]]) -> None:
    out = merge([(float(a), float(b)) for a, b in spans])
    assert all(before[1] < after[0] for before, after in itertools.pairwise(out))
    covered = {second for a, b in spans for second in range(a, b)}
    assert sum(b - a for a, b in out) == pytest.approx(len(covered))


def test_attempts_that_were_opened_together_are_told_as_one() -> None:
    clock = RoundClock()
    first, second = RoundKey(0, "train/0/0", 3, 0), RoundKey(0, "train/1/0", 3, 0)
    clock.opened(first, 10.0, b"a" * 32)
    clock.opened(second, 10.0, b"b" * 32)
    clock.sent(b"a" * 32, 100, 11.0, 12.0)
    clock.sent(b"b" * 32, 50, 11.5, 13.0)
    clock.worked(second, "apply", 14.0, 15.0)
    together = clock.figures([first, second])
    assert together["bytes_up"] == 150
    assert together["send_spans_s"] == [[1.0, 3.0]]
    assert together["send_s"] == 2.0, "time in which both were sent counts once"
    assert (together["apply_s"], together["t_apply_offset_s"]) == (1.0, 4.0)
    assert clock.figures([first])["bytes_up"] == 100
