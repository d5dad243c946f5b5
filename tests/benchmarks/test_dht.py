"""The DHT benchmark in small: every key found, also after half of the processes are killed."""

from __future__ import annotations

import pytest

from benchmarks import dht


@pytest.mark.slow
def test_every_key_is_found_after_half_of_the_processes_are_killed() -> None:
    result = dht.measure(6, keys=10, rounds=1, seed=2)
    assert result["get"]["wrong"] == 0
    after = result["get_after_kill"]
    assert (after["found"], after["of"]) == (10, 10)
    assert result["store"]["calls"] == result["get"]["calls"] == 10


def test_times_are_in_order() -> None:
    figures = dht.times([0.003, 0.001, 0.002])
    assert figures == {"median_ms": 2.0, "p95_ms": 2.0, "max_ms": 3.0, "calls": 3}
