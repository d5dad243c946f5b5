"""Who is suspected of being frozen, how soon, and who is not."""

from __future__ import annotations

import heapq
import random

import pytest

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Effect, Emit, PeerId, Probe
from swarmtrain_protocols.detector import SUSPECT_AGAIN_S, FailureDetector

A, B = PeerId(b"a" * 32), PeerId(b"b" * 32)


class Bench:
    """A detector, and peers that answer after ``delay_s()`` unless they stand still."""

    def __init__(self, *peers: PeerId, delay_s: float = 0.001) -> None:
        self.now = 0.0
        self.out: list[Effect] = []
        self.detector = FailureDetector(self.out)
        self.waited = list(peers)
        self.delays = dict.fromkeys(peers, delay_s)
        self.frozen: dict[PeerId, float] = {}
        """Until when."""
        self.told: list[tuple[float, str, PeerId]] = []
        self.asked: list[tuple[float, PeerId]] = []
        self._answers: list[tuple[float, PeerId, float]] = []

    def run(self, until: float, step_s: float = 0.01) -> None:
        """Let time pass in steps, as a loop with that latency does."""
        while self.now < until:
            self.now += step_s
            self.detector.wake(self.now, bool(self.waited))
            while self._answers and self._answers[0][0] <= self.now:
                at, peer, asked = heapq.heappop(self._answers)
                if self.frozen.get(peer, 0.0) > at:
                    heapq.heappush(self._answers, (self.frozen[peer], peer, asked))
                else:
                    self.detector.answered(self.now, peer, self.now - asked)
            if self.now >= self.detector.deadline():
                self.detector.look(self.now, self.waited)
            self._take()

    def _take(self) -> None:
        for effect in self.out:
            if isinstance(effect, Probe):
                self.asked.append((self.now, effect.peer))
                due = self.now + self.delays[effect.peer]
                heapq.heappush(self._answers, (due, effect.peer, self.now))
            elif isinstance(effect, Emit):
                peer = bytes.fromhex(str(effect.event.fields["peer"]))  # type: ignore[attr-defined]
                self.told.append((self.now, effect.event.name, PeerId(peer)))  # type: ignore[attr-defined]
        self.out.clear()


@pytest.mark.parametrize("frozen_at", [10.0, 10.1, 10.2, 10.3, 10.37])
def test_a_frozen_peer_is_suspected_within_two_seconds_and_answers_when_it_goes_on(
    frozen_at: float,
) -> None:
    bench = Bench(A, B)
    bench.run(frozen_at)
    bench.frozen[B] = frozen_at + 20.0
    bench.run(frozen_at + 19.9)
    ((at, name, who),) = bench.told
    assert (name, who) == ("peer_silent", B)
    assert limits.STALL_S < at - frozen_at < 2.0
    assert list(bench.detector.suspected) == [B]
    bench.run(frozen_at + 20.1)
    assert [name for _, name, _ in bench.told] == ["peer_silent", "peer_answers"]
    assert not bench.detector.suspected


def test_a_peer_that_was_frozen_before_anybody_waited_is_suspected_as_soon() -> None:
    bench = Bench(A, B)
    bench.run(5.0)
    bench.waited = []
    bench.frozen[B] = 90.0
    bench.run(30.0)
    assert bench.told == []
    bench.waited = [A, B]
    bench.run(32.0)
    assert [(name, who) for _, name, who in bench.told] == [("peer_silent", B)]


def test_waits_that_are_shorter_than_an_answer_may_take_find_it_too() -> None:
    """Who was asked owes an answer, whether or not somebody waits for it all the time."""
    bench = Bench(A, B)
    bench.run(5.0)
    bench.frozen[B] = 90.0
    for _ in range(4):
        bench.waited = [A, B]
        bench.run(bench.now + 0.5)
        bench.waited = []
        bench.run(bench.now + 0.5)
    ((at, name, who),) = bench.told
    assert (name, who) == ("peer_silent", B) and at < 7.0


def test_stalls_of_a_second_and_jitter_make_nobody_suspect() -> None:
    luck = random.Random(3)
    bench = Bench(A, B)
    bench.run(2.0)
    for _ in range(300):
        bench.delays = {peer: luck.uniform(0.0, 0.3) for peer in (A, B)}
        bench.frozen[A] = bench.now + luck.uniform(0.0, 1.0)
        bench.run(bench.now + luck.uniform(1.0, 3.0))
    assert bench.told == []


@pytest.mark.parametrize("delay_s", [0.0, 0.16, 0.6, 3.0])
def test_the_time_follows_the_delays(delay_s: float) -> None:
    bench = Bench(A, delay_s=delay_s)
    bench.run(40.0)
    assert bench.told == []
    bench.frozen[A] = 1000.0
    bench.run(60.0)
    ((at, name, _),) = bench.told
    assert name == "peer_silent" and delay_s + limits.STALL_S < at - 40.0 < 3 * delay_s + 2.0


def test_one_wrong_suspicion_teaches_patience() -> None:
    bench = Bench(A)
    bench.run(10.0)
    for _ in range(6):
        bench.frozen[A] = bench.now + 2.0
        bench.run(bench.now + 2.5)
    assert [name for _, name, _ in bench.told] == ["peer_silent", "peer_answers"]


def test_an_unknown_link_is_given_four_seconds() -> None:
    bench = Bench(A)
    bench.frozen[A] = 1000.0
    bench.run(6.0)
    ((at, _, _),) = bench.told
    assert limits.ANSWER_S_UNKNOWN < at < limits.ANSWER_S_UNKNOWN + 0.5


def test_any_word_counts_and_a_talker_is_hardly_asked() -> None:
    bench = Bench(A)
    bench.run(3.0)
    bench.asked.clear()
    while bench.now < 13.0:
        bench.detector.heard(bench.now, A)
        bench.run(bench.now + 0.1)
    assert bench.told == [] and len(bench.asked) <= 3


def test_what_this_side_slept_through_is_nobodys_silence() -> None:
    bench = Bench(A)
    bench.run(5.0)
    bench.frozen[A] = 5.8
    bench.run(5.5)
    bench.now += 30.0  # the loop stood still: it looks before it reads what lies in its sockets
    bench.detector.look(bench.now, bench.waited)
    bench.run(bench.now + 1.0)
    assert bench.told == []


def test_nobody_is_asked_whom_nobody_waits_for() -> None:
    bench = Bench(A, B)
    bench.waited = []
    bench.run(60.0)
    assert bench.asked == [] and bench.detector.deadline() == float("inf")


def test_many_are_asked_no_faster_than_a_bounded_rate() -> None:
    peers = [PeerId(bytes([i]) * 32) for i in range(200)]
    bench = Bench(*peers)
    bench.run(60.0)
    assert bench.told == [] and len(bench.asked) < 60.0 * limits.PROBES_PER_S_MAX * 1.1


def test_a_suspect_is_asked_now_and_then_until_its_link_ends() -> None:
    bench = Bench(A)
    bench.run(5.0)
    bench.frozen[A] = 1000.0
    bench.run(8.0)
    bench.asked.clear()
    bench.waited = []
    bench.run(8.0 + 6 * SUSPECT_AGAIN_S)
    assert 5 <= len(bench.asked) <= 7
    bench.detector.disconnected(A)
    bench.run(bench.now + 2 * SUSPECT_AGAIN_S)
    assert not bench.detector.suspected and bench.detector.deadline() == float("inf")


def test_a_doubted_peer_is_suspected_until_it_answers() -> None:
    bench = Bench(A, delay_s=0.3)
    bench.detector.doubt(0.0, A)
    assert A in bench.detector.suspected
    bench.run(0.5)
    assert A not in bench.detector.suspected
    assert [name for _, name, _ in bench.told] == ["peer_silent", "peer_answers"]
