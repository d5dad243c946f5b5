"""Preemption traces: when machines of a spot market come and go. Synthetic and seeded.

``slots`` machines are wanted at all times. The first ones come within ten minutes. A machine lives
for a Weibull time of shape 0.7 (most preemptions strike young machines, as measured for
preemptible machines of public clouds), mean ``mean_life_s``, at most 24 h. Beside these single
losses the market takes back capacity: at exponential intervals a random 10 to 40 % of all machines
are lost in the same second, and none is given out for 5 to 60 minutes. A lost machine is replaced
after a log-normal wait (median 4 minutes, sigma 1.2).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

HOUR_S = 3600.0
LIFE_S_MAX = 24 * HOUR_S
LIFE_SHAPE = 0.7
WAIT_S_MEDIAN = 240.0
WAIT_SIGMA = 1.2
START_S = 600.0
RECLAIMED_MIN, RECLAIMED_MAX = 0.1, 0.4
DROUGHT_S_MIN, DROUGHT_S_MAX = 300.0, 3600.0


@dataclass(frozen=True, slots=True)
class Stay:
    """One machine: it works from ``begin_s`` to ``end_s``."""

    begin_s: float
    end_s: float


def spot_trace(
    seed: int,
    *,
    slots: int = 40,
    duration_s: float = 32 * HOUR_S,
    mean_life_s: float = 6 * HOUR_S,
    reclaim_every_s: float = 4 * HOUR_S,
) -> list[Stay]:
    """All stays that begin within the duration, by their beginning; see the module."""
    rng = random.Random(f"spot {seed}")
    droughts = _droughts(rng, duration_s, reclaim_every_s)
    scale_s = mean_life_s / math.gamma(1.0 + 1.0 / LIFE_SHAPE)
    stays = []
    for _ in range(slots):
        begin = rng.uniform(0.0, START_S)
        while begin < duration_s:
            life = min(LIFE_S_MAX, rng.weibullvariate(scale_s, LIFE_SHAPE))
            end = begin + life
            for start, _, share in droughts:
                if begin < start < end and rng.random() < share:
                    end = start
                    break
            stays.append(Stay(begin, end))
            begin = end + rng.lognormvariate(math.log(WAIT_S_MEDIAN), WAIT_SIGMA)
            for start, over, _ in droughts:
                if start <= begin < over:
                    begin = over + rng.uniform(0.0, START_S)
    return sorted(stays, key=lambda stay: (stay.begin_s, stay.end_s))


def _droughts(
    rng: random.Random, duration_s: float, every_s: float
) -> list[tuple[float, float, float]]:
    """(when capacity is taken back, when it is given out again, share of machines that is lost)."""
    found = []
    at = rng.expovariate(1.0 / every_s)
    while at < duration_s:
        over = at + rng.uniform(DROUGHT_S_MIN, DROUGHT_S_MAX)
        found.append((at, over, rng.uniform(RECLAIMED_MIN, RECLAIMED_MAX)))
        at = over + rng.expovariate(1.0 / every_s)
    return found
