"""AR2, AR5: a committed average is, bit for bit, the sum of its set in member order, encoded once.

Every member decodes those bytes, the owner included: ``os1`` compares states with what they give.
Residues of lossy codecs are the trainer's (``tests/protocols/test_overlap.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.testing.checks.oracle import Invariant

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.world import World


class SumsAreRight(Invariant):
    """The oracle has recomputed the result from the true contributions."""

    def committed(self, world: World, body: e.RoundCommitted, right: bytes) -> None:
        if body.root != right:
            world.violation("AR2", f"the result of {body.key} is not the sum of its set")
