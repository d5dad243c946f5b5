"""The leader's valve: while a stage is overloaded, some micro-batches of a step leave it out.

What SkipPipe (arXiv 2502.19913) is good for under churn: its planner needs exact profiles, its
skips do not. The stage goes into the outcome of a step and holds for the next one, so that
everybody agrees on every path (``paths``). Off unless the run's ``skip_fraction`` allows it.
"""

from __future__ import annotations

from collections.abc import Callable

from swarmtrain_protocols.core import Effect, Emit
from swarmtrain_protocols.rounds import effects as fx


class Valve:
    """Which stage the next step leaves out.

    Args:
        skips: micro-batches of a step that may do so.
        overloaded: the block stage that holds the others up, 0: none.
    """

    def __init__(self, out: list[Effect], skips: int, overloaded: Callable[[], int]) -> None:
        self._out = out
        self._skips = skips
        self._overloaded = overloaded
        self._open = 0

    def __call__(self) -> int:
        """The stage, 0: none; it is told whenever another one is left out."""
        stage = self._overloaded() if self._skips else 0
        if stage != self._open and stage:
            fields: dict[str, object] = {
                "what": f"{self._skips} micro-batches a step leave out stage {stage}",
                "why": "it is overloaded, and the run allows skips",
            }
            self._out.append(Emit(fx.Notice("fallback", fields)))
        self._open = stage
        return stage
