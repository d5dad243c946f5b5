"""All invariants of rounds, bound to one oracle: what a swarm is watched by."""

from __future__ import annotations

from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.testing.checks.ar1 import OneOutcome
from swarmtrain_protocols.testing.checks.ar2 import SumsAreRight
from swarmtrain_protocols.testing.checks.ar3 import CountedOnce, SetsAreDelivered
from swarmtrain_protocols.testing.checks.ar4 import WeightsAreRight
from swarmtrain_protocols.testing.checks.ar6 import InputsStay
from swarmtrain_protocols.testing.checks.ar7 import DoubtEnds
from swarmtrain_protocols.testing.checks.changes import ChangesComeBefore
from swarmtrain_protocols.testing.checks.clip import LoudAreClipped
from swarmtrain_protocols.testing.checks.gf1 import OneAttempt
from swarmtrain_protocols.testing.checks.gf2 import PlansFit
from swarmtrain_protocols.testing.checks.honest import NobodyIsAccused
from swarmtrain_protocols.testing.checks.mb3 import ViewsAreTrue
from swarmtrain_protocols.testing.checks.oracle import Oracle
from swarmtrain_protocols.testing.checks.os1 import StatesAreEqual
from swarmtrain_protocols.testing.checks.os2 import NothingIsLost
from swarmtrain_protocols.testing.checks.os3 import JoinersAreReady
from swarmtrain_protocols.testing.checks.os4 import BasesAreTrue
from swarmtrain_protocols.testing.truth import Truth

INVARIANTS = (
    *(OneAttempt, PlansFit, OneOutcome, SumsAreRight, CountedOnce, SetsAreDelivered),
    *(LoudAreClipped, WeightsAreRight, InputsStay, DoubtEnds, StatesAreEqual, NothingIsLost),
    *(JoinersAreReady, BasesAreTrue),
    *(ChangesComeBefore, NobodyIsAccused, ViewsAreTrue),
)


class RoundsAreRight(Oracle):
    """The oracle with all of them."""

    def __init__(self, truth: Truth, keys: RunKeys, chunk_values: int) -> None:
        super().__init__(truth, keys, chunk_values)
        self.invariants = [kind(self) for kind in INVARIANTS]
