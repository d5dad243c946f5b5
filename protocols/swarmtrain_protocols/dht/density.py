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
from swarmtrain_protocols.dht.routing import RoutingTable

_SPACE = 1 << ID_BITS


class Density:
    """The estimate of one node: the median over its latest lookups of targets nobody chose.

    Samples from when the table was less than half as large do not count: the network has grown.
    While there are none, what the table itself holds around this node has to do.
    """

    def __init__(self, own: int, table: RoutingTable, k: int = limits.DHT_K) -> None:
        self._own = own
        self._table = table
        self._k = k
        self._samples: deque[tuple[float, int]] = deque(maxlen=limits.DHT_SIZE_SAMPLES)

    def observe(self, target: int, closest: Sequence[Contact]) -> None:
        """``closest``: the k nearest to a random target that have answered, nearest first."""
        self._samples.append((self._estimate(target, closest), len(self._table)))

    @property
    def size(self) -> float:
        """Estimated number of nodes."""
        valid = [size for size, known in self._samples if 2 * known >= len(self._table)]
        if valid:
            return statistics.median(valid)
        return self._estimate(self._own, self._table.closest(self._own, self._k))

    def _estimate(self, target: int, closest: Sequence[Contact]) -> float:
        if len(closest) < self._k:
            return float(len(closest))
        # The k-th of n even points lies at k / n on average; k - 1 makes its inverse unbiased.
        distance = (closest[self._k - 1].id ^ target) + 1
        return (self._k - 1) * _SPACE / distance

    def radius(self) -> int:
        """Distance within which k nodes are expected; the whole space if there are no more."""
        size = self.size
        if size <= self._k:
            return _SPACE
        return int(_SPACE * (self._k / size))

    def crowded(self, target: int, closest: Sequence[Contact]) -> bool:
        """True if the nearest lie ``DHT_CROWD_FACTOR`` times denser than they should.

        Chance alone does that to k nearest in one lookup of some hundreds, to five in one of nine.
        """
        if not closest:
            return False
        distance = closest[-1].id ^ target
        return distance * limits.DHT_CROWD_FACTOR < _SPACE * len(closest) / max(self.size, 1.0)
