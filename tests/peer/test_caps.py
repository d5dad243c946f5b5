"""Caps on bytes per second, by a clock that the test moves."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from swarmtrain_peer import caps
from swarmtrain_peer.caps import BURST_S, QUANTUM_BYTES, Cap, Queue

RATE = 1_000_000
FRAME = 64 * 1024


class Clock:
    now = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    found = Clock()
    monkeypatch.setattr(caps.host, "mono_s", lambda: found.now)
    yield found


def test_what_passes_in_a_minute_is_within_the_cap_and_uses_it(clock: Clock) -> None:
    cap, passed = Cap(RATE), 0
    while clock.now < 60.0:
        passed += cap.take(FRAME)
        clock.now += 0.013
    assert 0.99 * 60 * RATE <= passed <= 60 * RATE + cap.burst_bytes


def test_a_pause_saves_up_no_more_than_a_burst(clock: Clock) -> None:
    cap = Cap(RATE)
    clock.now = 3600.0
    passed = 0
    while granted := cap.take(FRAME):
        passed += granted
    assert RATE * BURST_S - QUANTUM_BYTES < passed <= RATE * BURST_S


def test_little_bits_are_not_handed_out_but_to_those_who_want_no_more(clock: Clock) -> None:
    cap = Cap(RATE)
    while cap.take(FRAME):
        pass
    left = cap.burst_bytes
    assert cap.take(FRAME) == 0 and 0 < cap.wait_s() <= QUANTUM_BYTES / RATE
    clock.now += cap.wait_s() / 2
    assert cap.take(FRAME) == 0
    assert cap.take(10) in (0, 10)
    clock.now += cap.wait_s() + 1e-9
    assert QUANTUM_BYTES <= cap.take(FRAME) < left


def test_control_passes_at_once_and_is_missing_for_bulk(clock: Clock) -> None:
    cap = Cap(RATE)
    cap.charge(3 * RATE)
    assert cap.take(FRAME) == 0
    assert cap.wait_s() == pytest.approx(3.0 - BURST_S + QUANTUM_BYTES / RATE)
    clock.now += 3.0
    assert cap.take(FRAME) > 0
    granted = cap.take(QUANTUM_BYTES)
    before = cap.wait_s()
    cap.charge(-granted)
    assert cap.wait_s() <= before


def test_no_cap_grants_all_and_waits_for_nothing() -> None:
    cap = Cap(0)
    cap.charge(1 << 40)
    assert cap.take(1 << 30) == 1 << 30 and cap.wait_s() == 0.0


def test_a_slow_cap_lets_a_whole_quantum_pass(clock: Clock) -> None:
    """At 1 kB/s a burst of 0.1 s is less than a quantum: it must come through all the same."""
    cap, passed = Cap(1000), 0
    while clock.now < 600.0:
        passed += cap.take(FRAME)
        clock.now += 0.5
    assert 0.95 * 600_000 <= passed <= 600_000 + cap.burst_bytes


def test_those_who_wait_are_called_in_their_order() -> None:
    queue = Queue(Cap(50_000_000))
    called: list[int] = []
    last = threading.Event()
    for number in range(5):
        queue.wait(lambda number=number: called.append(number))  # type: ignore[misc]
    queue.wait(last.set)
    assert last.wait(20.0) and called == [0, 1, 2, 3, 4]
    queue.close()


def test_closing_calls_nobody_any_more() -> None:
    starved = Cap(1)
    starved.charge(1_000_000)
    queue = Queue(starved)
    called: list[int] = []
    queue.wait(lambda: called.append(1))
    queue.close()
    assert called == []
    Queue(starved).close()
