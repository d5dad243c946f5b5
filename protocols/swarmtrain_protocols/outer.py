"""The outer step: Nesterov momentum on the mean pseudo-gradient (DiLoCo, arXiv 2311.08105).

Every member computes it from the same bytes and must get the same bits; see
``protocols/spec/07-outer-step.md``. The form is that of PyTorch's SGD(nesterov=True, dampening=0).
"""

from __future__ import annotations

import numpy as np

from swarmtrain_protocols.codecs import kernels
from swarmtrain_protocols.codecs.base import F32
from swarmtrain_protocols.errors import ConfigError

SHORT_RUN_ROUNDS = 50
"""Momentum 0.9 needs many times 1 / (1 - 0.9) rounds to pay; below this it only hurts."""


def outer_step(theta: F32, momentum: F32, mean: F32, lr: np.float32, beta: np.float32) -> None:
    """In place, elementwise: ``b = beta*b + mean``, then ``theta = theta - lr*(mean + beta*b)``.

    Each multiplication, addition and subtraction rounds to fp32, in that order, never fused.

    Args:
        theta: f32[n], contiguous, written.
        momentum: f32[n], contiguous, written.
        mean: f32[n], contiguous, the decoded result of the round.
        lr: outer learning rate.
        beta: outer momentum.
    """
    assert theta.size == momentum.size == mean.size
    kernels.active().outer_step(theta, momentum, mean, np.float32(lr), np.float32(beta))


def auto_outer(overlap: str, members: int, rounds: int) -> tuple[float, float]:
    """Outer learning rate and momentum that are stable for a mode, a swarm and a length of run.

    Short runs average (1, 0). Long runs take the published (0.7, 0.9) without overlap, and lower
    gains under delay: with momentum 0.9 and inner phases that go all the way, the linear model is
    stable up to 1.36 (off), 0.42 (eager, four members), 0.26 (eager, many) and 0.25 (delayed).

    Args:
        overlap: ``off``, ``delayed`` or ``eager``.
        members: expected number of contributors, at least 1.
        rounds: planned rounds; 0 if the run has no planned end.

    Raises:
        ConfigError: unknown overlap.
    """
    if overlap not in ("off", "delayed", "eager"):
        raise ConfigError(f"unknown overlap {overlap!r}", todo="Use off, delayed or eager.")
    assert members >= 1 and rounds >= 0
    if 0 < rounds < SHORT_RUN_ROUNDS:
        return 1.0, 0.0
    if overlap == "off":
        return 0.7, 0.9
    if overlap == "delayed":
        return 0.2, 0.9
    return (0.4, 0.9) if members <= 4 else (0.25, 0.9)
