"""Members that differ: the pace of rounds, when they close, what being late costs. Spec 08 §2.8.

Pure functions of numbers that members say and that the log keeps, so that one slow member never
sets the pace of the others, and its work counts all the same.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from swarmtrain_protocols.rounds.pace import SECONDS_MAX

GRACE_SHARE = 0.25
"""Of a phase: how long the rest is waited for once half of the expected are ready. Where exchanges
run behind the next phase that delays an attempt, and takes no trainer's time."""
GRACE_S_MIN = 2.0
"""A process that the kernel has put aside for a moment is not late."""
GRACE_S_MAX = 60.0
PATIENCE_S_MIN = 5.0
HIDDEN_SHARE = 0.75
"""Of what is left of a phase: so long may bytes take that are hidden behind the next phase."""
OPEN_SHARE = 0.1
"""Of a phase, where trainers wait for the outcome."""
PHASES_KEPT = 3
"""Of each member: their median is its phase, so that one hiccup changes nothing."""
RATE_CAP_BYTES_PER_S = 100e6
"""Faster paths are all alike: what limits there is not the path."""
RATE_ALIKE = 1.5
"""Rates within this factor of the median count as the median: they are measured, and noisy."""
RATE_FACTOR_MAX = 4.0
"""Nobody is planned for with more than this many times the median, whatever it claims."""


def lateness(round_number: int, base_round: int, hidden: bool) -> int:
    """Rounds by which a contribution is later than its overlap mode makes everybody.

    ``hidden``: exchanges run behind the next phase, so that a base one round old is the rule.
    """
    return max(0, round_number - base_round - (1 if hidden else 0))


def discount_of(late_rounds: int, age: int = 0) -> float:
    """Factor on the weight of a contribution: (1 + late)^-1/2, 1 for one in time.

    ``age``: earlier phases in it. Their displacement adds up, so its weight is that of one phase.
    """
    return 1.0 / math.sqrt(1.0 + late_rounds) / (1.0 + age)


def opening_grace_s(pace_s: float, hidden: bool) -> float:
    """Seconds from when half of the expected are ready to when the others are not waited for."""
    share = GRACE_SHARE if hidden else OPEN_SHARE
    return min(GRACE_S_MAX, max(GRACE_S_MIN, share * pace_s))


def patience_s(pace_s: float) -> float:
    """Seconds from the first that is ready to when even half of the expected are not awaited."""
    return max(PATIENCE_S_MIN, pace_s)


def closing_grace_s(pace_s: float, half_took_s: float, hidden: bool) -> float:
    """Seconds from when half of the contributions were delivered to when the set is closed.

    Args:
        pace_s: the phase that is logged with the attempt, above 0.
        half_took_s: from the opening to that moment; the way back will take as long again.
        hidden: it costs no compute as long as the outcome comes before the next boundary.
    """
    if hidden:
        return max(GRACE_S_MIN, HIDDEN_SHARE * (pace_s - 2.0 * half_took_s))
    return max(GRACE_S_MIN, OPEN_SHARE * pace_s)


def half_of(people: int) -> int:
    """How many are half of ``people``, rounded up: the faster half sets the pace."""
    return -(-people // 2)


class Paces:
    """The newest phases that members have said, in seconds; of one channel and leadership."""

    def __init__(self) -> None:
        self._said: dict[bytes, deque[float]] = {}
        self._middle: dict[bytes, float] = {}
        """Each member's phase."""
        self._pace_s: float | None = 0.0
        """None: somebody has said something since."""

    def said(self, member: bytes, phase_s: float) -> None:
        """A phase of ``member``; what cannot be is not counted."""
        if 0.0 < phase_s < SECONDS_MAX:
            said = self._said.setdefault(member, deque(maxlen=PHASES_KEPT))
            said.append(phase_s)
            self._middle[member] = statistics.median_low(said)
            self._pace_s = None

    def keep(self, members: Iterable[bytes]) -> None:
        """Forget everybody else."""
        known = set(members)
        for member in [member for member in self._said if member not in known]:
            del self._said[member], self._middle[member]
            self._pace_s = None

    def pace_s(self) -> float:
        """The lower median of the phases of all; 0 if nobody's is known."""
        if self._pace_s is None:
            phases = self._middle.values()
            self._pace_s = statistics.median_low(phases) if phases else 0.0
        return self._pace_s


def usable_rates(owners: Sequence[bytes], rates: Mapping[bytes, float]) -> dict[bytes, float]:
    """What the part plan goes by: rates of ``owners`` relative to their median.

    ``rates``: bytes per second, the lower one of up and down, 0 if not known. Empty if there is
    nothing to tell the owners apart by.
    """
    known = {k: min(rates[k], RATE_CAP_BYTES_PER_S) for k in owners if rates.get(k, 0.0) > 0.0}
    if not known:
        return {}
    middle = statistics.median(known.values())
    relative: dict[bytes, float] = {}
    for owner in owners:
        factor = min(known.get(owner, middle) / middle, RATE_FACTOR_MAX)
        relative[owner] = 1.0 if 1 / RATE_ALIKE <= factor <= RATE_ALIKE else factor
    return relative if any(factor != 1.0 for factor in relative.values()) else {}


def shares_of(rates: Sequence[float], receivers: int) -> list[float]:
    """Shares q of a vector with which the slowest owner is done first; they sum to 1.

    Whoever owns the share q of a round with n receivers sends its own contribution to the other
    owners and its part of the result to all others: (1 - q) + (n - 1) q = 1 + (n - 2) q vectors.
    With rate r that takes (1 + (n - 2) q) / r; the smallest common time T that is enough for all
    gives q = max(0, (T r - 1) / (n - 2)). An owner whose own contribution takes that long already
    owns nothing.
    """
    each = max(1, receivers - 2)

    def owned(time: float) -> list[float]:
        return [max(0.0, (time * rate - 1.0) / each) for rate in rates]

    low, high = 0.0, (1.0 + each) / max(rates)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(owned(middle)) < 1.0 else (low, middle)
    found = owned(high)
    total = sum(found)
    return [share / total for share in found]


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Whole chunks by largest remainder, ties to the earlier owner; they sum to ``total``."""
    exact = [share * total for share in shares]
    counts = [math.floor(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for index in order[: total - sum(counts)]:
        counts[index] += 1
    return counts
