"""The trainer's private view of a channel: communication hidden behind compute.

All members apply the same mean to the same canonical state. What a trainer trains on may differ
from it by an overlay that nobody else sees (eager updates, arXiv 2502.12996, as an overlay; the
identity is derived in ``protocols/spec/07-outer-step.md``):

- ``off``: hand over, wait for the decision, start from the new theta.
- ``delayed``: start the next phase at once from theta as it is, one round behind.
- ``eager``: start the next phase at once, one round behind for others' progress but not for one's
  own: ``base = theta - lr*(P + beta*(beta*A + P))``.

A is the momentum of one's own committed contributions. P is the displacement by what is still
undecided. P and base are recomputed from scratch at each boundary, so nothing can accumulate, and a
joiner starts with zeros. A decision moves theta at once, but base and the parameters only at the
next boundary. NumPy, because it must not need torch to be checked; the arrays may be shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from swarmtrain_protocols.errors import LocalProtocolError

Mode: TypeAlias = Literal["off", "delayed", "eager"]
MODES: tuple[Mode, ...] = ("off", "delayed", "eager")
Vector: TypeAlias = npt.NDArray[Any]

SLICE_VALUES = 1 << 16
"""Vectors go through in slices that stay in cache, so that a step needs no large temporaries."""


@dataclass(frozen=True, slots=True)
class Handover:
    """What a boundary hands to the peer process.

    Attributes:
        delta: the pseudo-gradient [n], a view of the overlay's buffer. It holds still until the
            boundary after the decision.
        age: how many earlier boundaries' contributions are re-queued in it; 0 if it is all fresh.
    """

    delta: Vector
    age: int


class Overlay:
    """One channel of one trainer. Not thread-safe.

    The order of calls is ``start``, and then for each phase ``boundary`` and ``decided``, in which
    ``decided`` comes before the next ``boundary``. In mode ``off``, ``new_base`` after ``decided``
    starts the next phase; in the other modes ``boundary`` has done so.

    Memory: ``base``, ``delta`` and, if eager, ``A``, of n values each; nothing is allocated later,
    but for ``A`` when ``switch`` turns to eager.
    """

    def __init__(
        self,
        mode: Mode,
        n: int,
        lr: float,
        beta: float,
        dtype: npt.DTypeLike = np.float32,
        *,
        delta: Vector | None = None,
    ) -> None:
        """Prepare for vectors of ``n`` values; ``lr`` and ``beta`` are those of the outer step.

        Args:
            delta: buffer [n] for the pseudo-gradient, for example in shared memory.
        """
        if mode not in MODES:
            raise LocalProtocolError(f"unknown overlap {mode!r}", todo=f"Use one of {MODES}.")
        self.mode: Mode = mode
        self.base: Vector = np.zeros(n, dtype)
        self.delta: Vector = np.zeros(n, dtype) if delta is None else delta
        if self.delta.shape != (n,) or self.delta.dtype != self.base.dtype:
            raise LocalProtocolError(f"delta must be {self.base.dtype}[{n}]")
        self._momentum: Vector = np.zeros(n if mode == "eager" else 0, dtype)
        self._set_step(lr, beta)
        self._weight = self.base.dtype.type(0)
        self._scratch: tuple[Vector, Vector] = (
            np.empty(min(n, SLICE_VALUES), dtype),
            np.empty(min(n, SLICE_VALUES), dtype),
        )
        self._undecided = False
        self._requeued = 0

    @property
    def undecided(self) -> bool:
        """True while a contribution waits for the outcome of its round."""
        return self._undecided

    @property
    def requeued(self) -> int:
        """How many boundaries' contributions go into the next one again; 0 if none."""
        return 0 if self._undecided else self._requeued

    @property
    def A(self) -> Vector:  # noqa: N802 - the name in the derivation
        """Momentum of own committed contributions [n]; a copy, zeros unless eager."""
        return self._momentum.copy() if self.mode == "eager" else np.zeros_like(self.base)

    @property
    def P(self) -> Vector:  # noqa: N802 - the name in the derivation
        """Pending displacement [n] as of the last boundary; a copy, zeros unless eager."""
        pending = self.mode == "eager" and (self._undecided or self._requeued > 0)
        return self._weight * self.delta if pending else np.zeros_like(self.base)

    def start(self, theta: Vector, x: Vector) -> None:
        """Forget all private progress and start from ``theta``: join, re-sync, rewind.

        An undecided contribution is forgotten too; do not call ``decided`` for it any more.

        Args:
            theta: canonical parameters [n].
            x: the trainer's parameters [n], overwritten.
        """
        self._undecided = False
        self._requeued = 0
        self._momentum[:] = 0
        self.new_base(theta, x)

    def _set_step(self, lr: float, beta: float) -> None:
        self._lr, self._beta = self.base.dtype.type(lr), self.base.dtype.type(beta)

    def switch(self, mode: Mode, lr: float, beta: float) -> None:
        """From the coming boundary on, in another mode or with another outer step.

        Progress is neither lost nor counted twice: the next contribution is still ``base - x``,
        and what was re-queued is in it. A starts at zero, as a joiner's does: the momentum of what
        was committed before is in theta, and only its foretaste is missing.

        Raises:
            LocalProtocolError: a contribution is undecided, or the mode is unknown.
        """
        if mode not in MODES:
            raise LocalProtocolError(f"unknown overlap {mode!r}", todo=f"Use one of {MODES}.")
        if self._undecided:
            raise LocalProtocolError("the previous contribution is undecided", "train on or wait")
        if mode != self.mode:
            self._momentum = np.zeros(self.base.size if mode == "eager" else 0, self.base.dtype)
        self.mode = mode
        self._set_step(lr, beta)

    def boundary(self, theta: Vector, x: Vector, weight_fraction: float) -> Handover:
        """End a phase: form the pseudo-gradient and, unless ``off``, start the next phase.

        Args:
            theta: canonical parameters [n], with every round applied that ``decided`` was told of.
            x: the trainer's parameters [n]. Overwritten with the new base, unless ``off``.
            weight_fraction: the coefficient that this contribution will probably get (1 / members
                if all weigh the same). Only the private view depends on it.

        Raises:
            LocalProtocolError: the previous contribution is still undecided. Train on, or wait.
        """
        if self._undecided:
            raise LocalProtocolError("the previous contribution is undecided", "train on or wait")
        for part, fresh, _ in self._parts():
            np.subtract(self.base[part], x[part], out=fresh)
            if self._requeued:
                self.delta[part] += fresh
            else:
                self.delta[part] = fresh
        handover = Handover(self.delta, self._requeued)
        self._undecided = True
        self._requeued += 1
        self._weight = self.base.dtype.type(weight_fraction)
        if self.mode != "off":
            self.new_base(theta, x)
        return handover

    def new_base(self, theta: Vector, x: Vector) -> None:
        """Set base from theta, A and P as they are now, and ``x`` to base.

        Args:
            theta: canonical parameters [n].
            x: the trainer's parameters [n], overwritten.

        Raises:
            LocalProtocolError: mode ``off``, and the contribution is undecided.
        """
        if self.mode == "off" and self._undecided:
            raise LocalProtocolError("overlap is off and the contribution is undecided")
        if self.mode != "eager":
            self.base[:] = theta
        else:
            self._displace(theta)
        x[:] = self.base

    def decided(self, coefficient: float | None) -> None:
        """Tell the outcome of the round of the undecided contribution.

        Args:
            coefficient: None if the round was aborted; else what it was multiplied with in the
                committed mean, 0 if the committed set left it out. Aborted or left out, it goes
                into the next contribution again.

        Raises:
            LocalProtocolError: nothing is undecided.
        """
        if not self._undecided:
            raise LocalProtocolError("no contribution is undecided")
        self._undecided = False
        if coefficient is None:
            return
        if coefficient == 0:
            self.passed()
            return
        self._requeued = 0
        if self.mode == "eager":
            factor = self.base.dtype.type(coefficient)
            for part, own, _ in self._parts():
                np.multiply(self.delta[part], factor, out=own)
                self._momentum[part] *= self._beta
                self._momentum[part] += own

    def passed(self) -> None:
        """A round was committed that this trainer had nothing in: the canonical momentum decayed.

        A contribution that is waiting for a later round stays undecided.
        """
        self._momentum *= self._beta

    def _displace(self, theta: Vector) -> None:
        weight = self._weight if self._requeued else self.base.dtype.type(0)
        for part, pending, step in self._parts():
            np.multiply(self.delta[part], weight, out=pending)
            np.multiply(self._momentum[part], self._beta, out=step)
            step += pending
            step *= self._beta
            step += pending
            step *= self._lr
            np.subtract(theta[part], step, out=self.base[part])

    def _parts(self) -> Iterator[tuple[slice, Vector, Vector]]:
        n = self.base.size
        for start in range(0, n, SLICE_VALUES):
            stop = min(start + SLICE_VALUES, n)
            first, second = self._scratch
            yield slice(start, stop), first[: stop - start], second[: stop - start]
