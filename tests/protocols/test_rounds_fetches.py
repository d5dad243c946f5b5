"""Every fetch gets one answer, by its deadline."""

from __future__ import annotations

import math

import pytest

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import CancelFetch, Effect, Fetch
from swarmtrain_protocols.rounds.fetches import FETCH_BASE_TIMEOUT_S, Fetches
from tests.protocols.rounds_kit import A, B, hash_of, of_kind


class Desk:
    def __init__(self) -> None:
        self.out: list[Effect] = []
        self.fetches = Fetches(self.out)
        self.answers: list[tuple[int, float, str | None]] = []

    def start(self, now: float = 0.0, peer: bytes = A, count: int = 1) -> int:
        def done(at: float, reason: str | None) -> None:
            self.answers.append((ticket, at, reason))

        ticket = self.fetches.start(now, peer, hash_of("x"), 3, count, "purpose", done)  # type: ignore[arg-type]
        return ticket


def test_a_fetch_is_asked_for_and_answered_once() -> None:
    desk = Desk()
    one, two = desk.start(), desk.start(peer=B, count=2)
    assert desk.out == [
        Fetch(one, A, hash_of("x"), 3, 1, "purpose"),
        Fetch(two, B, hash_of("x"), 3, 2, "purpose"),
    ]
    desk.fetches.finished(1.0, two, None)
    desk.fetches.finished(2.0, two, "late echo")
    desk.fetches.finished(2.0, one, "unknown")
    desk.fetches.finished(2.0, 999, None)
    assert desk.answers == [(two, 1.0, None), (one, 2.0, "unknown")]
    assert desk.fetches.deadline() == math.inf


def test_a_cancelled_fetch_is_never_answered() -> None:
    desk = Desk()
    ticket = desk.start()
    desk.fetches.cancel(ticket)
    desk.fetches.cancel(ticket)
    desk.fetches.finished(1.0, ticket, None)
    desk.fetches.tick(1e9)
    assert desk.answers == []
    assert of_kind(desk.out, CancelFetch) == [CancelFetch(ticket)]


def test_a_broken_link_answers_at_once() -> None:
    desk = Desk()
    one, two, three = desk.start(), desk.start(peer=B), desk.start()
    desk.fetches.disconnected(5.0, A)
    assert desk.answers == [(one, 5.0, "disconnected"), (three, 5.0, "disconnected")]
    desk.fetches.finished(6.0, two, None)
    assert desk.answers[-1] == (two, 6.0, None)


def test_silence_ends_at_the_deadline_which_grows_with_the_bytes() -> None:
    desk = Desk()
    small = desk.start(now=10.0)
    assert desk.fetches.deadline() > 10.0 + FETCH_BASE_TIMEOUT_S
    short = desk.fetches.deadline()
    desk.fetches.tick(short - 0.001)
    assert desk.answers == []
    desk.fetches.tick(short)
    assert desk.answers == [(small, short, "timeout")]
    desk.start(now=10.0, count=100)
    assert desk.fetches.deadline() - 10.0 > 50 * (short - 10.0 - FETCH_BASE_TIMEOUT_S)


def test_an_answer_may_cancel_the_next_one() -> None:
    """Callbacks of one loop act on its other fetches."""
    desk = Desk()
    tickets: list[int] = []

    def cancel_other(at: float, reason: str | None) -> None:
        desk.answers.append((tickets[0], at, reason))
        desk.fetches.cancel(tickets[1])

    tickets.append(desk.fetches.start(0.0, A, hash_of("x"), 0, 1, None, cancel_other))
    tickets.append(desk.start())
    desk.fetches.disconnected(1.0, A)
    assert desk.answers == [(tickets[0], 1.0, "disconnected")]


@pytest.mark.parametrize("count", [0, limits.CHUNKS_PER_FETCH_MAX + 1])
def test_a_range_has_bounds(count: int) -> None:
    with pytest.raises(AssertionError):
        Desk().start(count=count)
