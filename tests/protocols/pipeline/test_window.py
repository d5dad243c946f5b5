"""Additive increase, multiplicative decrease, between one and two per stage."""

from __future__ import annotations

from swarmtrain_protocols.pipeline.window import PAUSE_S, Window


def test_it_starts_full_and_never_exceeds_two_per_stage() -> None:
    window = Window(4)
    assert window.size == 8
    window.grow()
    assert window.size == 8


def test_one_cause_halves_it_once_and_it_never_falls_below_one() -> None:
    window = Window(4)
    window.shrink(10.0)
    window.shrink(10.0 + PAUSE_S / 2)
    assert window.size == 4
    for n in range(1, 9):
        window.shrink(10.0 + n * PAUSE_S)
    assert window.size == 1


def test_a_window_of_successes_adds_about_one() -> None:
    window = Window(8)
    window.shrink(0.0)
    assert window.size == 8
    for _ in range(9):
        window.grow()
    assert window.size == 9
    for _ in range(200):
        window.grow()
    assert window.size == 16
