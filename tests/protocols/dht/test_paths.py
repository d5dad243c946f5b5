"""Disjoint paths in a network of many hops, in which random nodes lie with accomplices.

The lookup alone, over a network that exists on paper only: every honest node knows twenty random
nodes of each of its buckets; one node in ten is a liar, and names accomplices nearer to the target
than any honest node, who name only each other.
"""

from __future__ import annotations

from bisect import bisect_left
from random import Random

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.dht.ids import ID_BITS, Contact, bucket_index
from swarmtrain_protocols.dht.lookup import Lookup

NODES, LOOKUPS, HOSTILE = 5000, 60, 0.1
ACCOMPLICES = 200


def contact(identifier: int) -> Contact:
    return Contact(PeerId(identifier.to_bytes(32, "big")), ("10.0.0.1:1",), identifier)


class Paper:
    """A network that is only a list of ids."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.ids = sorted(self.rng.getrandbits(ID_BITS) for _ in range(NODES))
        self.liars = frozenset(self.rng.sample(self.ids, int(NODES * HOSTILE)))
        self.honest = [i for i in self.ids if i not in self.liars]

    def known_to(self, own: int, target: int) -> list[int]:
        """The k contacts nearest to ``target`` in the table of ``own``."""
        rng = Random(own)
        found: list[int] = []
        for bucket in range(bucket_index(own, target), 0, -1):
            prefix = (own ^ (1 << bucket)) >> bucket << bucket
            low, high = (bisect_left(self.ids, prefix + d) for d in (0, 1 << bucket))
            found += rng.sample(self.ids[low:high], min(limits.DHT_K, high - low))
            if len(found) >= 2 * limits.DHT_K:
                break
        return sorted(found, key=lambda i: i ^ target)[: limits.DHT_K]

    def reaches_the_truth(self, paths: int) -> bool:
        """True if a lookup by a random honest node reaches one of the three true nearest."""
        target = self.rng.getrandbits(ID_BITS)
        accomplices = [target ^ (n + 1) for n in range(ACCOMPLICES)]
        start = self.rng.choice(self.honest)
        nearest = sorted(self.honest, key=lambda i: i ^ target)[:3]
        known = [contact(i) for i in self.known_to(start, target)]
        lookup = Lookup(target, known, own=contact(start).peer, paths=paths)
        awaited: list[Contact] = []
        while not lookup.done:
            awaited += lookup.next_queries()
            asked = awaited.pop(self.rng.randrange(len(awaited)))
            if asked.id in self.liars or asked.id ^ target <= ACCOMPLICES:
                named = self.rng.sample(accomplices, limits.DHT_K)
            else:
                named = self.known_to(asked.id, target)
            lookup.answered(asked.peer, [contact(i) for i in named])
        return not {c.id for c in lookup.spread()}.isdisjoint(nearest)


def share(paths: int = limits.DHT_PATHS) -> float:
    """Of lookups that are not led away from the truth."""
    return sum(Paper(seed).reaches_the_truth(paths) for seed in range(LOOKUPS)) / LOOKUPS


def test_who_lies_misleads_one_path() -> None:
    # A path of h hops meets no liar with probability 0.9^h per node asked; three are three tries.
    assert share() >= 0.5
    assert share(paths=1) <= 0.15


def test_without_liars_the_paths_agree() -> None:
    paper = Paper(1)
    paper.liars = frozenset()
    paper.honest = paper.ids
    for _ in range(10):
        assert paper.reaches_the_truth(limits.DHT_PATHS)
