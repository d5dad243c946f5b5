"""The size of the network from distances, and crowds of made-up identities beside a key."""

from __future__ import annotations

from random import Random

import pytest

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.dht.density import Density
from swarmtrain_protocols.dht.ids import Contact
from swarmtrain_protocols.dht.routing import RoutingTable

SPACE = 1 << 160


def contacts(ids: list[int], target: int) -> list[Contact]:
    near = sorted(ids, key=lambda i: i ^ target)[: limits.DHT_K]
    return [Contact(PeerId(i.to_bytes(32, "big")), ("h:1",), i) for i in near]


def empty() -> Density:
    return Density(1, RoutingTable(1))


def measured(rng: Random, ids: list[int]) -> Density:
    density = empty()
    for _ in range(limits.DHT_SIZE_SAMPLES):
        target = rng.getrandbits(160)
        density.observe(target, contacts(ids, target))
    return density


@pytest.mark.parametrize("count", [100, 1000, 20_000])
def test_the_size_is_estimated(count: int) -> None:
    rng = Random(count)
    density = measured(rng, [rng.getrandbits(160) for _ in range(count)])
    assert density.size == pytest.approx(count, rel=0.3)
    assert density.radius() == pytest.approx(SPACE * limits.DHT_K / count, rel=0.35)


def test_small_networks_are_counted_and_never_crowded() -> None:
    density = empty()
    assert (density.size, density.radius()) == (0.0, SPACE)
    for count in (7, 9, 8):
        density.observe(0, contacts(list(range(1, count + 1)), 0))
    assert density.size == 8
    assert not density.crowded(0, [])


def test_a_crowd_is_noticed_and_chance_is_not() -> None:
    rng = Random(5)
    ids = [rng.getrandbits(160) for _ in range(1000)]
    density = measured(rng, ids)
    targets = [rng.getrandbits(160) for _ in range(300)]
    false = sum(density.crowded(t, contacts(ids, t)) for t in targets)
    assert false <= 6
    target = targets[0]
    # Each is the best of a thousand keys that were made for it.
    ground = [min((rng.getrandbits(160) for _ in range(1000)), key=lambda i: i ^ target)]
    ground += [target ^ rng.randrange(SPACE // 1000) for _ in range(limits.DHT_K - 1)]
    assert density.crowded(target, contacts([*ids, *ground], target))


def test_a_crowd_beside_one_target_does_not_move_the_estimate() -> None:
    rng = Random(6)
    ids = [rng.getrandbits(160) for _ in range(1000)]
    density = measured(rng, ids)
    before = density.size
    target = rng.getrandbits(160)
    crowd = [target ^ rng.randrange(SPACE // 10_000) for _ in range(200)]
    for _ in range(limits.DHT_SIZE_SAMPLES // 2):  # a minority of the samples
        density.observe(target, contacts([*ids, *crowd], target))
        density.observe(other := rng.getrandbits(160), contacts(ids, other))
    density.observe(other := rng.getrandbits(160), contacts(ids, other))
    assert density.size < 2 * before


def test_a_network_that_has_grown_is_measured_anew() -> None:
    rng = Random(7)
    own = rng.getrandbits(160)
    table = RoutingTable(own)
    density = Density(own, table)
    density.observe(own, contacts([rng.getrandbits(160) for _ in range(8)], own))
    assert density.size == 8
    for _ in range(1000):
        identifier = rng.getrandbits(160)
        table.seen(Contact(PeerId(identifier.to_bytes(32, "big")), ("10.0.0.1:1",), identifier))
    assert density.size == pytest.approx(1000, rel=0.5)  # from one neighbourhood only
