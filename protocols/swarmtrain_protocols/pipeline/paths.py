"""Which hops a micro-batch visits: the order of the layers, swapped, or one stage left out.

A path is chosen once, by the driver, and travels in every request, so that the backward follows it.
Skipping (SkipPipe, arXiv 2502.19913) is a valve for an overloaded stage, bounded by a share of the
micro-batches; it is off unless the run says otherwise.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

from swarmtrain_protocols.pipeline.hops import plain_path, skipped_path, swapped_path

OVERLOADED = 2.0
"""Times the median of the block stages at which a stage's queue counts as overloaded."""


class PathPlan:
    """Paths of one driver.

    Args:
        stages: block stages of the run.
        swapped: odd micro-batches take ``swapped_path`` (CheckFree+).
        skip_fraction: of the micro-batches, how many may leave out an overloaded stage at most.
    """

    def __init__(self, stages: int, *, swapped: bool = False, skip_fraction: float = 0.0) -> None:
        self.skipped = 0
        self._planned = 0
        self._stages = stages
        self._plain = plain_path(stages)
        self._odd = swapped_path(stages) if swapped else self._plain
        self._skip_fraction = skip_fraction

    def path(self, k: int, load: Callable[[int], float]) -> tuple[int, ...]:
        """The path of micro-batch ``k``. ``load(hop)``: seconds that one more would wait there."""
        self._planned += 1
        path = self._odd if k % 2 else self._plain
        if self.skipped + 1 > self._skip_fraction * self._planned or self._stages < 2:
            return path
        loads = {hop: load(hop) for hop in path[1:-1]}
        worst = max(loads, key=lambda hop: (loads[hop], hop))
        others = [value for hop, value in loads.items() if hop != worst]
        if not 0.0 < OVERLOADED * statistics.median(others) < loads[worst]:
            return path
        self.skipped += 1
        return skipped_path(path, worst)
