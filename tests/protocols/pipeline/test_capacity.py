"""Throughput of workers that serve one or several stages, against enumeration of all sets."""

from __future__ import annotations

import itertools
import random

import pytest

from swarmtrain_protocols.pipeline.capacity import throughput


def by_enumeration(speeds: dict[tuple[int, ...], float], costs: dict[int, float]) -> float:
    """Hall's condition over every set of stages."""
    worst = float("inf")
    for size in range(1, len(costs) + 1):
        for chosen in itertools.combinations(costs, size):
            work = sum(v for served, v in speeds.items() if set(served) & set(chosen))
            worst = min(worst, work / sum(costs[s] for s in chosen))
    return worst


def by_division(speeds: dict[tuple[int, ...], float], costs: dict[int, float], grid: int) -> float:
    """Every division of every worker's time on a grid: what a schedule can really do."""
    shares = []
    for served, speed in speeds.items():
        cuts = itertools.product(range(grid + 1), repeat=len(served) - 1)
        shares.append(
            [
                dict(zip(served, (*(speed * c / grid for c in cut), rest), strict=True))
                for cut in cuts
                if (rest := speed * (grid - sum(cut)) / grid) >= 0
            ]
        )
    return max(
        min(sum(s.get(stage, 0.0) for s in choice) / cost for stage, cost in costs.items())
        for choice in itertools.product(*shares)
    )


def test_with_one_stage_each_it_is_the_slowest_stage() -> None:
    speeds = {(1,): 5.0, (2,): 1.0, (3,): 2.0}
    assert throughput(speeds, {1: 1.0, 2: 1.0, 3: 1.0}) == (1.0, (2,))
    assert throughput(speeds, {1: 10.0, 2: 1.0, 3: 1.0}) == (0.5, (1,))


def test_stages_that_are_equally_slow_are_named_together() -> None:
    speeds = {(1,): 8.0, (2,): 8.0, (3,): 12.0, (4,): 12.0}
    assert throughput(speeds, dict.fromkeys((1, 2, 3, 4), 1.0)) == (8.0, (1, 2))


def test_a_stage_without_a_worker_stops_everything() -> None:
    rate, tight = throughput({(1,): 5.0}, {1: 1.0, 2: 1.0})
    assert (rate, tight) == (0.0, (2,))
    assert throughput({}, {1: 1.0, 2: 1.0}) == (0.0, (1, 2))


def test_a_worker_of_two_stages_gives_its_time_where_it_is_needed() -> None:
    speeds = {(0, 1): 4.0, (2,): 2.0}
    rate, tight = throughput(speeds, {0: 0.5, 1: 1.0, 2: 1.0})
    assert rate == pytest.approx(2.0) and tight == (2,)
    rate, tight = throughput({(0, 1): 4.0, (2,): 9.0}, {0: 1.0, 1: 1.0, 2: 1.0})
    assert rate == pytest.approx(2.0) and tight == (0, 1)


def test_it_equals_the_best_division_of_time() -> None:
    speeds = {(0, 1): 4.0, (0, 2): 2.0, (1, 2): 2.0, (2,): 1.0}
    costs = {0: 1.0, 1: 2.0, 2: 1.0}
    assert throughput(speeds, costs)[0] == pytest.approx(by_division(speeds, costs, 8))


@pytest.mark.parametrize("seed", range(60))
def test_it_equals_the_enumeration_of_all_sets_of_stages(seed: int) -> None:
    rng = random.Random(seed)
    stages = rng.randint(1, 6)
    costs = {s: rng.choice((0.3, 1.0, 1.0, 2.5)) for s in range(stages)}
    speeds: dict[tuple[int, ...], float] = {}
    for _ in range(rng.randint(0, 9)):
        served = tuple(sorted(rng.sample(range(stages), rng.randint(1, min(3, stages)))))
        speeds[served] = speeds.get(served, 0.0) + rng.choice((0.5, 1.0, 1.0, 3.0))
    rate, tight = throughput(speeds, costs)
    assert rate == pytest.approx(by_enumeration(speeds, costs))
    work = sum(v for served, v in speeds.items() if set(served) & set(tight))
    assert rate == pytest.approx(work / sum(costs[s] for s in tight)), "the set named is the reason"
