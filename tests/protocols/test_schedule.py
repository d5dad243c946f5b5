"""Modes and outer steps of rounds, as the log says them; and settings that are stable."""

from __future__ import annotations

import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import ConfigError
from swarmtrain_protocols.ledger import load_snapshot
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.schedule import (
    OuterStep,
    auto_outer,
    is_measured,
    outer_at,
    overlap_at,
)
from tests.protocols.rounds_kit import A, B, Log, hash_of

AUTO = RunKeys()


def commit(log: Log, rounds: int = 1) -> None:
    for _ in range(rounds):
        opened = log.open([A, B])
        log.choose(opened)
        log.commit(opened, hash_of("result"))


def change(at_round: int, value: str, key: str = "overlap") -> e.ConfigChanged:
    return e.ConfigChanged(at_round, key, value, "measured")


def test_the_mode_of_a_round_is_the_last_change_for_it_or_an_earlier_one() -> None:
    log = Log(A, B)
    assert log.add(change(3, "eager"))
    assert log.add(change(5, "off"))
    assert [overlap_at(AUTO, log.ledger, r) for r in range(7)] == [
        *("off", "off", "off"),
        *("eager", "eager"),
        *("off", "off"),
    ]
    assert outer_at(AUTO, log.ledger, 2) == OuterStep("off", 0.7, 0.9)
    assert outer_at(AUTO, log.ledger, 4) == OuterStep("eager", 0.4, 0.9)


def test_what_was_is_not_changed_by_what_comes_later() -> None:
    """Whoever applies a round, now or in a replay, gets the same step from any later log."""
    log = Log(A, B)
    known: dict[int, OuterStep] = {}
    for number in range(40):
        if number % 5 == 1:
            log.add(change(number + 2, ("eager", "off")[number % 10 // 5]))
        commit(log)
        known[number] = outer_at(AUTO, log.ledger, number)
        replayed = load_snapshot(log.ledger.snapshot())
        assert all(outer_at(AUTO, replayed, r) == step for r, step in known.items())
    assert {step.overlap for step in known.values()} == {"off", "eager"}


@pytest.mark.parametrize(
    "body",
    [
        change(2, "eager"),
        change(1, "eager"),
        change(9, "off"),
        change(9, "delayed"),
        change(9, "eager", key="inner_steps"),
    ],
)
def test_a_change_that_does_not_fit_is_ignored(body: e.ConfigChanged) -> None:
    log = Log(A, B)
    commit(log, 2)  # the next round is 2, and may be opened already
    before = log.ledger.snapshot()
    assert not log.add(body)
    assert log.ledger.overlaps == load_snapshot(before).overlaps == []


def test_changes_stand_in_order_and_differ() -> None:
    log = Log(A, B)
    assert log.add(change(4, "eager"))
    assert not log.add(change(4, "off"))
    assert not log.add(change(6, "eager"))
    assert log.add(change(6, "off"))
    assert not Log(A, model=False).add(change(4, "eager"))


def test_a_rewind_forgets_changes_for_rounds_beyond_it() -> None:
    log = Log(A, B)
    commit(log, 2)
    assert log.add(change(3, "eager"))
    commit(log, 4)
    assert log.add(change(8, "off"))
    channel = next(iter(log.ledger.channels))
    assert log.add(e.Rewound(1, "data loss", (channel,), (5,), (hash_of("state 5"),)))
    assert log.ledger.overlaps == [(3, "eager")]
    assert overlap_at(AUTO, log.ledger, 9) == "eager"
    assert log.add(change(6, "off"))


def test_changes_are_bounded() -> None:
    log = Log(A, B)
    for number in range(limits.CONFIG_CHANGES_KEPT + 10):
        assert log.add(change(number + 1, ("eager", "off")[number % 2]))
    assert len(log.ledger.overlaps) == limits.CONFIG_CHANGES_KEPT


def test_run_keys_that_name_a_mode_or_a_step_are_obeyed() -> None:
    log = Log(A, B)
    assert log.add(change(1, "eager"))
    assert overlap_at(RunKeys(overlap="delayed"), log.ledger, 5) == "delayed"
    assert outer_at(RunKeys(outer_lr=0.3), log.ledger, 5) == OuterStep("eager", 0.3, 0.9)
    assert outer_at(RunKeys(outer_momentum=0.1), log.ledger, 0) == OuterStep("off", 0.7, 0.1)
    assert outer_at(RunKeys(max_rounds=20), log.ledger, 5) == OuterStep("eager", 1.0, 0.0)
    assert outer_at(RunKeys(start_peers=5), log.ledger, 5) == OuterStep("eager", 0.25, 0.9)


def test_streaming_needs_no_other_overlap() -> None:
    log = Log(A, B)
    assert log.add(change(1, "eager"))
    assert is_measured(AUTO) and not is_measured(RunKeys(delay=2))
    assert overlap_at(RunKeys(delay=2), log.ledger, 5) == "off"


def test_auto_keeps_the_decisions() -> None:
    assert auto_outer("eager", 4, 20) == auto_outer("off", 4, 49) == (1.0, 0.0)
    assert auto_outer("off", 8, 0) == auto_outer("off", 8, 50) == (0.7, 0.9)
    assert auto_outer("eager", 4, 500) == (0.4, 0.9)
    assert auto_outer("eager", 5, 500) == (0.25, 0.9)
    with pytest.raises(ConfigError):
        auto_outer("sometimes", 4, 0)
