"""An own contribution, from its announcement to its decision. Spec 08."""

from __future__ import annotations

import math
from dataclasses import dataclass

from swarmtrain_protocols.messages.common import RoundKey, Spans
from swarmtrain_protocols.messages.rounds import Ready
from swarmtrain_protocols.rounds.pace import Pace


@dataclass(slots=True)
class Offer:
    """An own contribution that is not decided yet."""

    channel: str
    root: bytes
    values: int
    codec: str
    samples: float
    base_round: int
    expect: int
    phase_s: float = 0.0
    """Seconds of inner steps between two contributions of any channel, 0: not known."""
    encode_s: float = 0.0
    """Seconds that its encoding took."""
    bound: RoundKey | None = None
    since: int = 0
    """The round that was next when it was offered."""
    again_at: float = math.inf
    claims: Spans = ()
    """Positions in the data of the run that it was trained on (13)."""
    age: int = 0
    """How many of the phases in it were handed over before, and returned."""
    pledged: bool = False
    """For a step of a pipeline, whose leader hears of it elsewhere (11): it is never announced."""

    def ready(self, generation: int, seen: int, pace: Pace) -> Ready:
        """Its announcement by a member that has applied the log up to index ``seen``."""
        return Ready(
            generation,
            self.channel,
            self.root,
            self.values,
            self.codec,
            self.samples,
            self.base_round,
            self.expect,
            seen,
            self.phase_s,
            pace.exchange_s(self.channel),
            self.claims,
            *pace.bytes_per_s,
            self.age,
        )
