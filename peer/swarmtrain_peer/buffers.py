"""Memory for frames of bulk connections: lent while one is under way, not kept by each connection.

A site has up to 32 bulk connections, most of which are idle between rounds; with two frames of a
megabyte each they would hold 64 MB for nothing, and more with every member that once owned a part.
"""

from __future__ import annotations

from collections import deque

import numpy as np

BUFFERS_KEPT = 8
"""Of those nobody uses: enough for one round after another, without asking the system again."""


class Buffers:
    """Writable buffers of ``nbytes`` bytes each. Any thread."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._free: deque[memoryview] = deque()

    def lend(self) -> memoryview:
        """One that nobody else has until it is given back; what it contains is not defined."""
        try:
            return self._free.pop()
        except IndexError:
            # Pages that are never written to take no memory: frames are often much smaller.
            return np.empty(self._nbytes, np.uint8).data

    def back(self, lent: memoryview | None) -> None:
        """The lender does not touch it again."""
        if lent is not None and len(self._free) < BUFFERS_KEPT:
            self._free.append(lent)
