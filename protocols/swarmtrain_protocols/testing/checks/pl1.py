"""PL1, PL2: each micro-batch of a committed step counts exactly once in every stage, the same ones.

(Goals PL1 and PL2: one that was retried on another replica counts once.) Counted in the exact sums
that workers handed over: a toy gradient says which micro-batch it is of.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.testing.checks.pl_oracle import Content, Key, StepInvariant, key_of

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.world import World


class EachOnce(StepInvariant):
    """What is in a step, by hop."""

    def closed(self, world: World, body: e.StepClosed, content: Content) -> None:
        key = key_of(body)
        for hop, counts in content.counts.items():
            wrong = {k: n for k, n in counts.items() if n != 1}
            if wrong:
                world.violation("PL1", f"{key} hop {hop} holds micro-batches {wrong} times")
        sets = {hop: frozenset(counts) for hop, counts in content.counts.items()}
        self._same(world, key, sets)
        self._enough(world, key, body, len(sets[0]))

    def _same(self, world: World, key: Key, sets: dict[int, frozenset[int]]) -> None:
        """Equal at every hop, but for what is left out."""
        keys, skip = self.oracle.keys, self.oracle.skip
        first = {k for k in sets[0] if k < int(keys.skip_fraction * keys.micro_batches)}
        for hop, found in sets.items():
            if found != (sets[0] - first if hop == skip != 0 else sets[0]):
                listed = {hop: sorted(found) for hop, found in sets.items()}
                world.violation("PL2", f"{key} holds different micro-batches by hop: {listed}")
        world.seen["step:skipped"] += len(first) if skip else 0

    def _enough(self, world: World, key: Key, body: e.StepClosed, count: int) -> None:
        keys = self.oracle.keys
        if count != body.micro_batches:
            world.violation("PL2", f"{key} counts {body.micro_batches}, holds {count}")
        least = math.ceil(keys.close_fraction * keys.micro_batches)
        if count < least:
            world.violation("PL2", f"{key} closes with {count} of {least}")
        if count < keys.micro_batches:
            world.seen["step:partial"] += 1
