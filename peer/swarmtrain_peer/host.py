"""The only reader of the machine's clocks, entropy and processor count.

Everything else takes `now` as an argument or calls these functions, so that one search finds every
place where the world leaks in (tests/test_architecture.py does that search).
"""

from __future__ import annotations

import os
import random
import time


def monotonic_s() -> float:
    """Seconds on a clock that never goes back; its zero has no meaning."""
    return time.monotonic()


def wall_s() -> float:
    """Seconds since 1970-01-01 UTC, for people and log files; never for deadlines."""
    return time.time()


def entropy(nbytes: int) -> bytes:
    """Bytes from the operating system, for keys and nonces."""
    return os.urandom(nbytes)


def seeded_random() -> random.Random:
    """A generator for choices (never for keys), seeded from the operating system."""
    return random.Random(int.from_bytes(os.urandom(16), "little"))


def cpu_count() -> int:
    """Processors this process may run on; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)
