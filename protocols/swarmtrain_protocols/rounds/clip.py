"""How much of a contribution counts if it is louder than others: pure functions (spec 15).

The leader has every contribution's norm from the owners of its parts and writes coefficients that
contain the clip factor, so that all owners apply the same one without computing it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from swarmtrain_protocols import limits
from swarmtrain_protocols.rounds.plan import fp32

Kept = Mapping[int, Sequence[float]]
"""Clipped norms of committed contributions by lateness, oldest first."""


def norm_of(squares: Sequence[float]) -> float:
    """Norm of a vector whose parts, in part order, have these sums of squares (binary64).

    A sum that no owner can honestly report (negative, NaN, infinite) makes the norm infinite.
    """
    total = 0.0
    for square in squares:
        if not 0.0 <= square < math.inf:
            return math.inf
        total += square
    return math.sqrt(total)


def references(late: Sequence[int], norms: Sequence[float], kept: Kept) -> list[float]:
    """For each contribution of a round the norm that it is measured by, 0: nothing to go by.

    The lower median of the norms of the same lateness, of this round and of those kept; of all of
    them if nothing else has that lateness. Zero and infinite norms are nobody's measure.
    """
    known: dict[int, list[float]] = {age: list(values) for age, values in kept.items()}
    for age, norm in zip(late, norms, strict=True):
        known.setdefault(age, []).append(norm)
    usable = {age: [n for n in values if 0.0 < n < math.inf] for age, values in known.items()}
    everything = [norm for age in sorted(usable) for norm in usable[age]]
    found: list[float] = []
    for age in late:
        values = usable[age] if len(usable[age]) > 1 else everything
        found.append(statistics.median_low(values) if values else 0.0)
    return found


def factor_of(norm: float, reference: float) -> float:
    """1, or what brings ``norm`` to ``CLIP_NORM_FACTOR`` times the reference; 0 if infinite."""
    if norm == math.inf:
        return 0.0
    bound = limits.CLIP_NORM_FACTOR * reference
    return 1.0 if reference <= 0.0 or norm <= bound else bound / norm


def clipped_coefficients(weights: Sequence[float], factors: Sequence[float]) -> list[float]:
    """``fp32(f_i · w_i / sum of w)``: what is clipped away goes to nobody else."""
    total = 0.0
    for weight in weights:
        total += weight
    assert total > 0
    return [fp32(f * w / total) for f, w in zip(factors, weights, strict=True)]


def keep(kept: Kept, late: Sequence[int], norms: Sequence[float]) -> dict[int, tuple[float, ...]]:
    """What is kept once a round with these clipped norms is committed."""
    found = {age: list(values) for age, values in kept.items()}
    for age, norm in zip(late, norms, strict=True):
        if 0.0 < norm < math.inf:
            found.setdefault(age, []).append(norm)
    newest = {age: tuple(values[-limits.CLIP_NORMS_KEPT :]) for age, values in found.items()}
    return dict(sorted(newest.items()))
