"""How many micro-batches a driver has under way: additive increase, multiplicative decrease."""

from __future__ import annotations

PER_STAGE = 2
"""Micro-batches in flight per block stage that keep every stage busy in both directions."""
PAUSE_S = 1.0
"""One cause makes many requests late at once: the window shrinks once per this time."""


class Window:
    """``size`` starts at its maximum, 2 micro-batches per stage, and never falls below one."""

    def __init__(self, stages: int) -> None:
        self.size_max = float(PER_STAGE * max(1, stages))
        self._size = self.size_max
        self._shrunk_at = float("-inf")

    @property
    def size(self) -> int:
        return int(self._size)

    def grow(self) -> None:
        """A micro-batch went through: about one more per window of them."""
        self._size = min(self.size_max, self._size + 1.0 / self._size)

    def shrink(self, now: float) -> None:
        """A request was late or refused for want of room: half."""
        if now >= self._shrunk_at + PAUSE_S:
            self._shrunk_at = now
            self._size = max(1.0, self._size / 2)
