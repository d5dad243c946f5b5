"""How many bytes per second this site carries up and down, as told to the leader (spec 08 §1.4).

Measured on what rounds move anyway: bytes of an attempt over the seconds in which any of them were
under way. A cap is known without measuring.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

ROUNDS_KEPT = 8
SAMPLE_BYTES_MIN = 256 * 1024
"""Less says more about latency than about the path."""


class SiteRate:
    """One site's two rates; ``caps_bytes_per_s`` are up and down, 0: none."""

    def __init__(self, caps_bytes_per_s: tuple[int, int] = (0, 0)) -> None:
        self._caps = caps_bytes_per_s
        self._seen: tuple[deque[float], deque[float]] = (
            deque(maxlen=ROUNDS_KEPT),
            deque(maxlen=ROUNDS_KEPT),
        )

    def note(self, figures: Mapping[str, Any]) -> None:
        """What ``RoundClock.figures`` says of an attempt that is over."""
        for seen, way, phase in zip(self._seen, ("up", "down"), ("send", "receive"), strict=True):
            nbytes, took_s = figures.get(f"bytes_{way}", 0), figures.get(f"{phase}_s", 0.0)
            if nbytes >= SAMPLE_BYTES_MIN and took_s > 0.0:
                seen.append(nbytes / took_s)

    @property
    def bytes_per_s(self) -> tuple[float, float]:
        """Up and down; 0: not known."""
        up, down = (
            min(cap or measured, measured or cap)
            for cap, measured in zip(
                self._caps, (statistics.median(s) if s else 0.0 for s in self._seen), strict=True
            )
        )
        return float(up), float(down)
