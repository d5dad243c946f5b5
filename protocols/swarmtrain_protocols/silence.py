"""How long a peer may be silent before it counts as gone: by the delays that were measured.

The estimator of TCP's retransmission timer (Jacobson 1988, RFC 6298): a smoothed round trip and its
mean deviation. A peer that has nothing to say is asked after ``KEEPALIVE_INTERVAL_S``; the answer
may take several times what answers took so far. What this side itself slept through is no silence
of the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from swarmtrain_protocols import limits

SAMPLES_MIN = 3
"""Before that many round trips were measured, nothing is known of a link."""
TIMES = 4.0
ASLEEP_S = 2.0
"""Whoever looks this much later than it meant to has stood still itself."""


@dataclass(slots=True)
class RoundTrips:
    """Their smoothed time and its mean deviation (RFC 6298 §2)."""

    samples: int = 0
    smoothed_s: float = 0.0
    deviation_s: float = 0.0

    def took(self, rtt_s: float) -> None:
        """One more was measured."""
        if not self.samples:
            self.smoothed_s, self.deviation_s = rtt_s, rtt_s / 2
        else:
            off_s = abs(self.smoothed_s - rtt_s)
            self.deviation_s = 0.75 * self.deviation_s + 0.25 * off_s
            self.smoothed_s = 0.875 * self.smoothed_s + 0.125 * rtt_s
        self.samples += 1


class Silence:
    """Of one link."""

    def __init__(self) -> None:
        self.trips = RoundTrips()
        self.bound_s = limits.IDLE_TIMEOUT_S
        """Seconds of silence after which the link is over."""

    def measured(self, rtt_s: float) -> None:
        """A ping was answered after ``rtt_s``."""
        trips = self.trips
        trips.took(rtt_s)
        if trips.samples >= SAMPLES_MIN:
            answer_s = TIMES * (trips.smoothed_s + 4 * trips.deviation_s)
            bound_s = limits.KEEPALIVE_INTERVAL_S + answer_s
            self.bound_s = min(max(bound_s, limits.SILENCE_S_MIN), limits.SILENCE_S_MAX)


class FrameClock:
    """When the frame that has not arrived whole began to.

    Whoever drips a frame byte by byte keeps a link from being silent, and memory of this side.
    """

    def __init__(self) -> None:
        self.began_at = math.inf
        self._taken = 0

    def received(self, now: float, taken: int, rest_bytes: int) -> None:
        """``taken`` frames have come so far, and ``rest_bytes`` of the next."""
        if not rest_bytes:
            self.began_at = math.inf
        elif taken != self._taken or self.began_at == math.inf:
            self.began_at = now
        self._taken = taken

    def deadline(self) -> float:
        """When the frame must be there; ``math.inf`` between frames."""
        return self.began_at + limits.FRAME_TIMEOUT_S
