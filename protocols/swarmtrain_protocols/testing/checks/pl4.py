"""PL4, PL5: who serves a stage holds one state at one version, and versions only grow.

(Goals PL4 and PL6: whoever moves serves nothing until its state is that of the new stage; all
replicas are equal after their averaging. OS1 of a pipeline.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.node_events import LedgerChanged
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.testing.checks.pl_oracle import (
    Content,
    StepInvariant,
    StepOracle,
    key_of,
)

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host
    from swarmtrain_protocols.testing.world import World


class ReplicasAreEqual(StepInvariant):
    """States that sites take up, and the hashes that the log pins."""

    def __init__(self, oracle: StepOracle) -> None:
        super().__init__(oracle)
        self._rounds: dict[tuple[str, int, str], int] = {}

    def modelled(self, world: World, body: e.ModelDefined) -> None:
        for stage, root in enumerate(body.roots):
            if self.oracle.weights[stage][0].state_hash != root:
                world.violation("PL4", f"stage {stage} begins with other weights")

    def closed(self, world: World, body: e.StepClosed, content: Content) -> None:
        for item in body.stages:
            if item.state_hash != self.oracle.weights[item.stage][body.step].state_hash:
                world.violation("PL4", f"{key_of(body)} pins a wrong state of {item.stage}")

    def advanced(self, world: World, host: Host, event: fx.StateAdvanced) -> None:
        stage = int(event.channel.split("/")[1])
        known = self.oracle.weights[stage]
        if event.round >= len(known):
            world.violation("PL4", f"{host.name} has stage {stage} at {event.round}")
        if known[event.round].state_hash != event.state_hash and not self._unaware(host, event):
            world.violation("PL4", f"{host.name} has another stage {stage} before {event.round}")
        slot = (host.name, host.incarnation, event.channel)
        if event.round < self._rounds.get(slot, 0):
            world.violation("PL5", f"{host.name} goes back to {event.round} of stage {stage}")
        self._rounds[slot] = event.round

    def _unaware(self, host: Host, event: fx.StateAdvanced) -> bool:
        """It has a state that was given up, and cannot know yet: the log says so further on."""
        stage = int(event.channel.split("/")[1])
        heard = host.node.core.ledger.pipeline.stages[stage].recovered_step
        given_up = self.oracle.former.get(stage, [])
        return heard < event.round and (event.round, event.state_hash) in given_up

    def emitted(self, world: World, host: Host, event: object) -> None:
        """Who has lost a stage drops its state; given it again, it begins with any snapshot."""
        if not isinstance(event, LedgerChanged):
            return
        for _, body, accepted in event.entries:
            if not accepted or getattr(body, "member", None) != host.peer:
                continue
            kept: tuple[int, ...] = ()
            if isinstance(body, e.StageAssigned):
                kept = body.stages
            elif not isinstance(body, e.MemberLeft | e.MemberBanned):
                continue
            for stage in range(self.oracle.toy.stages + 1):
                if stage not in kept:
                    self._rounds.pop((host.name, host.incarnation, stage_channel(stage)), None)
