"""The routing table against brute force and against those who would fill it."""

from __future__ import annotations

import math
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.dht.ids import Contact, bucket_index
from swarmtrain_protocols.dht.routing import RoutingTable

OWN = 1 << 159


def contact(identifier: int, address: str = "node.internal:1") -> Contact:
    return Contact(PeerId(identifier.to_bytes(32, "big")), (address,), identifier)


def far(number: int, address: str | None = None) -> Contact:
    """Contacts of one bucket: the one with the highest bit."""
    return contact(number + 1, address or f"n{number}.internal:1")


@given(st.lists(st.integers(0, (1 << 160) - 1), max_size=60), st.integers(0, (1 << 160) - 1))
def test_the_closest_are_those_of_brute_force(identifiers: list[int], target: int) -> None:
    table = RoutingTable(OWN, k=1000)
    for number, identifier in enumerate(identifiers):
        table.seen(contact(identifier, f"n{number}.internal:1"))
    everybody = sorted({i for i in identifiers if i != OWN}, key=lambda i: i ^ target)
    assert [c.id for c in table.closest(target, 20)] == everybody[:20]
    assert len(table) == len(everybody)
    if everybody:
        but = contact(everybody[0]).peer
        assert [c.id for c in table.closest(target, 20, but)] == everybody[1:21]


@given(st.integers(0, (1 << 160) - 1), st.integers(1, 25), st.integers(0, 2**32))
def test_the_closest_in_full_tables(target: int, count: int, seed: int) -> None:
    rng = Random(seed)
    table = RoutingTable(OWN, k=4)
    for number in range(200):
        near = OWN ^ rng.getrandbits(rng.randrange(1, 161))
        table.seen(contact(near, f"n{number}.internal:1"))
    truth = sorted((c.id for c in table.contacts()), key=lambda i: i ^ target)
    assert [c.id for c in table.closest(target, count)] == truth[:count]


def test_own_id_and_peers_without_address_never_come_in() -> None:
    table = RoutingTable(OWN)
    assert table.seen(contact(OWN)) is None
    assert table.seen(Contact(PeerId(b"x" * 32), (), 5)) is None
    assert len(table) == 0
    assert contact(OWN) not in table
    table.remove(contact(OWN))
    assert table.failed(contact(OWN)) is False


def test_a_full_bucket_keeps_its_oldest_if_it_answers() -> None:
    table = RoutingTable(OWN, k=3)
    for number in range(3):
        assert table.seen(far(number)) is None
    assert table.seen(far(3)) == far(0)  # to be pinged
    assert far(3) not in table
    assert table.seen(far(4)) is None  # one ping at a time
    assert table.seen(far(0)) is None  # it answered and is now the most recent
    assert far(0) in table
    assert table.seen(far(5)) == far(1)
    assert [c.id for c in table.contacts()] == [2, 3, 1]


def test_a_full_bucket_replaces_its_oldest_if_it_does_not_answer() -> None:
    table = RoutingTable(OWN, k=3)
    for number in range(5):
        table.seen(far(number))
    assert table.failed(far(0)) is True
    assert far(0) not in table
    assert far(4) in table  # the newest in waiting
    assert far(3) not in table
    assert len(table) == 3


def test_two_failures_in_a_row_throw_a_peer_out() -> None:
    table = RoutingTable(OWN)
    table.seen(far(0))
    assert table.failed(far(0)) is False
    table.seen(far(0))  # an answer in between starts the count again
    assert table.failed(far(0)) is False
    assert table.failed(far(0)) is True
    assert len(table) == 0
    assert table.failed(far(9)) is False


def test_a_peer_that_moves_is_found_at_its_new_address() -> None:
    table = RoutingTable(OWN)
    table.seen(far(0, "old.internal:1"))
    table.seen(far(0, "new.internal:1"))
    assert len(table) == 1
    held = table.get(far(0))
    assert held is not None
    assert held.addresses == ("new.internal:1",)


def test_one_public_subnet_gets_few_places() -> None:
    table = RoutingTable(OWN)
    for number in range(50):
        table.seen(far(number, f"8.8.4.{number}:1"))
    assert len(table) == limits.DHT_PER_SUBNET_IN_BUCKET_MAX
    for number in range(60):  # other buckets, same subnet
        table.seen(contact(OWN ^ (1 << (100 + number % 50)) ^ number, f"8.8.4.{number}:2"))
    assert len(table) == limits.DHT_PER_SUBNET_IN_TABLE_MAX
    table.seen(far(70, "9.9.9.9:1"))
    assert far(70) in table
    for held in table.contacts():
        table.remove(held)
    assert len(table) == 0
    assert table._subnets == {}
    for number in range(20):  # private networks are not counted
        table.seen(far(number, f"10.0.0.{number}:1"))
    assert len(table) == 20


def test_many_newcomers_neither_displace_nor_exhaust() -> None:
    table = RoutingTable(OWN, k=20)
    old = [far(number) for number in range(20)]
    for entry in old:
        table.seen(entry)
    for number in range(1000, 6000):
        table.seen(far(number))
        table.seen(old[0])  # the pinged one always answers
        old.append(old.pop(0))
    assert sorted(c.id for c in table.contacts()) == sorted(c.id for c in old)
    bucket = table._buckets[159]
    assert len(bucket.waiting) == limits.DHT_REPLACEMENTS_MAX


def test_refresh_targets_fall_into_the_bucket_that_waited_longest() -> None:
    table = RoutingTable(OWN)
    rng = Random(1)
    assert table.stalest(0.0, rng, 300.0) is None
    table.seen(far(0))
    table.seen(contact(OWN ^ (1 << 157)))
    seen = []
    for _ in range(4):
        target = table.stalest(1000.0, rng, 300.0)
        assert target is not None
        seen.append(bucket_index(OWN, target))
    assert sorted(seen) == [156, 157, 158, 159]
    assert table.stalest(1000.0, rng, 300.0) is None
    table.looked_up(1200.0, 0)
    again = table.stalest(1300.0, rng, 300.0)
    assert again is not None
    assert bucket_index(OWN, again) != 159
    assert table.stalest(-math.inf, rng, 300.0) is None


def test_refresh_reaches_the_lowest_bucket() -> None:
    table = RoutingTable(OWN)
    table.seen(contact(OWN ^ 1))
    targets = {table.stalest(0.0, Random(1), 1.0) for _ in range(160)}
    assert OWN ^ 1 in targets
    assert len(targets) == 160
