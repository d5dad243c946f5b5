"""The machine's clocks and counts."""

from __future__ import annotations

import os
import time

from swarmtrain_peer import host


def test_clocks_are_the_machines() -> None:
    before = time.monotonic()
    assert before <= host.mono_s() <= time.monotonic()
    assert abs(host.wall_s() - time.time()) < 5.0


def test_the_clock_of_a_thread_counts_only_its_own_work() -> None:
    before = host.thread_cpu_s()
    begin_s = time.monotonic()
    while host.thread_cpu_s() - before < 0.01:
        assert time.monotonic() - begin_s < 10.0
    assert host.thread_cpu_s() - before <= time.monotonic() - begin_s + 0.001


def test_entropy_has_the_length_asked_for_and_never_repeats() -> None:
    assert len(host.entropy(32)) == 32
    assert host.entropy(32) != host.entropy(32)


def test_cpu_count_respects_the_affinity_mask() -> None:
    assert 1 <= host.cpu_count() <= (os.cpu_count() or 1)
