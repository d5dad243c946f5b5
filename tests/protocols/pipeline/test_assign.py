"""The planner: joins, cover, moves and what they are weighed with, against brute force."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest

from swarmtrain_protocols.pipeline.assign import (
    Change,
    Pace,
    Stage,
    Table,
    Worker,
    cover,
    may_go,
    overloaded,
    place,
    protect,
    rebalance,
    shed,
)

VALUES = 100
PACE = Pace(now=1000.0, period_s=10.0, horizon_s=3600.0, seconds_per_value=0.01)


def stages(count: int, replicas_min: int = 2, ends: int = 0) -> list[Stage]:
    """``count`` equal block stages, and the ends (a tenth of the work) if they want replicas."""
    blocks = [Stage(n, VALUES, 1.0, replicas_min) for n in range(1, count + 1)]
    return [Stage(0, VALUES, 0.1, ends), *blocks] if ends else blocks


def worker(number: int, *served: int, **changes: object) -> Worker:
    """In place for ever, in step with all it serves, room for one stage, speed 1."""
    plain = Worker(bytes([number]) * 32, served, 1.0, VALUES, ready=served)
    return replace(plain, **changes)  # type: ignore[arg-type]


def crowd(*counts: int, **changes: object) -> list[Worker]:
    """``counts[i]`` workers at stage i + 1."""
    found: list[Worker] = []
    for stage, count in enumerate(counts, 1):
        found += [worker(len(found) + k + 1, stage, **changes) for k in range(count)]
    return found


def ident(number: int) -> bytes:
    return bytes([number]) * 32


def lives(table: Table) -> list[int]:
    return [table.live(n) for n in table.stages]


def settle(table: Table, pace: Pace = PACE, periods: int = 30) -> tuple[Table, list[Change]]:
    """Let the planner move workers, one per period; every download is over when the next comes."""
    done = []
    for _ in range(periods):
        change = rebalance(table, pace)
        if change is not None:
            done.append(change)
            table = table.changed(change.member, change.stages, pace.now)
            moved = table.workers[change.member]
            rest = [w for w in table.workers.values() if w.id != moved.id]
            table = Table(table.stages.values(), [*rest, replace(moved, ready=moved.stages)])
        pace = replace(pace, now=pace.now + pace.period_s)
    return table, done


def brute_force(speeds: list[float], count: int) -> float:
    """The best throughput of workers of one stage each, over all placements."""
    best = 0.0
    for choice in itertools.product(range(count), repeat=len(speeds)):
        sums = [0.0] * count
        for speed, stage in zip(speeds, choice, strict=True):
            sums[stage] += speed
        best = max(best, min(sums))
    return best


# --- joining --------------------------------------------------------------------------------------


def test_a_joiner_goes_to_the_stage_with_the_fewest_then_to_the_slowest() -> None:
    slow = [replace(w, speed=0.1) for w in crowd(3)]
    table = Table(stages(3), [*slow, worker(8, 2), worker(10, 3, speed=9.0), worker(9)])
    assert place(table, ident(9)) == Change(ident(9), (2,), "join")  # endangered before slow
    table = Table(stages(3), [*slow, *(worker(10 + k, 2 + k % 2) for k in range(4)), worker(9)])
    assert place(table, ident(9)) == Change(ident(9), (1,), "join")  # 0.3 against 2.0


def test_a_joiner_is_given_what_it_has_room_for() -> None:
    sizes = [Stage(1, 500, 1.0, 2), Stage(2, 100, 1.0, 2)]
    table = Table(sizes, [worker(1, 2), worker(2, 2), worker(9)])
    assert place(table, ident(9)) == Change(ident(9), (2,), "join")
    assert place(Table(sizes, [worker(9, room=99)]), ident(9)) is None
    assert place(Table(sizes, [worker(9, room=0)]), ident(9)) is None


def test_a_joiner_returns_to_a_stage_that_it_has_on_disk_if_that_lacks_workers() -> None:
    table = Table(stages(3), [worker(1, 1), worker(2, 2), worker(3, 3), worker(9, kept=(3,))])
    assert place(table, ident(9)) == Change(ident(9), (3,), "join")
    table = Table(stages(3), [*crowd(2, 2, 3), worker(9, kept=(3,))])
    assert place(table, ident(9)) == Change(ident(9), (1,), "join")


def test_the_ends_stand_beside_a_block_stage_until_there_are_enough() -> None:
    table = Table(stages(2, ends=2), [])
    for number in range(1, 5):
        joiner = worker(number, room=2 * VALUES)
        table = Table(table.stages.values(), [*table.workers.values(), joiner])
        change = place(table, joiner.id)
        assert change is not None
        table = table.changed(joiner.id, change.stages)
    assert lives(table) == [2, 2, 2]
    assert all(w.blocks for w in table.workers.values())


def test_the_ends_stand_alone_only_if_nobody_has_room_for_them_beside_a_stage() -> None:
    blocks = stages(2, replicas_min=1, ends=1)
    table = Table(blocks, [worker(1, 1), worker(2, 2), worker(9)])
    assert place(table, ident(9)) == Change(ident(9), (0,), "join")
    roomy = worker(1, 1, room=2 * VALUES)
    table = Table(blocks, [roomy, worker(2, 2), worker(9)])
    assert place(table, ident(9)) == Change(ident(9), (1,), "join")
    assert cover(table) == Change(ident(1), (0, 1), "cover")
    small = [Stage(0, 10, 0.1, 1), Stage(1, 100, 1.0, 1)]
    assert place(Table(small, [worker(9, room=50)]), ident(9)) == Change(ident(9), (0,), "join")


@pytest.mark.parametrize("seed", range(20))
def test_a_herd_of_equal_joiners_spreads_to_within_one_of_them(seed: int) -> None:
    rng = random.Random(seed)
    count, joiners = rng.randint(2, 8), rng.randint(1, 60)
    table = Table(stages(count, rng.randint(1, 3)), [worker(n) for n in range(1, joiners + 1)])
    for number in rng.sample(range(1, joiners + 1), joiners):
        change = place(table, ident(number))
        assert change is not None and not change.moves
        table = table.changed(change.member, change.stages)
    assert max(lives(table)) - min(lives(table)) <= 1


@pytest.mark.parametrize("seed", range(20))
def test_a_herd_of_unequal_joiners_spreads_to_within_the_fastest_of_them(seed: int) -> None:
    rng = random.Random(seed)
    joiners = [worker(n, speed=rng.uniform(0.25, 2.0)) for n in range(1, rng.randint(9, 40))]
    table = Table(stages(4, replicas_min=0), joiners)
    for joiner in joiners:
        change = place(table, joiner.id)
        assert change is not None
        table = table.changed(change.member, change.stages)
    rates = [table.rate(n) for n in table.stages]
    assert max(rates) - min(rates) <= max(w.speed for w in joiners)


# --- stages that lack workers ---------------------------------------------------------------------


def test_a_stage_that_nobody_serves_is_added_to_whoever_is_left_with_most() -> None:
    rich = [replace(w, room=2 * VALUES) for w in crowd(2, 1)]
    assert cover(Table(stages(3), rich)) == Change(ident(1), (1, 3), "cover")
    assert cover(Table(stages(2), rich)) is None


def test_without_room_a_stage_that_nobody_serves_takes_a_worker_of_the_richest() -> None:
    table = Table(stages(3), crowd(2, 3))
    assert cover(table) == Change(ident(3), (3,), "cover", moves=True)
    assert cover(Table(stages(3), crowd(1, 1))) is None, "no stage is emptied for another"
    fetching = [worker(1, 1), worker(2, 1, ready=()), worker(3, 2)]
    assert cover(Table(stages(3), fetching)) == Change(ident(2), (3,), "cover", moves=True)


def test_three_workers_with_room_for_two_hold_three_stages_twice() -> None:
    table = Table(stages(3), crowd(1, 1, 1, room=2 * VALUES))
    for _ in range(3):
        change = protect(table)
        assert change is not None and change.reason == "protect"
        table = table.changed(change.member, change.stages)
    assert lives(table) == [2, 2, 2] and protect(table) is None
    assert all(len(w.stages) == 2 for w in table.workers.values())


def test_nobody_without_room_is_asked_to_protect() -> None:
    assert protect(Table(stages(3), crowd(1, 1, 1))) is None
    assert protect(Table(stages(3), crowd(2, 2, 2, room=9 * VALUES))) is None


# --- moving ---------------------------------------------------------------------------------------


def test_five_one_one_one_becomes_two_two_two_two_in_three_moves() -> None:
    table, moves = settle(Table(stages(4), crowd(5, 1, 1, 1)))
    assert lives(table) == [2, 2, 2, 2] and len(moves) == 3
    assert len({change.member for change in moves}) == 3
    assert [change.stages for change in moves] == [(2,), (3,), (4,)]


def test_an_endangered_stage_overrides_the_gain_but_nobody_empties_its_own() -> None:
    quick = [replace(w, speed=5.0) for w in crowd(3)]
    rest = [worker(8, 2, speed=50.0), worker(9, 3), worker(10, 3), worker(11, 3)]
    change = rebalance(Table(stages(3), [*quick, *rest]), PACE)
    assert change is not None and change.reason == "endangered" and change.stages == (2,)
    assert rebalance(Table(stages(3), crowd(2, 2, 1)), PACE) is None
    assert rebalance(Table(stages(3, replicas_min=3), crowd(3, 3, 1)), PACE) is None


def test_a_move_needs_a_tenth_more_throughput() -> None:
    plain = Table(stages(2), [*crowd(3), worker(8, 2), worker(9, 2, speed=1.0)])
    assert rebalance(plain, PACE) is None  # 2 stays 2
    heavy = [replace(w, speed=1.0) for w in crowd(12, 10)]
    assert rebalance(Table(stages(2), heavy), PACE) is not None  # 10 -> 11
    heavy = crowd(13, 11)
    assert rebalance(Table(stages(2), heavy), PACE) is None  # 11 -> 12 is a gain of 9 %


def test_two_stages_that_are_equally_slow_gain_by_two_moves() -> None:
    table, moves = settle(Table(stages(4), crowd(6, 6, 4, 4)))
    assert lives(table) == [5, 5, 5, 5] and len(moves) == 2


def test_a_move_that_costs_nothing_meanwhile_may_download_for_long() -> None:
    table = Table(stages(2), crowd(5, 2))  # 2 -> 3; while it downloads 2 stays 2
    assert rebalance(table, replace(PACE, seconds_per_value=1e6)) is not None


def test_of_equal_workers_one_that_is_still_fetching_is_moved() -> None:
    people = [worker(1, 1), worker(2, 1), worker(3, 1, ready=()), worker(9, 2, speed=0.5)]
    table = Table(stages(2, replicas_min=0), people)
    change = rebalance(table, PACE)
    assert change is not None and change.member == ident(3)


def test_the_price_is_weighed_against_the_horizon() -> None:
    """1.5 -> 2 gains 0.5 per second; while worker 1 downloads, 0.5 per second are lost."""
    coming = worker(3, 1, ready=(), since=PACE.now)
    people = [worker(1, 1), worker(2, 1), coming, worker(4, 2, speed=1.5)]
    table = Table(stages(2, replicas_min=1), people)
    assert table.capacity()[0] == 1.5
    assert table.served_now().changed(ident(1), ()).capacity()[0] == 1.0
    dear = PACE.horizon_s / VALUES  # the download lasts as long as the gain
    change = rebalance(table, replace(PACE, seconds_per_value=0.99 * dear))
    assert change == Change(ident(1), (2,), "move", moves=True)
    assert rebalance(table, replace(PACE, seconds_per_value=1.01 * dear)) is None


def test_whoever_has_just_come_stays_for_two_periods() -> None:
    table = Table(stages(2), crowd(5, 2, since=PACE.now - 19.9))
    assert rebalance(table, PACE) is None
    assert rebalance(table, replace(PACE, now=PACE.now + 0.1)) is not None


def test_replicas_that_are_still_fetching_hold_nobody_s_place() -> None:
    table = Table(stages(2), [worker(1, 1), worker(2, 1), worker(3, 1, ready=()), worker(4, 2)])
    assert rebalance(table, PACE) == Change(ident(3), (2,), "endangered", moves=True)


@pytest.mark.parametrize("seed", range(40))
def test_moves_end_near_the_brute_force_optimum_and_nobody_moves_twice(seed: int) -> None:
    rng = random.Random(seed)
    number, total = rng.choice(((2, 9), (3, 8), (4, 8)))
    speeds = [rng.choice((0.5, 1.0, 1.0, 1.0, 2.0)) for _ in range(total)]
    homes = [rng.randint(1, number) for _ in range(total)]
    people = [worker(k + 1, homes[k], speed=speeds[k]) for k in range(total)]
    before = Table(stages(number, replicas_min=0), people)
    after, moves = settle(before)
    assert after.capacity()[0] >= before.capacity()[0]
    best = brute_force(speeds, number)
    if all(before.live(n) for n in before.stages):
        assert after.capacity()[0] >= 0.75 * best, (speeds, homes, moves)
    _, more = settle(after, replace(PACE, now=1e6))
    assert not more, "what is settled stays"
    counts = Counter(change.member for change in moves)
    assert not counts or max(counts.values()) <= 2


# --- serving less, leaving ------------------------------------------------------------------------


def test_a_stage_served_in_addition_is_given_up_when_there_are_enough() -> None:
    both = worker(1, 1, 2, room=2 * VALUES)
    assert shed(Table(stages(2), [both, worker(2, 1), worker(3, 2)])) is None
    crowded = [both, worker(2, 1), worker(3, 1), worker(4, 2), worker(5, 2)]
    assert shed(Table(stages(2), crowded)) is None, "2.5 would become 2"
    many = [worker(1, 1, 2, speed=0.1), *crowd(3, 3)[1:], worker(8, 1)]
    change = shed(Table(stages(2), many))
    assert change is not None and change.member == ident(1) and len(change.stages) == 1


def test_nothing_is_given_up_for_replicas_that_are_still_fetching() -> None:
    fetching = [worker(n, 1 + n % 2, ready=()) for n in range(2, 8)]
    table = Table(stages(2), [worker(1, 1, 2, speed=0.1), *fetching])
    assert shed(table) is None


def test_surplus_ends_are_given_up_and_the_block_stage_is_kept() -> None:
    people = [worker(n, 0, 1, room=2 * VALUES) for n in (1, 2, 3)]
    table = Table(stages(1, replicas_min=1, ends=2), people)
    assert shed(table) == Change(ident(1), (1,), "shed")


def test_slow_ends_are_served_by_more_workers() -> None:
    heavy = [Stage(0, VALUES, 4.0, 1), *stages(2)]
    people = [worker(1, 0, 1, room=2 * VALUES)]
    people += [worker(n, 1 + n % 2, room=2 * VALUES) for n in range(2, 8)]
    table = Table(heavy, people)
    before = table.capacity()[0]
    change = rebalance(table, PACE)
    assert change is not None and change.reason == "ends" and not change.moves
    assert table.changed(change.member, change.stages).capacity()[0] > 1.5 * before


def test_a_leaving_worker_does_not_count_and_goes_when_others_are_in_step() -> None:
    leaver = worker(1, 1, leaving=True)
    alone = Table(stages(2), [leaver, worker(2, 2), worker(3, 2)])
    assert alone.live(1) == 0 and not may_go(alone, ident(1))
    change = cover(alone)
    assert change is not None and change.stages == (1,)
    coming = alone.changed(change.member, change.stages)
    assert not may_go(coming, ident(1)), "the other one is still fetching"
    there = Table(stages(2), [leaver, worker(2, 1), worker(3, 2)])
    assert may_go(there, ident(1))


def test_a_stage_that_holds_the_others_up_is_overloaded() -> None:
    assert overloaded(Table(stages(3), crowd(4, 1, 4))) == 2
    assert overloaded(Table(stages(3), crowd(4, 3, 4))) == 0, "4 / 3 is not enough"
    assert overloaded(Table(stages(3), crowd(4, 1, 1))) == 0, "without either the other holds up"
    assert overloaded(Table(stages(3), crowd(4, 0, 4))) == 0, "what nobody serves is lost"
    slow = [replace(w, speed=0.2) if 3 in w.stages else w for w in crowd(2, 2, 2)]
    assert overloaded(Table(stages(3), slow)) == 3
    fetching = [replace(w, ready=()) if 3 in w.stages and w.id != ident(5) else w for w in slow]
    assert overloaded(Table(stages(3), fetching)) == 3


def test_the_ends_cannot_be_left_out() -> None:
    blocks = [replace(w, speed=9.0) for w in crowd(2, 2)]
    assert overloaded(Table(stages(2, ends=1), [*blocks, worker(9, 0, speed=0.01)])) == 0
