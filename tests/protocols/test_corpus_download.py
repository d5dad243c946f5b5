"""A corpus arrives from whoever has it, whatever else they do."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import CancelFetch, Emit, Fetch, PeerId
from swarmtrain_protocols.corpus import Descriptor
from swarmtrain_protocols.corpus_download import (
    AGAIN_S_MAX,
    DONORS_MAX,
    PROBES_MAX,
    RANGES_PER_DONOR,
    CorpusDownload,
    Finish,
    Prepare,
    Refused,
)
from swarmtrain_protocols.errors import LocalProtocolError

MIB = limits.CORPUS_CHUNK_BYTES
CORPUS = Descriptor(37 * MIB, 3 * MIB + 5, b"r" * 32)
PEERS = [PeerId(bytes([n]) * 32) for n in range(1, 41)]
Answer = Callable[[Fetch], str | float]
"""Reason of a failure, or seconds until success."""


class World:
    """Members that answer by a rule, in virtual time. The data plane is a list of places."""

    def __init__(self, rule: Answer, peers: int = 8, seed: int = 1, have: tuple[int, ...] = ()):
        self.now = 0.0
        self.members = list(PEERS[:peers])
        self.rule = rule
        self.have = have
        self.core = CorpusDownload(
            now=0.0, root=CORPUS.hash, rng=random.Random(seed), candidates=lambda: self.members
        )
        self.flying: dict[int, tuple[float, Fetch, str]] = {}
        self.sent: list[Fetch] = []
        self.cancelled: list[int] = []
        self.places: dict[int, PeerId] = {}
        self.prepared = self.finished = 0
        self.refused = ""
        self.most_per_peer = 0

    def drain(self) -> None:
        for effect in self.core.drain():
            if isinstance(effect, Fetch):
                assert effect.ticket not in self.flying
                answer = self.rule(effect)
                delay, reason = (0.01, answer) if isinstance(answer, str) else (answer, "")
                self.flying[effect.ticket] = (self.now + delay, effect, reason)
                self.sent.append(effect)
                self.check_load(effect.peer)
            elif isinstance(effect, CancelFetch):
                self.cancelled.append(effect.ticket)
                del self.flying[effect.ticket]
            elif isinstance(effect, Prepare):
                assert effect.descriptor == CORPUS
                self.prepared += 1
                self.core.prepared(self.now, self.have)
                self.drain()
            elif isinstance(effect, Finish):
                self.finished += 1
                assert not [f for f in self.flying.values() if f[1].purpose == "body"]
            else:
                assert isinstance(effect, Emit) and isinstance(effect.event, Refused)
                self.refused = effect.event.reason

    def check_load(self, peer: PeerId) -> None:
        flights = [f for _, f, _ in self.flying.values()]
        assert sum(f.purpose == "descriptor" for f in flights) <= PROBES_MAX
        load = sum(f.peer == peer and f.purpose == "body" for f in flights)
        assert load <= RANGES_PER_DONOR
        places = [f.first + i for f in flights if f.purpose == "body" for i in range(f.count)]
        assert len(set(places)) == len(places), "a chunk has one writer at a time"

    def run(self, until: float) -> None:
        self.core.tick(self.now)
        self.drain()
        while not self.finished and not self.refused:
            arrivals = [(at, ticket) for ticket, (at, _, _) in self.flying.items()]
            at, ticket = min(arrivals, default=(math.inf, 0))
            if min(at, self.core.deadline()) > until:
                break
            if self.core.deadline() <= at:
                self.now = max(self.now, self.core.deadline())
                self.core.tick(self.now)
            else:
                self.now = max(self.now, at)
                self.answer(ticket)
            self.drain()

    def answer(self, ticket: int) -> None:
        _, fetch, reason = self.flying.pop(ticket)
        if reason:
            self.core.fetch_failed(self.now, ticket, reason)
        elif fetch.purpose == "descriptor":
            assert (fetch.root, fetch.first, fetch.count) == (CORPUS.hash, 0, 1)
            self.core.fetched(self.now, ticket, CORPUS.to_bytes())
        else:
            assert fetch.root == CORPUS.root
            for index in range(fetch.first, fetch.first + fetch.count):
                assert index not in self.places and index not in self.have
                self.places[index] = fetch.peer
            self.core.fetched(self.now, ticket)

    @property
    def whole(self) -> bool:
        return sorted([*self.places, *self.have]) == list(range(CORPUS.chunks))


def body_bytes(fetch: Fetch) -> int:
    return sum(CORPUS.chunk_nbytes(fetch.first + i) for i in range(fetch.count))


def at_rate(bytes_per_s: float) -> Answer:
    def rule(fetch: Fetch) -> float:
        return 0.01 if fetch.purpose == "descriptor" else body_bytes(fetch) / bytes_per_s

    return rule


def test_everything_is_fetched_once_from_several_holders() -> None:
    world = World(at_rate(10e6))
    world.run(until=100)
    assert world.finished == 1 and world.whole
    assert world.core.have_bytes == CORPUS.nbytes
    assert len(set(world.places.values())) == DONORS_MAX
    assert world.core.deadline() == math.inf and world.core.drain() == []
    tickets = [fetch.ticket for fetch in world.sent]
    assert tickets == sorted(tickets, reverse=True) and tickets[0] == -1


def test_what_is_there_is_not_fetched_again() -> None:
    have = (0, 1, 2, 7, 39, 40)
    world = World(at_rate(10e6), have=have)
    world.run(until=100)
    assert world.finished and world.whole
    asked = {f.first + i for f in world.sent if f.purpose == "body" for i in range(f.count)}
    assert asked == set(range(41)) - set(have)
    whole = World(at_rate(10e6), have=tuple(range(41)))
    whole.run(until=100)
    assert whole.finished and not [f for f in whole.sent if f.purpose == "body"]


def test_a_slow_link_gets_short_ranges_and_time() -> None:
    """20 kB/s: a chunk takes most of a minute, twice that when two share the link."""

    def rule(fetch: Fetch) -> float:
        return 0.01 if fetch.purpose == "descriptor" else 2 * body_bytes(fetch) / 20e3

    world = World(rule, peers=1)
    world.run(until=1e5)
    assert world.finished and world.whole
    assert {f.count for f in world.sent if f.purpose == "body"} == {1}
    assert world.cancelled == [] or max(world.cancelled) < 0


def test_a_fast_holder_is_asked_for_more_at_once() -> None:
    world = World(at_rate(100e6), peers=1)
    world.run(until=100)
    assert world.finished
    assert max(f.count for f in world.sent) == 16


def test_a_liar_is_asked_once_and_the_others_send_the_rest() -> None:
    liar = PEERS[2]

    def rule(fetch: Fetch) -> str | float:
        if fetch.peer == liar and fetch.purpose == "body":
            return "corrupt"
        return 0.01 if fetch.purpose == "descriptor" else 0.2

    world = World(rule, peers=4)
    world.run(until=1000)
    assert world.finished and world.whole
    assert liar not in world.places.values()
    assert 1 <= sum(f.peer == liar and f.purpose == "body" for f in world.sent) <= RANGES_PER_DONOR


def test_holders_are_found_among_many_who_have_nothing() -> None:
    holder = PEERS[33]

    def rule(fetch: Fetch) -> str | float:
        return 0.05 if fetch.peer == holder else "refused:unknown"

    world = World(rule, peers=40)
    world.run(until=1000)
    assert world.finished and set(world.places.values()) == {holder}


def test_nobody_has_it_until_somebody_comes() -> None:
    world = World(lambda fetch: "refused:unknown", peers=3)
    world.run(until=300)
    assert not world.finished and world.prepared == 0
    assert world.core.alone_since_s == 0.0
    assert sorted(world.core.asked) == PEERS[:3] and min(world.core.asked.values()) >= 3
    per_peer = len(world.sent) / 3
    assert per_peer < 300 / AGAIN_S_MAX + 8, "asking again slows down"
    world.members.append(PEERS[3])
    world.rule = lambda fetch: 0.1 if fetch.peer == PEERS[3] else "refused:unknown"
    world.run(until=400)
    assert world.finished and world.whole and world.core.alone_since_s == math.inf


def test_a_holder_that_vanishes_comes_back() -> None:
    gone_from, gone_until = 1.0, 60.0

    def rule(fetch: Fetch) -> str | float:
        if gone_from <= world.now < gone_until:
            return "disconnected"
        return 0.01 if fetch.purpose == "descriptor" else 0.3 * fetch.count

    world = World(rule, peers=1)
    world.run(until=50)
    assert not world.finished and 1.0 <= world.core.alone_since_s < 10.0  # what flew arrived
    before = len(world.places)
    assert before
    world.run(until=500)
    assert world.finished and world.whole and world.prepared == 1


def test_a_holder_that_hangs_is_given_up() -> None:
    def rule(fetch: Fetch) -> str | float:
        if fetch.purpose == "descriptor":
            return 0.01
        return 1e9 if fetch.peer == PEERS[0] else 0.1

    world = World(rule, peers=2)
    world.run(until=1000)
    assert world.finished and world.whole
    assert set(world.places.values()) == {PEERS[1]}
    assert len(world.cancelled) >= 1


def test_a_body_that_proves_wrong_as_a_whole_is_fetched_anew() -> None:
    world = World(at_rate(50e6))
    world.run(until=100)
    assert world.finished == 1
    world.finished, world.places, before = 0, {}, len(world.sent)
    world.core.restart(world.now)
    world.run(until=200)
    assert world.finished == 1 and world.whole and world.prepared == 2
    assert world.core.have_bytes == CORPUS.nbytes
    assert len(world.sent) > before


def test_what_is_no_corpus_ends_it() -> None:
    core = CorpusDownload(
        now=0.0, root=b"h" * 32, rng=random.Random(1), candidates=lambda: PEERS[:2]
    )
    core.tick(0.0)
    first, second = core.drain()
    assert isinstance(first, Fetch) and isinstance(second, Fetch)
    core.fetched(0.1, first.ticket, b"x" * 56)
    cancel, emitted = core.drain()
    assert cancel == CancelFetch(second.ticket)
    assert isinstance(emitted, Emit) and isinstance(emitted.event, Refused)
    assert "malformed" in emitted.event.reason
    core.tick(1.0)
    core.fetch_failed(1.0, second.ticket, "late")
    assert core.drain() == [] and core.deadline() == math.inf


def test_misuse() -> None:
    world = World(at_rate(1e6))
    with pytest.raises(LocalProtocolError):
        world.core.prepared(0.0, [])
    world.run(until=1)
    assert world.prepared
    with pytest.raises(LocalProtocolError):
        world.core.prepared(1.0, [])


@pytest.mark.parametrize("seed", range(40))
def test_it_arrives_whatever_happens_as_long_as_one_holder_is_honest(seed: int) -> None:
    rng = random.Random(seed)
    kinds = {peer: rng.choice(["good", "none", "liar", "flaky", "hang"]) for peer in PEERS[:10]}
    kinds[PEERS[rng.randrange(10)]] = "good"

    def rule(fetch: Fetch) -> str | float:
        kind = kinds[fetch.peer]
        if kind == "none":
            return "refused:unknown"
        if kind == "flaky" and rng.random() < 0.5:
            return rng.choice(["disconnected", "refused:busy", "timeout"])
        if fetch.purpose == "descriptor":
            return rng.uniform(0.01, 1.0)
        if kind == "liar":
            return "corrupt"
        return 1e9 if kind == "hang" else body_bytes(fetch) / rng.uniform(1e5, 1e7)

    world = World(rule, peers=10, seed=seed)
    world.run(until=1e5)
    assert world.finished == 1 and world.whole
    assert not {p for p in world.places.values() if kinds[p] in ("none", "liar", "hang")}
