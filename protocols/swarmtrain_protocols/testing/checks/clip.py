"""Nobody is louder than the others let it be (spec 15): norms, references and factors of every set.

Recomputed from the true contributions with plain Python and NumPy, bit for bit. Who is clipped is
told to everybody, with the norm and by how much.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.codecs import get_codec
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.testing.checks.oracle import Invariant, Oracle

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host
    from swarmtrain_protocols.testing.world import World

LANES = 256
FACTOR, KEPT, FEW = 2.0, 8, 3


class LoudAreClipped(Invariant):
    """Norms of the log against those of the contributions, and what follows from them."""

    def __init__(self, oracle: Oracle) -> None:
        super().__init__(oracle)
        self.kept: dict[str, list[float]] = {}
        self.lengths: dict[RoundKey, list[float]] = {}
        self.loud: dict[str, dict[str, float]] = {}
        """By attempt: factor of each member that is clipped."""

    def chosen(self, world: World, body: e.RoundSet) -> None:
        channel = body.key.channel
        opened = self.oracle.opened[body.key]
        if channel not in self.oracle.states:
            if body.norms:
                world.violation("CLIP", f"the callers of {body.key} are measured")
            return
        listed = [opened.contributors[item.index] for item in body.coefficients]
        norms = [self._norm(opened, item.root) for item in listed]
        if list(body.norms) != norms:
            world.violation("CLIP", f"{body.key} says norms {body.norms}, they are {norms}")
        lengths = [n * item.discount for n, item in zip(norms, listed, strict=True)]
        reference = self._reference(lengths, self.kept.get(channel, []))
        factors = [_factor(length, reference) for length in lengths]
        self.lengths[body.key] = [f * n for f, n in zip(factors, lengths, strict=True)]
        self.oracle.factors[body.key] = factors
        told = {item.member.hex(): f for item, f in zip(listed, factors, strict=True) if f < 1.0}
        self.loud[str(body.key)] = told
        world.seen["clip:loud"] += len(told)

    def _norm(self, opened: e.RoundOpened, root: bytes) -> float:
        made, codec = self.oracle.truth.contributions[root], get_codec(opened.scatter_codec)
        size, total = self.oracle.chunk_values, 0.0
        for part in opened.parts:
            square = 0.0
            for index in range(part.first, part.first + part.count):
                value = np.zeros(min(size, opened.values - index * size), np.float32)
                codec.decode(made.chunks[index], value)
                square += _square(value)
            total += square
        return math.sqrt(total)

    @staticmethod
    def _reference(lengths: list[float], kept: list[float]) -> float:
        own = sorted(length for length in lengths if length > 0.0)
        known = sorted(kept)
        usual = known[len(known) // 2] if known else 0.0
        if not own or (len(own) < FEW and known):
            return usual
        return max(own[-1] if len(own) < FEW else own[len(own) // 2], usual)

    def committed(self, world: World, body: e.RoundCommitted, right: bytes) -> None:
        own = sorted(length for length in self.lengths.get(body.key, []) if length > 0.0)
        if own:
            kept = self.kept.setdefault(body.key.channel, [])
            kept.append(own[len(own) // 2])
            del kept[:-KEPT]
            world.seen["clip:counted"] += len(self.loud[str(body.key)])

    def rewound(self, world: World, body: e.Rewound) -> None:
        for channel in body.channels:
            self.kept.pop(channel, None)

    def recovered(self, world: World, channel: str) -> None:
        self.kept.pop(channel, None)

    def emitted(self, world: World, host: Host, event: object) -> None:
        if not isinstance(event, fx.Notice) or event.name != "contribution_clipped":
            return
        fields = event.fields
        right = self.loud.get(str(fields["key"]), {}).get(str(fields["peer"]))
        if right != fields["factor"]:
            world.violation("CLIP", f"{host.name} is told {fields}, the factor is {right}")


def _factor(length: float, reference: float) -> float:
    bound = FACTOR * reference
    return bound / length if reference > 0.0 and length > bound else 1.0


def _square(value: np.ndarray[tuple[int], np.dtype[np.float32]]) -> float:
    lanes = [0.0] * LANES
    for index, item in enumerate(value.tolist()):
        lanes[index % LANES] += item * item
    total = 0.0
    for lane in lanes:
        total += lane
    return total
