"""Offered snapshots: newest few, and older ones for as long as somebody fetches them."""

from __future__ import annotations

import numpy as np

from swarmtrain_peer.offers import IDLE_S, RETIRED_MAX, Offers
from swarmtrain_protocols.dataplane import DataPlane
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.state import CanonicalState

ONE, TWO = "train/1/0", "train/2/0"


class Bench:
    def __init__(self, kept: int = 2) -> None:
        self.now = 100.0
        self.data = DataPlane()
        self.snapshots: dict[str, list[tuple[int, bytes]]] = {}
        self.offers = Offers(self.data, self.snapshots, kept, lambda: self.now)

    def add(self, round_number: int, channel: str = ONE) -> bytes:
        blob = a_blob(round_number, channel)
        self.offers.add(channel, round_number, blob)
        return blob.root

    def served(self, *roots: bytes) -> list[bool]:
        return [self.data.provide(root) is not None for root in roots]


def a_blob(round_number: int, channel: str = ONE) -> Blob:
    theta = np.full(8, round_number, np.float32)
    return CanonicalState.first(channel, theta, round=round_number).blob()


def test_the_newest_are_offered_and_older_ones_stay_for_whoever_fetches_them() -> None:
    bench = Bench()
    roots = [bench.add(number) for number in (0, 10, 20)]
    assert bench.snapshots == {ONE: [(10, roots[1]), (20, roots[2])]}
    assert bench.served(*roots) == [True] * 3
    assert bench.offers.oldest() == {ONE: 0}
    for _ in range(4):  # a slow download: a range now and then
        bench.now += IDLE_S - 1
        bench.offers.used(roots[0])
        bench.offers.sweep()
        assert bench.served(roots[0]) == [True]
    bench.now += IDLE_S
    bench.offers.sweep()
    assert bench.served(*roots) == [False, True, True], "what is on offer needs no asking"
    assert bench.offers.oldest() == {ONE: 10}


def test_there_is_a_bound_on_old_offers() -> None:
    bench = Bench(kept=1)
    roots = [bench.add(number) for number in range(RETIRED_MAX + 4)]
    assert bench.snapshots[ONE] == [(RETIRED_MAX + 3, roots[-1])]
    assert bench.served(*roots) == [False] * 3 + [True] * (RETIRED_MAX + 1)


def test_an_offer_made_again_is_the_same_offer() -> None:
    bench = Bench(kept=1)
    first = bench.add(0)
    bench.add(10)
    assert bench.add(0) == first  # after a rewind
    assert bench.snapshots[ONE] == [(0, first)]
    bench.add(0)
    bench.offers.withdraw(ONE)
    assert bench.served(first) == [False] and bench.snapshots == {}


def test_a_withdrawn_channel_takes_nothing_of_others_with_it() -> None:
    bench = Bench()
    one, two = bench.add(0), bench.add(0, TWO)
    for number in (10, 20):
        bench.add(number)
    bench.offers.withdraw(ONE)
    assert bench.snapshots == {TWO: [(0, two)]}
    assert bench.served(one, two) == [False, True]
    bench.offers.retire(one)
    bench.offers.used(one)
    assert bench.offers.oldest() == {TWO: 0}


def test_what_is_fetched_now_is_known_by_who_asks() -> None:
    bench = Bench()
    first = bench.add(1)
    bench.add(2)
    assert bench.offers.fetched_now() == {}, "to be offered is not to be asked for"
    bench.offers.used(first)
    assert bench.offers.fetched_now() == {ONE: [1]}
    bench.now += IDLE_S + 1
    assert bench.offers.fetched_now() == {}
