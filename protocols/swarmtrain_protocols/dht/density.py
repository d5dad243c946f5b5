"""How many nodes there are, and whether somebody crowds one place (Sridhar et al., NDSS 2024).

Identifiers are hashes, so nodes lie evenly. Whoever makes many keys can still keep those that fall
near one target, and so be all of its k nearest. That shows: the k-th nearest is nearer than chance
allows in a network of this size. The size is measured where nobody profits from crowding: around
this node and around random targets.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

from swarmtrain_protocols import limits
from swarmtrain_protocols.dht.ids import ID_BITS, Contact

_SPACE = 1 << ID_BITS


class Density:
    """The estimate of one node: the median over its latest lookups of targets nobody chose."""

    def __init__(self, k: int = limits.DHT_K) -> None:
        self._k = k
        self._samples: deque[float] = deque(maxlen=limits.DHT_SIZE_SAMPLES)

    def observe(self, target: int, closest: Sequence[Contact]) -> None:
        """``closest``: the k nearest to a random target that have answered, nearest first."""
        if len(closest) < self._k:
            self._samples.append(float(len(closest)))
            return
        # The k-th of n even points lies at k / n on average; k - 1 makes its inverse unbiased.
        distance = (closest[self._k - 1].id ^ target) + 1
        self._samples.append((self._k - 1) * _SPACE / distance)

    @property
    def size(self) -> float | None:
        """Estimated number of nodes; None before the first lookup."""
        return statistics.median(self._samples) if self._samples else None

    def radius(self) -> int:
        """Distance within which k nodes are expected; the whole space while that is not known."""
        size = self.size
        if size is None or size <= self._k:
            return _SPACE
        return int(_SPACE * (self._k / size))

    def crowded(self, target: int, closest: Sequence[Contact]) -> bool:
        """True if the k nearest lie ``DHT_CROWD_FACTOR`` times denser than they should.

        Chance alone does that to one lookup in some hundreds. In a network of fewer than 2 k nodes
        everybody is asked anyway.
        """
        size = self.size
        if size is None or size < 2 * self._k or len(closest) < self._k:
            return False
        distance = closest[self._k - 1].id ^ target
        return distance * limits.DHT_CROWD_FACTOR < self.radius()
