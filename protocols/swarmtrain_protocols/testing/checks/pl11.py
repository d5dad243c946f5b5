"""PL1, PL11, PL12 at every moment: an accumulator is the sum of its have-set; drivers are bounded.

(Goal PL5: micro-batches in flight are bounded.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarmtrain_protocols.testing.checks.base import Checker
from swarmtrain_protocols.testing.toystage import Toy

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host
    from swarmtrain_protocols.testing.world import World


class BooksAgree(Checker):
    """``compared``: how often an accumulator was compared with its have-set."""

    def __init__(self, toy: Toy, window: int) -> None:
        self.toy = toy
        self.window = window
        self.compared = 0

    def always(self, world: World, host: Host) -> None:
        site = host.node
        driver = site.core.pipeline.driver
        if len(driver.batches) > self.toy.micro_batches:
            world.violation("PL11", f"{host.name} drives {len(driver.batches)} micro-batches")
        active = sum(batch.begun and not batch.done for batch in driver.batches.values())
        if active > self.window:
            world.violation("PL11", f"{host.name} has {active} under way, window {self.window}")
        if not site.touched or site.clearing or not host.quiet:
            return
        site.touched = False
        self.compared += 1
        worker = site.core.pipeline.worker
        for stage, total in site.accumulators.items():
            for hop, counts in self.toy.counts(stage, total).items():
                claimed = worker.have(hop)
                if counts != dict.fromkeys(claimed, 1):
                    world.violation(
                        "PL1", f"{host.name} claims {claimed} at hop {hop}, holds {counts}"
                    )
