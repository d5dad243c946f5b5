"""host.py: the clocks and the entropy are the operating system's."""

from __future__ import annotations

import os
import time

from swarmtrain_peer import host


def test_clocks_are_the_operating_systems() -> None:
    before, value, after = time.monotonic(), host.monotonic_s(), time.monotonic()
    assert before <= value <= after
    before, value, after = time.time(), host.wall_s(), time.time()
    assert before <= value <= after


def test_entropy_has_the_length_asked_for_and_does_not_repeat() -> None:
    assert len(host.entropy(32)) == 32
    assert host.entropy(32) != host.entropy(32)


def test_two_generators_differ() -> None:
    assert host.seeded_random().random() != host.seeded_random().random()


def test_cpu_count_is_what_the_scheduler_allows() -> None:
    assert 1 <= host.cpu_count() <= (os.cpu_count() or 1)
