"""Paths of micro-batches: swapped ones for odd numbers, skipped stages within their share."""

from __future__ import annotations

from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.pipeline.paths import PathPlan, PathRule, path_rule_of

LOADED = {1: 0.1, 2: 0.1, 3: 0.9, 4: 0.1}
PLAIN, ODD = (0, 1, 2, 3, 4, 5), (0, 2, 1, 4, 3, 5)


def test_plain_paths_by_default_however_loaded_a_stage_is() -> None:
    plan = PathPlan(4)
    assert {plan.path(k, LOADED.__getitem__) for k in range(10)} == {PLAIN}
    assert {plan.rule.of_step(k, 3) for k in range(10)} == {PLAIN}
    assert plan.skipped == 0


def test_odd_micro_batches_swap_both_ends() -> None:
    rule = PathRule(4, swapped=True)
    assert [rule.of_step(k, 0) for k in (6, 7)] == [PLAIN, ODD]
    assert [PathPlan(4, rule=rule).path(k, LOADED.__getitem__) for k in (6, 7)] == [PLAIN, ODD]


def test_the_first_micro_batches_of_a_step_leave_out_what_the_log_says() -> None:
    rule = PathRule(4, swapped=True, skips=2)
    paths = [rule.of_step(k, 4) for k in range(4)]
    assert paths == [(0, 1, 2, 3, 5), (0, 2, 1, 3, 5), PLAIN, ODD]
    assert [rule.of_step(k, 0) for k in range(2)] == [PLAIN, ODD]


def test_the_rule_follows_from_the_run_s_keys() -> None:
    keys = RunKeys(stages=4, micro_batches=10, skip_fraction=0.25, swapped=True)
    assert path_rule_of(keys) == PathRule(4, swapped=True, skips=2)
    assert path_rule_of(RunKeys(stages=4)) == PathRule(4)
    free = RunKeys(stages=4, pipeline_mode="diloco", skip_fraction=0.25, overlap="off")
    assert path_rule_of(free) == PathRule(4, free=True)
    assert not path_rule_of(RunKeys(stages=4, pipeline_mode="diloco", overlap="off")).free


def test_legal_paths_of_a_step() -> None:
    rule = PathRule(4, swapped=True, skips=2)
    for k in range(4):
        for skip in (0, 3):
            right = rule.of_step(k, skip)
            assert rule.is_legal(k, right, skip)
            others = [PLAIN, ODD, (0, 1, 2, 4, 5), (0, 2, 1, 4, 5), (0, 1, 3, 4, 5), (0, 5)]
            assert [p for p in others if rule.is_legal(k, p, skip)] == [right]


def test_legal_paths_where_drivers_decide() -> None:
    rule = PathRule(4, swapped=True, free=True)
    assert all(rule.is_legal(0, path, 0) for path in (PLAIN, (0, 1, 2, 4, 5), (0, 1, 3, 4, 5)))
    assert rule.is_legal(1, ODD, 0) and rule.is_legal(1, (0, 2, 4, 3, 5), 0)
    for path in (ODD, (0, 2, 1, 4, 5), (0, 1, 2, 5), (1, 2, 3, 4, 5), (0, 1, 2, 3, 4)):
        assert not rule.is_legal(0, path, 0), path


def test_a_driver_that_decides_leaves_out_an_overloaded_stage_for_a_bounded_share() -> None:
    plan = PathPlan(4, rule=PathRule(4, free=True), skip_fraction=0.1)
    paths = [plan.path(k, LOADED.__getitem__) for k in range(100)]
    short = [path for path in paths if len(path) == 5]
    assert set(short) == {(0, 1, 2, 4, 5)}
    assert plan.skipped == len(short) == 10
    for first in range(1, 101):  # and at no moment more than that
        assert sum(len(path) == 5 for path in paths[:first]) <= 0.1 * first
    assert all(plan.rule.is_legal(k, path, 0) for k, path in enumerate(paths))


def test_nothing_is_skipped_where_no_stage_stands_out() -> None:
    plan = PathPlan(4, rule=PathRule(4, free=True), skip_fraction=0.5)
    even = {1: 0.5, 2: 0.4, 3: 0.6, 4: 0.5}
    unknown = dict.fromkeys((1, 2, 3, 4), 0.0)
    for load in (even, unknown):
        assert all(len(plan.path(k, load.__getitem__)) == 6 for k in range(20))
    alone = PathPlan(1, rule=PathRule(1, free=True), skip_fraction=0.5)
    assert all(alone.path(k, lambda hop: 9.0) == (0, 1, 2) for k in range(4))
