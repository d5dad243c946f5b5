"""What the simulator knows about a pipeline: every sum that was ever handed over, exactly."""

from __future__ import annotations

from dataclasses import dataclass, field

from swarmtrain_protocols.codecs.base import F32
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.testing.toystage import I64
from swarmtrain_protocols.testing.truth import Truth


@dataclass(frozen=True)
class Sum:
    """What one worker has encoded for one stage: the exact total and the bytes it became."""

    member: bytes
    channel: str
    total: I64
    chunks: tuple[bytes, ...]


@dataclass
class PipelineTruth(Truth):
    """Equal sums of different workers have equal bytes, so they are known by member and root."""

    sums: dict[tuple[bytes, str, bytes], Sum] = field(default_factory=dict)
    candidates: dict[tuple[str, bytes], F32] = field(default_factory=dict)
    """Weights that somebody has tried for a lost stage, by (channel, state hash)."""

    calm: bool = False
    """Trouble is over: no trainer dies any more, no hop gets lost."""

    def handed_over(self, member: bytes, channel: str, blob: Blob, total: I64) -> None:
        """A site has encoded its accumulator and is about to announce it."""
        chunks = tuple(bytes(chunk) for chunk in blob.chunks)
        self.sums[member, channel, blob.root] = Sum(member, channel, total.copy(), chunks)
