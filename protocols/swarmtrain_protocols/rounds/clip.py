"""How much of a contribution counts if it is louder than others: pure functions (spec 15).

The leader has every contribution's norm from the owners of its parts and writes coefficients that
contain the clip factor, so that all owners apply the same one without computing it. The log keeps
the norms beside them, so that every member finds who was clipped, and by how much.
"""

from __future__ import annotations

import math
import statistics
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.rounds import effects as fx

FEW = 3
"""Of fewer contributions nobody can say which one is loud: earlier rounds are the measure."""


class Channel(Protocol):
    """What the log says of a channel (``channels.ChannelState``)."""

    open: e.RoundOpened | None
    norms: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Clipped:
    """A contribution that counts in part: its norm was ``length``, weighed by its discount."""

    member: bytes
    length: float
    reference: float
    factor: float


def legal_squares(squares: Sequence[float], count: int) -> bool:
    """Whether an owner can honestly report these sums of squares of ``count`` contributions."""
    return len(squares) == count and all(0.0 <= square < math.inf for square in squares)


def norm_of(squares: Sequence[float]) -> float:
    """Norm of a vector whose parts, in part order, have these sums of squares (binary64)."""
    total = 0.0
    for square in squares:
        total += square
    return math.sqrt(total)


def reference_of(lengths: Sequence[float], kept: Sequence[float]) -> float:
    """What the contributions of a set are measured by, 0: nothing to go by.

    ``lengths``: norms times discounts of the set. ``kept``: references of its last committed
    rounds after clipping, oldest first. Upper medians: where half of the members do less because
    they are slower, the others' work counts in full. Zeros are nobody's measure.
    """
    usable = [length for length in lengths if length > 0.0]
    usual = statistics.median_high(kept) if kept else 0.0
    if not usable:
        return usual
    if len(usable) < FEW:
        return usual or max(usable)
    return max(statistics.median_high(usable), usual)


def factor_of(length: float, reference: float) -> float:
    """1, or what brings ``length`` to ``CLIP_NORM_FACTOR`` times the reference."""
    bound = limits.CLIP_NORM_FACTOR * reference
    return 1.0 if reference <= 0.0 or length <= bound else bound / length


def coefficients_of(weights: Sequence[float], factors: Sequence[float] = ()) -> list[float]:
    """``fp32(f_i · w_i / sum of w)``, the sum taken in fp64 in member order.

    ``factors``: of clipping, 1 for everybody if there are none; what they take goes to nobody else.
    """
    total = 0.0
    for weight in weights:
        total += weight
    assert total > 0
    shares = zip(factors or [1.0] * len(weights), weights, strict=True)
    return [fp32(f * w / total) for f, w in shares]


def fp32(value: float) -> float:
    """The nearest fp32 value of a binary64 one, ties to even (IEEE 754)."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def keep(kept: Sequence[float], lengths: Sequence[float]) -> tuple[float, ...]:
    """What is kept once a round with these lengths, clipped, is committed."""
    usable = [length for length in lengths if length > 0.0]
    newest = (*kept, statistics.median_high(usable)) if usable else tuple(kept)
    return newest[-limits.CLIP_ROUNDS_KEPT :]


# -- of entries -----------------------------------------------------------------------------------


def legal_norms(body: e.RoundSet) -> bool:
    """Whether the norms of a set are those of its contributions; none: nobody measured."""
    return not body.norms or legal_squares(body.norms, len(body.coefficients))


def coefficients(
    opened: e.RoundOpened, indices: Sequence[int], norms: Sequence[float], kept: Sequence[float]
) -> tuple[e.Coefficient, ...]:
    """The coefficients of a set, by weight and by norm (none: nobody is clipped)."""
    listed = [opened.contributors[index] for index in indices]
    weights = [item.samples * item.discount for item in listed]
    lengths = _lengths(opened, indices, norms)
    reference = reference_of(lengths, kept)
    values = coefficients_of(weights, [factor_of(length, reference) for length in lengths])
    return tuple(e.Coefficient(i, value) for i, value in zip(indices, values, strict=True))


def clipped(opened: e.RoundOpened, chosen: e.RoundSet, kept: Sequence[float]) -> list[Clipped]:
    """Who counts in part in a set, in member order."""
    indices = [item.index for item in chosen.coefficients]
    lengths = _lengths(opened, indices, chosen.norms)
    reference = reference_of(lengths, kept)
    found = []
    for index, length in zip(indices, lengths, strict=False):
        factor = factor_of(length, reference)
        if factor < 1.0:
            member = opened.contributors[index].member
            found.append(Clipped(member, length, reference, factor))
    return found


def notices(channel: Channel, chosen: e.RoundSet) -> list[fx.Notice]:
    """What everybody is told of those who count in part in the set just chosen."""
    assert channel.open is not None
    return [
        fx.Notice(
            "contribution_clipped",
            {
                "peer": one.member.hex(),
                "key": str(chosen.key),
                "norm": one.length,
                "reference": one.reference,
                "factor": one.factor,
            },
        )
        for one in clipped(channel.open, chosen, channel.norms)
    ]


def kept_after(
    opened: e.RoundOpened, chosen: e.RoundSet, kept: Sequence[float]
) -> tuple[float, ...]:
    """What a channel keeps of a committed set."""
    indices = [item.index for item in chosen.coefficients]
    lengths = _lengths(opened, indices, chosen.norms)
    reference = reference_of(lengths, kept)
    return keep(kept, [factor_of(length, reference) * length for length in lengths])


def _lengths(opened: e.RoundOpened, indices: Sequence[int], norms: Sequence[float]) -> list[float]:
    """Norms times discounts: what old displacement weighs less, it may be longer."""
    if not norms:
        return []
    return [n * opened.contributors[i].discount for i, n in zip(indices, norms, strict=True)]
