"""All invariants of steps, bound to one oracle: what a pipeline is watched by."""

from __future__ import annotations

from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.testing.checks.pl1 import EachOnce
from swarmtrain_protocols.testing.checks.pl3 import OneOutcomeOfSteps
from swarmtrain_protocols.testing.checks.pl4 import ReplicasAreEqual
from swarmtrain_protocols.testing.checks.pl6 import BytesAreRight
from swarmtrain_protocols.testing.checks.pl9 import StepsAreSums
from swarmtrain_protocols.testing.checks.pl16 import RebuildsAreRight
from swarmtrain_protocols.testing.checks.pl_honest import NobodyIsAccusedInSteps
from swarmtrain_protocols.testing.checks.pl_oracle import StepOracle
from swarmtrain_protocols.testing.pipeline_truth import PipelineTruth
from swarmtrain_protocols.testing.toystage import Toy

STEP_INVARIANTS = (
    *(OneOutcomeOfSteps, EachOnce, ReplicasAreEqual, BytesAreRight, StepsAreSums),
    *(RebuildsAreRight, NobodyIsAccusedInSteps),
)
"""In this order: who relies on what another one checks comes behind it."""


class StepsAreRight(StepOracle):
    """The oracle with all of them."""

    def __init__(self, truth: PipelineTruth, toy: Toy, keys: RunKeys, chunk_values: int) -> None:
        super().__init__(truth, toy, keys, chunk_values)
        self.invariants = [kind(self) for kind in STEP_INVARIANTS]
