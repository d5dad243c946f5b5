"""PL3, PL8, PL10: one `step` and one outcome for each attempt; steps follow each other.

Stages do not move by themselves, and what is summed was made by whom the entry names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.testing.checks.pl_oracle import Key, StepInvariant, key_of

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.world import World


class OneOutcomeOfSteps(StepInvariant):
    """The order of entries, before anybody looks into them."""

    def entry(self, world: World, body: e.EntryBody) -> None:
        oracle = self.oracle
        if isinstance(body, e.RoundOpened) and body.key.channel.startswith("train/"):
            world.violation("PL3", f"a stage moves by itself: {body}")
        elif isinstance(body, e.StepClosed):
            key = key_of(body)
            if key in oracle.closed:
                world.violation("PL3", f"step {key} is closed twice")
            if body.step != len(oracle.weights[0]) - 1:
                world.violation("PL10", f"step {body.step} follows {len(oracle.weights[0]) - 1}")
            for item in body.stages:
                self._contributors(world, key, item)
        elif isinstance(body, e.StepOutcome):
            if key_of(body) not in oracle.closed:
                world.violation("PL3", f"{key_of(body)} was decided and never closed")
            if body.stages and body.step in oracle.committed:
                world.violation("PL3", f"two outcomes of step {body.step}")

    def _contributors(self, world: World, key: Key, item: e.StageSum) -> None:
        members = [one.member for one in item.contributors]
        if members != sorted(set(members)):
            world.violation("PL3", f"contributors of {key} are not in member order")
        for one in item.contributors:
            if (one.member, stage_channel(item.stage), one.root) not in self.oracle.truth.sums:
                world.violation("PL3", f"{key} lists a sum of stage {item.stage} nobody made")
