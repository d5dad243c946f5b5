"""The outer step: Nesterov momentum on the mean pseudo-gradient (DiLoCo, arXiv 2311.08105).

Every member computes it from the same bytes and must get the same bits; see
``protocols/spec/07-outer-step.md``. The form is that of PyTorch's SGD(nesterov=True, dampening=0).
"""

from __future__ import annotations

import numpy as np

from swarmtrain_protocols.codecs import kernels
from swarmtrain_protocols.codecs.base import F32


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
