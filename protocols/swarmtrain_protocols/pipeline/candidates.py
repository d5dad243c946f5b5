"""Weights for a stage whose last holder is gone: arithmetic on flat vectors (spec 11).

Inner stages have equal layouts, so a lost one can be guessed from its neighbours: CheckFree's
average by gradient norms (arXiv 2506.15461), a copy of either, a near-identity whose blocks hardly
add to the residual stream, or fresh values. Every function is bit-identical on every machine:
one fp32 operation at a time, and random numbers from integers alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, TypeAlias

import numpy as np

from swarmtrain_protocols.codecs.base import F32
from swarmtrain_protocols.errors import LocalProtocolError

TensorLayout: TypeAlias = Sequence[tuple[str, tuple[int, ...]]]
"""(name, shape) of the tensors of a stage, in the order of its flat vector."""
Weighting = Literal["plain", "squared", "uniform"]

STD = 0.02
RATIO_MAX = 3.0
"""One lopsided gradient norm must not turn the average into a copy of that neighbour."""
LEARNING_RATE_FACTOR = 1.1
"""CheckFree's for a recovered stage; here it decays to 1 over ``LEARNING_RATE_STEPS``."""
LEARNING_RATE_STEPS = 500
_OUTPUTS = re.compile(r"\.(out|down|o_proj|out_proj|down_proj|c_proj|wo|w2)\.(weight|bias)$")
_SLICE = 1 << 18
# The sum of eight u16 has this standard deviation: sqrt(8 (2^32 - 1) / 12).
_SUM_STD = math.sqrt(8 * (2**32 - 1) / 12)
_SUM_MEAN_TIMES_2 = 8 * 65535


def is_output_projection(name: str) -> bool:
    """Whether a tensor of a block writes to the residual stream, judged by its name."""
    return _OUTPUTS.search(name) is not None


def values_of(layout: TensorLayout) -> int:
    """Number of values of a flat vector of this layout."""
    return sum(math.prod(shape) for _, shape in layout)


def fresh(layout: TensorLayout, seed: int, stage: int, depth: int) -> F32:
    """Initial values f32[n] of a stage, a pure function of its arguments.

    Matrices are nearly Gaussian with standard deviation 0.02, output projections with
    0.02 / sqrt(2 ``depth``) as in GPT-2; vectors are 1 (gains) or, if named bias, 0.

    Args:
        stage: number of the stage; the ends are 0.
        depth: number of blocks of the whole model.
    """
    if depth < 1 or not layout:
        raise LocalProtocolError("fresh values of nothing", f"depth {depth}, {len(layout)} tensors")
    stream = np.random.Philox(key=np.array([seed, stage], np.uint64))
    out = np.empty(values_of(layout), np.float32)
    start = 0
    for name, shape in layout:
        stop = start + math.prod(shape)
        part = out[start:stop]
        if len(shape) > 1:
            std = STD / math.sqrt(2 * depth) if is_output_projection(name) else STD
            for first in range(0, part.size, _SLICE):
                _gaussian(stream, std, part[first : first + _SLICE])
        else:
            part[:] = 0.0 if name.endswith("bias") else 1.0
        start = stop
    return out


def _gaussian(stream: np.random.Philox, std: float, out: F32) -> None:
    words = stream.random_raw(2 * out.size).view(np.uint16).reshape(-1, 8)
    sums = 2 * words.sum(axis=1, dtype=np.int64) - _SUM_MEAN_TIMES_2
    # Integers below 2^21 are exact in fp32; the product is the only rounding.
    np.multiply(sums.astype(np.float32), np.float32(std / (2 * _SUM_STD)), out=out)


def share_of_left(left_norm: float, right_norm: float, weighting: Weighting) -> float:
    """Weight of the left neighbour in an average, by the norms of their last gradients.

    ``plain``: in proportion to the norms, at most 3:1. ``squared``: in proportion to their squares,
    uncapped, as the paper has it. ``uniform``, or norms that say nothing (zero, not finite): 1/2.
    """
    norms = (left_norm, right_norm)
    if weighting == "uniform" or not all(math.isfinite(n) and n > 0 for n in norms):
        return 0.5
    ratio = left_norm / right_norm
    if weighting == "squared":
        return ratio * ratio / (1 + ratio * ratio) if ratio < 1 else 1 / (1 + 1 / (ratio * ratio))
    ratio = min(max(ratio, 1 / RATIO_MAX), RATIO_MAX)
    return ratio / (1 + ratio)


def average(left: F32, right: F32, left_share: float) -> F32:
    """``s·left + (1 - s)·right`` in fp32, three roundings per value."""
    if left.shape != right.shape:
        raise LocalProtocolError("neighbours differ", f"{left.shape} and {right.shape}")
    share = np.float32(left_share)
    found: F32 = share * left + (np.float32(1) - share) * right
    return found


def near_identity(theta: F32, layout: TensorLayout, factor: float) -> F32:
    """``theta`` with the output projections of its blocks scaled, so that it adds little.

    Args:
        factor: 0 (the stage passes on what it gets) or small, for example 0.1.
    """
    if values_of(layout) != theta.size:
        raise LocalProtocolError(f"{theta.size} values", f"the layout has {values_of(layout)}")
    out = theta.copy()
    start, scaled = 0, 0
    for name, shape in layout:
        stop = start + math.prod(shape)
        if is_output_projection(name):
            out[start:stop] *= np.float32(factor)
            scaled += 1
        start = stop
    if not scaled:
        raise LocalProtocolError(
            "no near-identity", "no tensor of this stage is known as an output projection"
        )
    return out


def makers(
    left: F32 | None,
    right: F32 | None,
    norms: tuple[float, float],
    layout: TensorLayout,
    *,
    seed: int,
    stage: int,
    depth: int,
) -> dict[str, Callable[[], F32]]:
    """How to make each candidate for an inner stage that needs no snapshot, by name.

    All together take many times the memory of the stage; each call makes one, f32[n], anew.

    Args:
        left: weights of the stage before, or None if it is an end or lost as well; ``right`` alike.
        norms: of the last gradient of the left and of the right stage, before clipping.
    """
    found: dict[str, Callable[[], F32]] = {}
    made_fresh = partial(fresh, layout, seed, stage, depth)
    weightings: tuple[Weighting, ...] = ("plain", "squared", "uniform")
    if left is not None and right is not None:
        for weighting in weightings:
            share = share_of_left(*norms, weighting)
            found[f"average-{weighting}"] = partial(average, left, right, share)
    if left is not None:
        found["copy-left"] = left.copy
    if right is not None:
        found["copy-right"] = right.copy
    base = found.get("average-uniform") or found.get("copy-left") or found.get("copy-right")
    if any(is_output_projection(name) for name, _ in layout):
        for factor in (0.0, 0.1):
            found[f"near-identity-{factor:g}"] = partial(
                _near_identity_of, base or made_fresh, layout, factor
            )
    found["fresh"] = made_fresh
    return found


def _near_identity_of(base: Callable[[], F32], layout: TensorLayout, factor: float) -> F32:
    return near_identity(base(), layout, factor)


def from_neighbours(
    left: F32 | None,
    right: F32 | None,
    norms: tuple[float, float],
    layout: TensorLayout,
    *,
    seed: int,
    stage: int,
    depth: int,
) -> dict[str, F32]:
    """What ``makers`` makes, all of it at once."""
    made = makers(left, right, norms, layout, seed=seed, stage=stage, depth=depth)
    return {name: make() for name, make in made.items()}
