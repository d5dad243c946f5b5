"""One lookup, driven by hand over a made-up network."""

from __future__ import annotations

from random import Random

import pytest

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.dht.ids import Contact
from swarmtrain_protocols.dht.lookup import Lookup

OWN = PeerId(b"\xff" * 32)
TARGET = 0


def contact(identifier: int) -> Contact:
    return Contact(PeerId(identifier.to_bytes(32, "big")), ("h:1",), identifier)


def drive(lookup: Lookup, knows: dict[int, list[int]], dead: frozenset[int], rng: Random) -> int:
    """Answer in random order; returns the greatest number of requests awaited at once."""
    awaited: list[Contact] = []
    most = 0
    while not lookup.done:
        awaited += lookup.next_queries()
        most = max(most, len(awaited))
        asked = awaited.pop(rng.randrange(len(awaited)))
        if asked.id in dead:
            lookup.failed(asked.peer)
        else:
            lookup.answered(asked.peer, [contact(i) for i in knows[asked.id]])
    return most


@pytest.mark.parametrize("seed", range(20))
def test_it_converges_to_the_nearest_living(seed: int) -> None:
    rng = Random(seed)
    everybody = sorted(rng.sample(range(1, 1 << 32), 300))
    dead = frozenset(rng.sample(everybody, 90))
    # Everybody knows its neighbourhood (of the living and the dead) and some at random.
    knows = {
        one: [*everybody[max(0, at - 40) : at + 10], *rng.sample(everybody, 10)]
        for at, one in enumerate(everybody)
    }
    alive = [one for one in everybody if one not in dead]
    lookup = Lookup(TARGET, [contact(rng.choice(alive))], own=OWN)
    most = drive(lookup, knows, dead, rng)
    assert [c.id for c in lookup.closest()] == alive[: limits.DHT_K]
    assert most == limits.DHT_ALPHA
    assert lookup.answers < 150


def test_without_contacts_it_is_over_at_once() -> None:
    lookup = Lookup(TARGET, [], own=OWN)
    assert lookup.done
    assert lookup.next_queries() == []
    assert lookup.closest() == []


def test_each_is_asked_once_and_never_ourselves() -> None:
    lookup = Lookup(TARGET, [contact(1), contact(1), Contact(OWN, ("h:1",), 2)], own=OWN)
    assert lookup.next_queries() == [contact(1)]
    assert lookup.next_queries() == []
    assert not lookup.done
    lookup.answered(contact(1).peer, [contact(1), Contact(OWN, ("h:1",), 2)])
    assert lookup.next_queries() == []
    assert lookup.done
    assert lookup.knows(OWN)


def test_a_slow_peer_does_not_hold_up_the_others() -> None:
    lookup = Lookup(TARGET, [contact(i) for i in range(1, 8)], own=OWN, k=3, paths=1)
    first = lookup.next_queries()
    assert [c.id for c in first] == [1, 2, 3]
    for asked in first:
        lookup.slow(asked.peer)
    assert [c.id for c in lookup.next_queries()] == [4, 5, 6]
    lookup.answered(contact(2).peer, [])  # late, and it counts
    lookup.answered(contact(4).peer, [])
    assert not lookup.done
    lookup.answered(contact(5).peer, [])
    assert lookup.done
    assert [c.id for c in lookup.closest()] == [2, 4, 5]


def test_the_last_ones_are_waited_for_however_slow() -> None:
    lookup = Lookup(TARGET, [contact(1), contact(2)], own=OWN)
    for asked in lookup.next_queries():
        lookup.slow(asked.peer)
    assert not lookup.done
    lookup.answered(contact(1).peer, [])
    assert not lookup.done
    lookup.failed(contact(2).peer)
    assert lookup.done
    assert [c.id for c in lookup.closest()] == [1]
    assert (lookup.answers, lookup.failures) == (1, 1)


def test_invented_contacts_cannot_fill_the_memory() -> None:
    lookup = Lookup(1 << 159, [contact(i) for i in range(1, 4)], own=OWN)
    rng = Random(1)
    for _ in range(200):
        for asked in lookup.next_queries():
            lookup.answered(asked.peer, [contact(rng.getrandbits(160)) for _ in range(20)])
    views = [len(view.order) for view in lookup._views]
    assert views == [len(view.peers) for view in lookup._views]
    assert max(views) <= limits.DHT_CANDIDATES_MAX
    assert len(lookup._states) == len(lookup._contacts) <= sum(views)


def test_a_stopped_lookup_asks_nobody_and_keeps_what_it_has() -> None:
    lookup = Lookup(TARGET, [contact(i) for i in range(1, 8)], own=OWN)
    asked = lookup.next_queries()
    lookup.answered(asked[0].peer, [])
    lookup.stop()
    assert lookup.done
    assert lookup.next_queries() == []
    assert lookup.closest() == [asked[0]]
    lookup.answered(asked[0].peer, [])  # twice: ignored
    lookup.failed(contact(99).peer)  # never asked: ignored
    assert (lookup.answers, lookup.failures) == (1, 0)
