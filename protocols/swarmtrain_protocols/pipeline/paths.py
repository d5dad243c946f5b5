"""Which hops a micro-batch visits: the order of the layers, swapped, or one stage left out.

A path travels in every request, so that the backward follows it. Skipping (SkipPipe, arXiv
2502.19913) is a valve for an overloaded stage, bounded by a share of the micro-batches; it is off
unless the run says otherwise. In ``sync`` mode the log says which stage the first micro-batches of
a step leave out: whoever computes one takes the same path, and gradients of two paths never meet.
In ``diloco`` mode a micro-batch has one driver, which decides by itself.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.pipeline.hops import plain_path, skipped_path, swapped_path

OVERLOADED = 2.0
"""Times the median of the block stages at which a stage's queue counts as overloaded."""


@dataclass(frozen=True, slots=True)
class PathRule:
    """Legal paths of a run.

    Args:
        stages: block stages of the run.
        swapped: odd micro-batches take ``swapped_path`` (CheckFree+).
        skips: micro-batches of a step that may leave out a stage, the first ones.
        free: drivers decide by themselves which stage, and for which micro-batches.
    """

    stages: int
    swapped: bool = False
    skips: int = 0
    free: bool = False

    def whole(self, k: int) -> tuple[int, ...]:
        """The path of micro-batch ``k`` that leaves out nothing."""
        return swapped_path(self.stages) if self.swapped and k % 2 else plain_path(self.stages)

    def of_step(self, k: int, skip: int) -> tuple[int, ...]:
        """The path of micro-batch ``k`` of a step in which hop ``skip`` is left out; 0: none."""
        whole = self.whole(k)
        return skipped_path(whole, skip) if skip and k < self.skips else whole

    def is_legal(self, k: int, path: tuple[int, ...], skip: int) -> bool:
        """Whether micro-batch ``k`` may take ``path`` in a step that leaves out ``skip``."""
        left_out = [hop for hop in range(1, self.stages + 1) if hop not in path]
        if self.free and len(left_out) == 1:
            return path == skipped_path(self.whole(k), left_out[0])
        return path == (self.whole(k) if self.free else self.of_step(k, skip))


def path_rule_of(keys: RunKeys) -> PathRule:
    """The rule that a run's keys ask for."""
    free = keys.pipeline_mode == "diloco" and keys.skip_fraction > 0.0
    skips = 0 if free else int(keys.skip_fraction * keys.micro_batches)
    return PathRule(keys.stages, keys.swapped, skips, free)


class PathPlan:
    """Paths of one driver.

    Args:
        rule: of the run; None: plain paths through that many stages.
        skip_fraction: if drivers decide, how many of the micro-batches may leave out a stage.
    """

    def __init__(
        self, stages: int, *, rule: PathRule | None = None, skip_fraction: float = 0.0
    ) -> None:
        self.rule = rule or PathRule(stages)
        self.skipped = 0
        self._planned = 0
        self._skip_fraction = skip_fraction if self.rule.free else 0.0

    def path(self, k: int, load: Callable[[int], float]) -> tuple[int, ...]:
        """What the driver decides for ``k``. ``load(hop)``: seconds that one more would wait."""
        self._planned += 1
        path = self.rule.whole(k)
        if self.skipped + 1 > self._skip_fraction * self._planned or len(path) < 4:
            return path
        loads = {hop: load(hop) for hop in path[1:-1]}
        worst = max(loads, key=lambda hop: (loads[hop], hop))
        others = [value for hop, value in loads.items() if hop != worst]
        if not 0.0 < OVERLOADED * statistics.median(others) < loads[worst]:
            return path
        self.skipped += 1
        return skipped_path(path, worst)
