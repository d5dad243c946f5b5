"""Routing by expected finish: shares follow measured rates, silence costs, luck breaks ties."""

from __future__ import annotations

import heapq
import random

import pytest

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.pipeline.routing import (
    BAN_S,
    EMA_ALPHA,
    MANY_REPLICAS,
    OBSERVATIONS_FOR_HEDGE,
    Policy,
    Router,
)

FORWARD = (1, False)
BACKWARD = (1, True)


def peers(count: int) -> list[PeerId]:
    return [PeerId(bytes([number]) * 32) for number in range(count)]


def measured(router: Router, worker: PeerId, seconds: float, ticket: int = 10_000) -> None:
    """One request and its answer, long after all others."""
    now = 1000.0 + ticket * 1000.0
    router.sent(now, ticket, worker, FORWARD)
    router.replied(now + seconds, ticket)


def closed_loop(policy: Policy, seconds: list[float], jobs: int, window: int) -> list[int]:
    """``window`` requests are always under way; how many each worker has done when all are.

    Workers serve in order of arrival; the finish time of the last job is appended.
    """
    router = Router(random.Random(7), policy)
    workers = peers(len(seconds))
    free_at = [0.0] * len(seconds)
    done = [0] * len(seconds)
    heap: list[tuple[float, int, int]] = []
    now, issued = 0.0, 0
    while issued < jobs or heap:
        while issued < jobs and len(heap) < window:
            worker = router.choose(now, FORWARD, workers)
            assert worker is not None
            index = workers.index(worker)
            router.sent(now, issued, worker, FORWARD)
            free_at[index] = max(free_at[index], now) + seconds[index]
            heapq.heappush(heap, (free_at[index], issued, index))
            issued += 1
        now, ticket, index = heapq.heappop(heap)
        router.replied(now, ticket)
        done[index] += 1
    return [*done, round(now * 1000)]


def test_one_worker_four_times_slower_at_least_1_4_times_uniform_round_robin() -> None:
    """Experiment 7.5 of the reference: share near the rates, throughput well above uniform."""
    seconds = [0.1, 0.1, 0.1, 0.4]
    *shares, took_ms = closed_loop("least-finish", seconds, 1000, 16)
    *_, uniform_ms = closed_loop("uniform", seconds, 1000, 16)
    assert uniform_ms / took_ms >= 1.4
    wanted = 1000 * (1 / 0.4) / (3 / 0.1 + 1 / 0.4)
    assert abs(shares[3] - wanted) <= 0.2 * wanted
    assert max(shares[:3]) - min(shares[:3]) <= 0.1 * max(shares[:3])
    *_, small_ms = closed_loop("least-finish", seconds, 1000, 8)
    *_, small_uniform_ms = closed_loop("uniform", seconds, 1000, 8)
    assert small_uniform_ms / small_ms >= 1.4


def test_uniform_gives_everybody_the_same() -> None:
    *shares, _ = closed_loop("uniform", [0.1, 0.1, 0.4], 300, 4)
    assert shares == [100, 100, 100]


def test_estimates_are_exponential_averages_of_the_time_since_the_previous_answer() -> None:
    router = Router(random.Random(1))
    (worker,) = peers(1)
    router.sent(10.0, 1, worker, FORWARD)
    router.sent(10.0, 2, worker, FORWARD)
    assert router.replied(11.0, 1) == 1.0
    assert router.estimate(FORWARD, worker) == 1.0
    assert router.replied(13.0, 2) == 3.0  # of which it waited one second behind the first
    assert router.estimate(FORWARD, worker) == pytest.approx(1.0 + EMA_ALPHA * (2.0 - 1.0))


def test_a_timeout_is_an_observation_and_a_ban_that_doubles() -> None:
    router = Router(random.Random(1))
    fast, slow = peers(2)
    measured(router, fast, 1.0, 1)
    measured(router, slow, 0.5, 2)
    now = 1e6
    router.sent(now, 3, slow, FORWARD)
    router.timed_out(now + 8.0, 3)
    assert router.estimate(FORWARD, slow) == pytest.approx(0.5 + EMA_ALPHA * 7.5)
    assert router.is_banned(now + 8.0 + BAN_S - 0.01, slow)
    assert not router.is_banned(now + 8.0 + BAN_S, slow)
    router.sent(now + 20.0, 4, slow, FORWARD)
    router.failed(now + 20.5, 4)
    assert router.estimate(FORWARD, slow) == pytest.approx(0.5 + EMA_ALPHA * 7.5)
    assert router.is_banned(now + 20.5 + 2 * BAN_S - 0.01, slow)
    assert not router.is_banned(now + 20.5 + 2 * BAN_S, slow)


def test_bans_are_ignored_if_everybody_is_banned() -> None:
    router = Router(random.Random(1))
    one, two = peers(2)
    router.sent(0.0, 1, one, FORWARD)
    router.failed(0.1, 1)
    assert router.choose(0.2, FORWARD, [one, two]) == two
    router.sent(0.2, 2, two, FORWARD)
    router.failed(0.3, 2)
    assert router.choose(0.4, FORWARD, [one, two]) in (one, two)
    assert router.choose(0.4, FORWARD, [one]) == one
    assert router.choose(0.4, FORWARD, []) is None


def test_an_answer_ends_a_ban_and_so_does_a_pardon() -> None:
    router = Router(random.Random(1))
    (worker,) = peers(1)
    router.sent(0.0, 1, worker, FORWARD)
    router.sent(0.0, 2, worker, FORWARD)
    router.timed_out(5.0, 1)
    assert router.is_banned(5.1, worker)
    router.replied(5.2, 2)
    assert not router.is_banned(5.3, worker)
    router.sent(6.0, 3, worker, FORWARD)
    router.timed_out(9.0, 3)
    router.late(9.5, worker)
    assert not router.is_banned(9.6, worker)
    router.avoid(10.0, worker, 2.0)
    assert router.is_banned(11.0, worker)
    router.pardon(worker)
    assert not router.is_banned(11.0, worker)


def test_who_has_the_request_already_is_asked_again_only_if_there_is_nobody_else() -> None:
    router = Router(random.Random(1))
    one, two = peers(2)
    measured(router, one, 0.1, 1)
    measured(router, two, 9.0, 2)
    assert router.choose(1e9, FORWARD, [one, two]) == one
    assert router.choose(1e9, FORWARD, [one, two], exclude=[one]) == two
    assert router.choose(1e9, FORWARD, [one], exclude=[one]) == one


def test_outstanding_work_counts_and_kinds_are_measured_apart() -> None:
    router = Router(random.Random(1))
    one, two = peers(2)
    measured(router, one, 1.0, 1)
    measured(router, two, 1.5, 2)
    router.sent(1e9, 3, one, FORWARD)
    assert router.outstanding(one) == 1 and not router.idle(1e9, one) and router.idle(1e9, two)
    assert router.choose(1e9, FORWARD, [one, two]) == two  # 2.0 seconds against 1.5
    assert router.estimate(BACKWARD, one) == 0.0
    router.dropped(3)
    assert router.choose(1e9, FORWARD, [one, two]) == one


def test_a_new_worker_counts_as_the_best_and_is_tried_at_once() -> None:
    router = Router(random.Random(1))
    one, two, new = peers(3)
    measured(router, one, 1.0, 1)
    measured(router, two, 2.0, 2)
    assert router.estimate(FORWARD, new, [one, two, new]) == 1.0
    router.sent(1e9, 3, one, FORWARD)
    assert router.choose(1e9, FORWARD, [one, two, new]) == new


def test_unmeasured_workers_share_by_what_they_have_outstanding() -> None:
    router = Router(random.Random(3))
    workers = peers(4)
    chosen = []
    for ticket in range(8):
        worker = router.choose(0.0, FORWARD, workers)
        assert worker is not None
        router.sent(0.0, ticket, worker, FORWARD)
        chosen.append(worker)
    assert all(chosen.count(worker) == 2 for worker in workers)


def test_timeout_is_four_times_p95_within_bounds() -> None:
    router = Router(random.Random(1))
    (worker,) = peers(1)
    assert router.timeout_s(FORWARD) == limits.HOP_TIMEOUT_S_FIRST
    measured(router, worker, 0.01, 1)
    assert router.timeout_s(FORWARD) == 1.0
    assert router.timeout_s(BACKWARD) == 1.0  # what is not known is guessed from the others
    measured(router, worker, 0.2, 900)
    assert router.timeout_s(BACKWARD) == pytest.approx(3.2)
    for ticket in range(2, 22):
        measured(router, worker, 2.0, ticket)
    assert router.p95_s(FORWARD) == pytest.approx(2.0)
    assert router.timeout_s(FORWARD) == pytest.approx(8.0)
    assert router.timeout_s(BACKWARD) == limits.HOP_TIMEOUT_S_FIRST
    measured(router, worker, 1e4, 30)
    measured(router, worker, 1e4, 31)
    assert router.timeout_s(FORWARD) == 16.0  # two that got lost do not make it long
    for ticket in range(32, 64):
        measured(router, worker, 1e4, ticket)
    assert router.timeout_s(FORWARD) == limits.HOP_TIMEOUT_S_MAX


def test_hedging_starts_at_twice_p95_once_enough_is_known() -> None:
    router = Router(random.Random(1))
    (worker,) = peers(1)
    for ticket in range(OBSERVATIONS_FOR_HEDGE):
        assert router.hedge_s(FORWARD) is None
        measured(router, worker, 0.5, ticket)
    assert router.hedge_s(FORWARD) == pytest.approx(1.0)


def test_two_random_choices_keep_drivers_from_one_favourite() -> None:
    """Above 16 replicas a driver that knows the best one does not send it everything."""
    workers = peers(MANY_REPLICAS + 4)
    router = Router(random.Random(5))
    for ticket, worker in enumerate(workers):
        measured(router, worker, 0.1 if ticket == 0 else 1.0, ticket)
    picks = [router.choose(1e9, FORWARD, workers) for _ in range(2000)]
    share = picks.count(workers[0]) / len(picks)
    assert abs(share - 2 / len(workers)) < 0.03  # it is drawn as one of two
    few = [router.choose(1e9, FORWARD, workers[:MANY_REPLICAS]) for _ in range(50)]
    assert few.count(workers[0]) == 50


def test_choices_repeat_with_the_seed() -> None:
    def picks(seed: int) -> list[PeerId | None]:
        router = Router(random.Random(seed))
        return [router.choose(0.0, FORWARD, peers(40)) for _ in range(30)]

    assert picks(4) == picks(4) != picks(5)


def test_memory_is_bounded_by_the_number_of_members() -> None:
    router = Router(random.Random(1))
    for number in range(limits.MEMBERS_MAX + 50):
        worker = PeerId(number.to_bytes(32, "big"))
        router.sent(float(number), number, worker, FORWARD)
        router.replied(number + 0.5, number)
    assert len(router.rates()) == limits.MEMBERS_MAX
