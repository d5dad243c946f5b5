"""Rates of a site: measured where bytes went, never above its cap."""

from __future__ import annotations

from swarmtrain_peer.siterate import SiteRate

MB = 1e6


def figures(up: float, up_s: float, down: float, down_s: float) -> dict[str, float]:
    return {"bytes_up": up, "send_s": up_s, "bytes_down": down, "receive_s": down_s}


def test_bytes_over_busy_seconds_and_the_median_of_rounds() -> None:
    rate = SiteRate()
    assert rate.bytes_per_s == (0.0, 0.0)
    for seconds in (1.0, 2.0, 50.0):
        rate.note(figures(4 * MB, seconds, 8 * MB, seconds))
    assert rate.bytes_per_s == (2 * MB, 4 * MB)


def test_small_messages_and_rounds_without_traffic_say_nothing() -> None:
    rate = SiteRate()
    rate.note(figures(1000, 1.0, 8 * MB, 0.0))
    rate.note({})
    assert rate.bytes_per_s == (0.0, 0.0)


def test_a_cap_is_known_at_once_and_bounds_what_is_measured() -> None:
    rate = SiteRate((int(MB), 0))
    assert rate.bytes_per_s == (MB, 0.0)
    rate.note(figures(4 * MB, 2.0, 4 * MB, 2.0))  # a burst went through before the cap held
    assert rate.bytes_per_s == (MB, 2 * MB)
    rate.note(figures(1 * MB, 10.0, 4 * MB, 2.0))
    rate.note(figures(1 * MB, 10.0, 4 * MB, 2.0))
    assert rate.bytes_per_s == (0.1 * MB, 2 * MB), "the path is slower than the cap"
