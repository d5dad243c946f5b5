"""Paths of micro-batches: swapped ones for odd numbers, skipped stages within their share."""

from __future__ import annotations

from swarmtrain_protocols.pipeline.paths import PathPlan

LOADED = {1: 0.1, 2: 0.1, 3: 0.9, 4: 0.1}


def test_plain_paths_by_default_however_loaded_a_stage_is() -> None:
    plan = PathPlan(4)
    paths = {plan.path(k, LOADED.__getitem__) for k in range(10)}
    assert paths == {(0, 1, 2, 3, 4, 5)}
    assert plan.skipped == 0


def test_odd_micro_batches_swap_both_ends() -> None:
    plan = PathPlan(4, swapped=True)
    assert plan.path(6, LOADED.__getitem__) == (0, 1, 2, 3, 4, 5)
    assert plan.path(7, LOADED.__getitem__) == (0, 2, 1, 4, 3, 5)


def test_an_overloaded_stage_is_left_out_by_a_bounded_share() -> None:
    plan = PathPlan(4, skip_fraction=0.1)
    paths = [plan.path(k, LOADED.__getitem__) for k in range(100)]
    short = [path for path in paths if len(path) == 5]
    assert set(short) == {(0, 1, 2, 4, 5)}
    assert plan.skipped == len(short) == 10
    for first in range(1, 101):  # and at no moment more than that
        assert sum(len(path) == 5 for path in paths[:first]) <= 0.1 * first


def test_nothing_is_skipped_where_no_stage_stands_out() -> None:
    plan = PathPlan(4, skip_fraction=0.5)
    even = {1: 0.5, 2: 0.4, 3: 0.6, 4: 0.5}
    unknown = dict.fromkeys((1, 2, 3, 4), 0.0)
    for load in (even, unknown):
        assert all(len(plan.path(k, load.__getitem__)) == 6 for k in range(20))
    alone = PathPlan(1, skip_fraction=0.5)
    assert all(alone.path(k, lambda hop: 9.0) == (0, 1, 2) for k in range(4))
