"""Requests: pace, timeouts, and answers from nobody but who was asked."""

from __future__ import annotations

import math

import pytest

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Connect, PeerId, Send
from swarmtrain_protocols.dht.ids import Contact
from swarmtrain_protocols.dht.requests import Meter, Requests
from swarmtrain_protocols.messages.dht import FindNode, Nodes, Reply, StoreReply

ANN = Contact(PeerId(b"a" * 32), ("ann:1",))
BEN = Contact(PeerId(b"b" * 32), ("ben:1",))


class Bench:
    def __init__(self, now: float = 0.0) -> None:
        self.out: list[object] = []
        self.links: set[PeerId] = set()
        self.requests = Requests(self.out, self.links.__contains__, now)
        self.outcomes: list[tuple[float, Reply | None]] = []
        self.slow: list[float] = []

    def ask(self, now: float, contact: Contact = ANN) -> int:
        number = self.requests.next_number()
        message = FindNode(number, bytes(20))
        self.requests.ask(
            now,
            contact,
            message,
            Nodes,
            lambda at, r: self.outcomes.append((at, r)),
            self.slow.append,
        )
        return number

    def settle(self, now: float) -> None:
        while self.requests.settle(now):
            pass

    def sends(self) -> list[Send]:
        return [effect for effect in self.out if isinstance(effect, Send)]


def test_the_first_request_dials_and_further_ones_do_not() -> None:
    bench = Bench()
    first, second = bench.ask(0.0), bench.ask(0.0)
    assert bench.out == [
        Connect(ANN.peer, ("ann:1",)),
        Send(ANN.peer, FindNode(first, bytes(20))),
        Send(ANN.peer, FindNode(second, bytes(20))),
    ]
    bench.links.add(BEN.peer)
    bench.ask(0.0, BEN)
    assert isinstance(bench.out[-1], Send)
    assert len([e for e in bench.out if isinstance(e, Connect)]) == 1


def test_an_answer_reaches_who_asked_once() -> None:
    bench = Bench()
    number = bench.ask(0.0)
    answer = Nodes(number, ())
    assert bench.requests.answer(ANN.peer, answer, 0.1) is None
    assert bench.outcomes == []  # never from inside a call
    bench.settle(0.1)
    assert bench.outcomes == [(0.1, answer)]
    assert bench.requests.answer(ANN.peer, answer, 0.2) is None
    bench.settle(0.2)
    assert len(bench.outcomes) == 1
    assert bench.requests.late == 1
    assert bench.requests.deadline() == math.inf
    assert len(bench.requests) == 0


def test_an_answer_to_an_earlier_life_is_late_and_answers_nothing() -> None:
    """It was held up at an honest peer while this site restarted (schedule 174)."""
    numbers = [Bench(now=5.0).ask(5.0) for _ in range(3)]
    bench = Bench(now=5.01)
    asked = bench.ask(5.01)
    for number in numbers:
        assert 0 < number < asked
        assert bench.requests.answer(ANN.peer, Nodes(number, ()), 5.02) is None
    bench.settle(5.02)
    assert (bench.outcomes, bench.requests.late) == ([], len(numbers))


def test_answers_that_nobody_asked_for_are_faults_of_their_sender() -> None:
    bench = Bench()
    number = bench.ask(0.0)
    cases = [
        (ANN.peer, Nodes(number + 1, ())),  # a number never given out
        (ANN.peer, Nodes(0, ())),
        (ANN.peer, StoreReply(number, "ok")),  # another kind
    ]
    for peer, message in cases:
        fault = bench.requests.answer(peer, message, 0.1)
        assert fault is not None
        assert (fault.code, fault.peer) == ("dht_unasked", peer)
    # Another peer's answer to a true number is not told apart from a late one, and has no effect.
    assert bench.requests.answer(BEN.peer, Nodes(number, ()), 0.1) is None
    bench.settle(0.1)
    assert bench.outcomes == []
    assert len(bench.requests) == 1


def test_slow_then_timeout() -> None:
    bench = Bench()
    bench.ask(5.0)
    at = bench.requests.deadline()
    assert at == pytest.approx(5.0 + 0.4)  # four assumed round trips
    bench.requests.tick(at)
    bench.settle(at)
    assert bench.slow == [at]
    assert bench.outcomes == []
    at = bench.requests.deadline()
    assert at == pytest.approx(5.0 + limits.DHT_REQUEST_TIMEOUT_S)
    bench.requests.tick(at)
    bench.settle(at)
    assert bench.outcomes == [(at, None)]


def test_what_is_slow_follows_measured_round_trips() -> None:
    bench = Bench()
    for _ in range(60):
        bench.requests.answer(ANN.peer, Nodes(bench.ask(0.0), ()), 0.001)
        bench.requests.lost(0.0, ANN.peer)
    assert bench.requests.slow_s == limits.DHT_SLOW_S_MIN
    for _ in range(60):
        bench.requests.answer(ANN.peer, Nodes(bench.ask(0.0), ()), 0.2)
        bench.requests.lost(0.0, ANN.peer)
    assert bench.requests.slow_s == pytest.approx(0.8, rel=0.01)
    for _ in range(60):
        bench.requests.answer(ANN.peer, Nodes(bench.ask(0.0), ()), 1.9)
        bench.requests.lost(0.0, ANN.peer)
    assert bench.requests.slow_s == limits.DHT_SLOW_S_MAX


def test_a_lost_link_fails_everything_at_once() -> None:
    bench = Bench()
    for _ in range(40):  # some are sent, some wait for their pace
        bench.ask(0.0)
    bench.ask(0.0, BEN)
    bench.requests.lost(1.0, ANN.peer)
    bench.settle(1.0)
    assert bench.outcomes == [(1.0, None)] * 40
    assert len(bench.requests) == 1


def test_the_pace_never_exceeds_what_the_other_side_serves() -> None:
    bench = Bench()
    served = Meter(limits.DHT_RATE_SERVED_PER_S, limits.DHT_BURST_SERVED)
    for _ in range(200):
        bench.ask(0.0)
    assert len(bench.sends()) == limits.DHT_BURST_SENT
    now = 0.0
    done = 0
    while bench.requests.deadline() < math.inf:
        for send in bench.sends()[done:]:
            assert served.take(now)
            assert isinstance(send.message, FindNode)
            bench.requests.answer(ANN.peer, Nodes(send.message.request, ()), now)
            done += 1
        now = max(now, bench.requests.deadline()) if bench.requests.deadline() < math.inf else now
        bench.requests.tick(now)
    assert done == 200
    assert now == pytest.approx(
        (200 - limits.DHT_BURST_SENT) / limits.DHT_RATE_SENT_PER_S, rel=0.02
    )


def test_the_queue_is_bounded_and_overflow_fails() -> None:
    bench = Bench()
    allowed = int(limits.DHT_BURST_SENT) + limits.DHT_REQUESTS_QUEUED_PER_PEER_MAX
    for _ in range(allowed + 7):
        bench.ask(0.0)
    bench.settle(0.0)
    assert bench.outcomes == [(0.0, None)] * 7
    assert len(bench.requests) == allowed


def test_idle_lanes_are_forgotten_once_their_meter_is_full() -> None:
    bench = Bench()
    bench.requests.answer(ANN.peer, Nodes(bench.ask(0.0), ()), 0.01)
    bench.requests.sweep(0.02)
    assert len(bench.requests._lanes) == 1
    bench.requests.sweep(1.0)
    assert len(bench.requests._lanes) == 0


def test_a_meter_gives_its_burst_and_then_its_rate() -> None:
    meter = Meter(10.0, 5.0)
    assert [meter.take(100.0) for _ in range(6)] == [True] * 5 + [False]
    assert meter.wait_s(100.0) == pytest.approx(0.1)
    assert meter.take(100.1 + 1e-9)
    assert not meter.take(100.1 + 2e-9)
    assert sum(meter.take(1e6) for _ in range(100)) == 5
