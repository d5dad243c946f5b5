"""Preemption traces, and fleets under them: how near the optimum the assigner keeps them."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest

from swarmtrain_protocols.pipeline.census import AssignPolicy
from swarmtrain_protocols.testing.fleet import Fleet, FleetWorker
from swarmtrain_protocols.testing.spot import HOUR_S, LIFE_S_MAX, spot_trace

POLICY = AssignPolicy(period_s=120.0, report_s=15.0, grace_s=10.0)


def run(seed: int, *, assigned: bool = True, slots: int = 12, hours: float = 4.0) -> Fleet:
    """A short trace with short lives on three stages."""
    rng = random.Random(seed)

    def anywhere(world: Fleet, worker: FleetWorker) -> int:
        return rng.randint(1, 3)

    place = None if assigned else anywhere
    world = Fleet(blocks=3, policy=POLICY, download_s=30.0, place=place)
    stays = spot_trace(
        seed, slots=slots, duration_s=hours * HOUR_S, mean_life_s=HOUR_S, reclaim_every_s=HOUR_S
    )
    for number, stay in enumerate(stays):
        world.crash(stay.end_s, world.arrive(stay.begin_s, f"machine {number}"))
    world.run(hours * HOUR_S)
    return world


def test_a_trace_has_the_lives_and_the_losses_that_it_is_described_with() -> None:
    stays = spot_trace(1, slots=400, reclaim_every_s=1e12)
    assert stays == spot_trace(1, slots=400, reclaim_every_s=1e12)
    lives = [stay.end_s - stay.begin_s for stay in stays if stay.begin_s < 4 * HOUR_S]
    assert max(lives) <= LIFE_S_MAX
    # Weibull(0.7): more than half live for less than two thirds of the mean, here 6 h.
    young = sum(life < 4 * HOUR_S for life in lives) / len(lives)
    assert young == pytest.approx(1 - 2.718281828 ** -((4 / 6 * 1.2658) ** 0.7), abs=0.03)
    alive = [sum(s.begin_s <= h * HOUR_S < s.end_s for s in stays) for h in range(1, 30)]
    assert 0.9 * 400 < statistics.mean(alive) <= 400


def test_capacity_is_taken_back_at_once_and_stays_away_for_a_while() -> None:
    stays = spot_trace(3)
    ends: dict[float, int] = {}
    for stay in stays:
        ends[stay.end_s] = ends.get(stay.end_s, 0) + 1
    at, lost = max(ends.items(), key=lambda item: item[1])
    assert lost >= 4
    assert not any(at <= stay.begin_s < at + 300.0 for stay in stays)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_fleet_under_preemption_stays_near_the_optimum(seed: int) -> None:
    world = run(seed)
    left_alone = run(seed, assigned=False)
    assert world.best == pytest.approx(left_alone.best)
    assert world.done >= 0.9 * world.best
    assert world.done >= 1.15 * left_alone.done
    assert not world.returns(2 * POLICY.period_s)
    plain = [move.at for move in world.moves() if move.reason != "cover"]
    assert all(b - a >= POLICY.period_s - 0.1 for a, b in itertools.pairwise(plain))


def test_equal_seeds_give_equal_fleets() -> None:
    one, two = run(5, hours=1.0), run(5, hours=1.0)
    assert one.assignments == two.assignments and one.done == two.done
