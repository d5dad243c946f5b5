"""The optimizer of a pipeline's stages in sync mode: SGD and AdamW as deterministic kernels.

Every member that serves a stage computes it from the same result bytes and must get the same bits
(``protocols/spec/07-outer-step.md``). The numbers of a step are formed in fp64 from the log and the
run keys with +, -, ·, / and square root only, because other functions of the C library differ by
machine, and rounded to fp32 once; the kernels round after each operation, never fused. AdamW is
that of arXiv 1711.05101 in the form of PyTorch's ``torch.optim.AdamW``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from swarmtrain_protocols import limits
from swarmtrain_protocols.codecs import kernels
from swarmtrain_protocols.codecs.base import F32
from swarmtrain_protocols.manifest import RunKeys

BETA1 = 0.9
BETA2 = 0.99
EPS = 1e-8
LR_FLOOR = 0.1
"""What a cosine schedule decays to, as a share of the learning rate."""
RECOVERY_BUMP = 0.1
"""By how much a recovered stage's learning rate is raised at first (arXiv 2506.15461)."""
RECOVERY_BUMP_STEPS = 500
RECOVERY_WARMUP_STEPS = 20
"""Steps in which a recovered stage's optimizer, whose moments start at zero, warms up."""
NEVER = -1

Ranges: TypeAlias = "tuple[tuple[int, int], ...]"
"""Half-open ranges of values of a channel, ascending and disjoint."""


@dataclass(frozen=True, slots=True)
class StepTerms:
    """What a step's arithmetic takes from the log.

    ``step`` counts the optimizer steps before it. ``scale`` (an fp32 value) clips: it multiplies
    the gradient once. ``recovered`` is the step before which the stage was last rebuilt with an
    optimizer that starts anew, or ``NEVER``. Values in ``plain`` do not decay.
    """

    step: int
    scale: float = 1.0
    recovered: int = NEVER
    plain: Ranges = ()


class AdamWNumbers(NamedTuple):
    """The order in which the kernel takes its numbers, all fp32.

    ``rest`` is 1 − β, ``root2`` √(1 − β₂ⁿ), ``keep`` 1 − lr · decay, ``rate`` lr / (1 − β₁ⁿ).
    """

    scale: float
    beta1: float
    rest1: float
    beta2: float
    rest2: float
    root2: float
    eps: float
    keep: float
    rate: float


def lr_factor(own_step: int, run_step: int, warmup: int, total: int) -> float:
    """Linear warm-up over own steps; cosine to 10 % at the run's step ``total`` (0: no decay).

    Steps count from 0. They differ for a newcomer, whose optimizer starts cold in mid-run.
    """
    rise = min(1.0, (own_step + 1) / warmup) if warmup else 1.0
    if total <= warmup or run_step < warmup:
        return rise
    progress = min(1.0, (run_step - warmup) / (total - warmup))
    return rise * (LR_FLOOR + (1 - LR_FLOOR) / 2 * (1 + cosine(progress)))


def cosine(half_turns: float) -> float:
    """cos(π · ``half_turns``) for 0 to 1, the same bits on every machine."""
    assert 0.0 <= half_turns <= 1.0
    if half_turns > 0.5:
        return -cosine(1.0 - half_turns)
    if half_turns > 0.25:
        x = math.pi * (0.5 - half_turns)
        term, first = x, 2
    else:
        x = math.pi * half_turns
        term, first = 1.0, 1
    total, square = term, x * x
    for n in range(first, first + 20, 2):  # Taylor's series of the sine or the cosine
        term *= -square / (n * (n + 1))
        total += term
    return total


def power(base: float, exponent: int) -> float:
    """``base`` to a whole power of 0 or more by squaring, the same bits on every machine."""
    assert exponent >= 0
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


@dataclass(frozen=True, slots=True)
class StageOptimizer:
    """The optimizer that a run's keys ask for: ``inner_*`` and ``total_steps``."""

    name: str
    lr: float
    weight_decay: float
    warmup: int
    total: int

    @classmethod
    def of(cls, keys: RunKeys) -> StageOptimizer:
        return cls(
            keys.inner_optimizer,
            keys.inner_lr,
            keys.inner_weight_decay,
            keys.inner_warmup_steps,
            keys.total_steps,
        )

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the fp32 vectors that belong to a stage's state beside theta."""
        return ("m", "v") if self.name == "adamw" else ()

    def rate(self, terms: StepTerms) -> float:
        """Learning rate of a step, in fp64."""
        rate = self.lr * lr_factor(terms.step, terms.step, self.warmup, self.total)
        if terms.recovered == NEVER:
            return rate
        age = terms.step - terms.recovered
        assert age >= 0, terms
        bump = 1 + RECOVERY_BUMP * max(0.0, 1 - age / RECOVERY_BUMP_STEPS)
        return rate * bump * lr_factor(age, age, RECOVERY_WARMUP_STEPS, 0)

    def numbers(self, terms: StepTerms, *, decays: bool) -> AdamWNumbers:
        """The numbers of an AdamW step."""
        applied = terms.step - max(terms.recovered, 0) + 1
        rate = self.rate(terms)
        numbers = AdamWNumbers(
            scale=terms.scale,
            beta1=BETA1,
            rest1=1 - BETA1,
            beta2=BETA2,
            rest2=1 - BETA2,
            root2=math.sqrt(1 - power(BETA2, applied)),
            eps=EPS,
            keep=1 - rate * self.weight_decay if decays else 1.0,
            rate=rate / (1 - power(BETA1, applied)),
        )
        return AdamWNumbers(*(float(np.float32(value)) for value in numbers))

    def step(
        self, terms: StepTerms, theta: F32, slots: Sequence[F32], gradient: F32, start: int
    ) -> None:
        """One step of a chunk in place; its first value is value ``start`` of the channel.

        Args:
            theta: f32[n], contiguous, written.
            slots: f32[n] each, in the order of ``self.slots``, contiguous, written.
            gradient: f32[n], contiguous: the decoded result of the step.
        """
        assert len(slots) == len(self.slots)
        assert all(theta.size == array.size for array in (*slots, gradient))
        with np.errstate(over="ignore"):  # the square of a gradient that nobody clipped
            if self.name == "sgd":
                scale, rate = np.float32(terms.scale), np.float32(self.rate(terms))
                kernels.active().sgd_step(theta, gradient, scale, rate)
                return
            decaying = np.array(self.numbers(terms, decays=True), np.float32)
            steady = np.array(self.numbers(terms, decays=False), np.float32)
            for part, plain in pieces(terms.plain, start, theta.size):
                m, v = slots[0][part], slots[1][part]
                numbers = steady if plain else decaying
                kernels.active().adamw_step(theta[part], m, v, gradient[part], numbers)


def pieces(ranges: Ranges, start: int, n: int) -> Iterator[tuple[slice, bool]]:
    """Cut values ``start … start+n-1`` at the borders of ``ranges``: (slice from 0, inside)."""
    position, stop = start, start + n
    for first, last in ranges:
        first, last = max(first, position), min(last, stop)
        if first >= last:
            continue
        if position < first:
            yield slice(position - start, first - start), False
        yield slice(first - start, last - start), True
        position = last
    if position < stop:
        yield slice(position - start, stop - start), False


def square_norm(x: F32) -> float:
    """Sum of the squares of a chunk f32[n] in fp64, the same bits on every machine.

    Lane j of 256 adds up the squares of values j, j + 256, ... in that order (they are exact in
    fp64); then the lanes are added in order. A channel's square norm is the sum over its chunks in
    order.
    """
    lanes = np.zeros(limits.BLOCK_VALUES, np.float64)
    kernels.active().add_squares(x, lanes)
    total = 0.0
    for lane in lanes.tolist():
        total += lane
    return total
