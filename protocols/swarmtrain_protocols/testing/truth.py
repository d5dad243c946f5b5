"""What the simulator knows and no site does: every contribution as it was really made."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from swarmtrain_protocols.codecs.base import F32
from swarmtrain_protocols.merkle import Blob

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.site import SitePart


@dataclass(frozen=True, slots=True)
class Contribution:
    """One contribution: who made it and its encoded chunks."""

    member: bytes
    channel: str
    samples: float
    values: int
    codec: str
    chunks: tuple[bytes, ...]
    base_round: int = 0
    age: int = 0


@dataclass
class Truth:
    """Filled by the sites, read by the checkers."""

    parts: dict[str, SitePart]
    names: dict[bytes, str]
    ticket_sites: tuple[str, ...]
    seen: Counter[str]
    contributions: dict[bytes, Contribution] = field(default_factory=dict)
    models: dict[tuple[str, bytes], F32] = field(default_factory=dict)
    """First weights that sites have proposed, by (channel, state hash)."""

    def name_of(self, peer: bytes) -> str:
        return self.names[peer]

    def offered(
        self,
        member: bytes,
        channel: str,
        blob: Blob,
        samples: float,
        values: int,
        codec: str,
        base_round: int = 0,
        age: int = 0,
    ) -> None:
        """A site has encoded a contribution and is about to announce it."""
        assert blob.root not in self.contributions, "contributions of the simulator are unique"
        chunks = tuple(bytes(chunk) for chunk in blob.chunks)
        made = Contribution(member, channel, samples, values, codec, chunks, base_round, age)
        self.contributions[blob.root] = made
