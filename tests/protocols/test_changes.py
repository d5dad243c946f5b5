"""Run keys that change in flight: the same for everybody, from a round on."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.changes import (
    ANYWHERE,
    IN_FLIGHT,
    InnerStep,
    check_change,
    fits,
    inner_step,
    keys_at,
    parse_change,
    value_text,
)
from swarmtrain_protocols.errors import ConfigError
from swarmtrain_protocols.ledger import load_snapshot
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.pipeline.book import pipeline_state
from swarmtrain_protocols.rounds.policy import policy_at, policy_of
from swarmtrain_protocols.schedule import outer_at
from tests.protocols.rounds_kit import TRAIN, A, B, Log, hash_of

KEYS = RunKeys(inner_steps=20, delay=5, overlap="off")


def commit(log: Log, rounds: int) -> None:
    for _ in range(rounds):
        opened = log.open([A, B])
        log.choose(opened)
        log.commit(opened, hash_of("result"))


def changed(at_round: int, key: str, value: str) -> e.ConfigChanged:
    return e.ConfigChanged(at_round, key, value, "wanted")


def test_a_change_holds_from_its_round_to_the_next_one() -> None:
    log = Log(A, B)
    assert log.add(changed(5, "inner_steps", "10"))
    assert log.add(changed(3, "inner_steps", "30"))
    assert log.add(changed(4, "outer_lr", "0.25"))
    seen = [keys_at(KEYS, log.ledger, number).inner_steps for number in range(7)]
    assert seen == [20, 20, 20, 30, 30, 10, 10]
    assert [outer_at(KEYS, log.ledger, n).lr for n in (3, 4, 9)] == [0.7, 0.25, 0.25]
    assert log.add(changed(5, "inner_steps", "12")), "for the same round: the later word counts"
    assert keys_at(KEYS, log.ledger, 5).inner_steps == 12
    replayed = load_snapshot(log.ledger.snapshot())
    assert keys_at(KEYS, replayed, 9) == keys_at(KEYS, log.ledger, 9)
    assert inner_step(keys_at(KEYS, log.ledger, 4)) == InnerStep(30, 3e-3, 0.1, 1.0, 50, 0, 2.0)


@pytest.mark.parametrize(
    "body",
    [
        changed(2, "inner_steps", "10"),
        changed(9, "inner_steps", "0"),
        changed(9, "inner_steps", "010"),
        changed(9, "inner_steps", "10.0"),
        changed(9, "inner_lr", "1e-3"),
        changed(9, "inner_lr", "nan"),
        changed(9, "outer_lr", "None"),
        changed(9, "seed", "7"),
        changed(9, "no_such_key", "7"),
    ],
    ids=lambda body: f"{body.key}={body.value}",
)
def test_what_does_not_fit_is_ignored_by_everybody(body: e.ConfigChanged) -> None:
    """Bad input: a round that may be open, a value out of range, another text, a fixed key."""
    log = Log(A, B)
    commit(log, 2)
    before = log.ledger.changes
    assert not log.add(body)
    assert log.ledger.changes == before == []
    assert not Log(A, model=False).add(changed(9, "inner_steps", "10")), "no model, no rounds"


def test_each_changeable_key_reads_back_what_was_written() -> None:
    for key in IN_FLIGHT:
        for value in {getattr(RunKeys(), key), getattr(KEYS, key)}:
            text = value_text(key, value)
            assert parse_change(key, text) == value and fits(Log(A).ledger, key, text)
    assert value_text("outer_momentum", None) == value_text("grace_s", 0.0) == "auto"


def test_changes_that_exclude_each_other_are_left_out_for_everybody_alike() -> None:
    log = Log(A, B)
    assert log.add(changed(3, "outer_lr", "0.5"))
    assert log.add(changed(4, "inner_steps", "5")), "each value is allowed by itself"
    found = keys_at(KEYS, log.ledger, 4)
    assert (found.inner_steps, found.outer_lr) == (20, 0.5), "delay must be below inner_steps"


@pytest.mark.parametrize(
    ("key", "text", "at_round", "why"),
    [
        ("inner_stebs", "5", 9, "did you mean inner_steps"),
        ("codec_scatter", "fp32", 9, "it is fixed for the whole run"),
        ("inner_steps", "many", 9, "allowed: 1 to 1"),
        ("inner_steps", "5", 9, "below inner_steps"),
        ("inner_steps", "50", 2, "round 2 is under way"),
    ],
)
def test_the_operator_is_told_what_is_wrong(key: str, text: str, at_round: int, why: str) -> None:
    log = Log(A, B)
    commit(log, 2)
    with pytest.raises(ConfigError) as caught:
        check_change(KEYS, log.ledger, at_round, key, text)
    assert why in f"{caught.value.why} {caught.value.todo}"


def test_what_the_operator_writes_becomes_the_one_text() -> None:
    log = Log(A, B)
    assert check_change(KEYS, log.ledger, 3, "inner_lr", "1e-3") == "0.001"
    assert check_change(KEYS, log.ledger, 3, "outer_lr", "auto") == "auto"
    with pytest.raises(ConfigError, match="no model"):
        check_change(KEYS, Log(A, model=False).ledger, 3, "inner_lr", "1e-3")


def test_in_a_pipeline_few_keys_can_change() -> None:
    log = Log(A, B)
    log.ledger.pipeline = pipeline_state(2, "sync")
    assert not log.add(changed(9, "inner_lr", "0.1")) and log.add(changed(9, "max_rounds", "100"))
    with pytest.raises(ConfigError, match="in a pipeline"):
        check_change(RunKeys(stages=2), log.ledger, 9, "inner_lr", "0.1")
    assert set(ANYWHERE) < set(IN_FLIGHT)


def test_the_leader_goes_by_what_was_changed() -> None:
    log = Log(A, B)
    policy = policy_of(KEYS)
    assert policy_at(policy, log.ledger) is policy
    assert log.add(changed(1, "grace_s", "7.5")) and log.add(changed(2, "min_peers", "2"))
    assert policy_at(policy, log.ledger) == policy
    commit(log, 1)
    assert policy_at(policy, log.ledger).grace_s == 7.5
    commit(log, 1)
    assert policy_at(policy, log.ledger).min_peers == 2
    assert policy_at(policy, log.ledger) == replace(policy, grace_s=7.5, min_peers=2)


def test_going_back_drops_what_was_for_later_rounds_and_memory_is_bounded() -> None:
    log = Log(A, B)
    commit(log, 2)
    assert log.add(changed(3, "inner_steps", "30"))
    commit(log, 4)
    assert log.add(changed(8, "inner_steps", "40"))
    assert log.add(e.Rewound(1, "by order", (TRAIN,), (5,), (hash_of("state 5"),), True))
    assert log.ledger.changes == [(3, "inner_steps", "30")]
    for number in range(limits.CONFIG_CHANGES_KEPT + 9):
        assert log.add(changed(10 + number, "inner_lr", "0.5"))
    mine = [item for item in log.ledger.changes if item[1] == "inner_lr"]
    assert len(mine) == limits.CONFIG_CHANGES_KEPT and len(log.ledger.changes) == len(mine) + 1
    assert msgspec.msgpack.decode(log.ledger.snapshot())["changes"][0] == [3, "inner_steps", "30"]
