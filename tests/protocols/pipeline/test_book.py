"""Entries of pipelines: all stages move together or none, and what does not fit is ignored."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.ledger import Ledger, load_snapshot
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.messages.pipeline import StepKey
from swarmtrain_protocols.pipeline.book import pipeline_state, stage_channel, step_key
from tests.protocols.pipeline.stage_kit import StageLog, state_hash
from tests.protocols.rounds_kit import GROUP, VALUES, A, B, C, defined, hash_of, joined, opening

NAMES = ("train/0/0", "train/1/0", "train/2/0")


def positions(log: StageLog) -> list[tuple[int, int, bool]]:
    """(round, attempt, open) of every stage's channel."""
    channels = [log.ledger.channels[name] for name in NAMES]
    return [(c.round, c.attempt, c.open is not None) for c in channels]


def test_a_run_without_stages_is_no_pipeline() -> None:
    ledger = Ledger()
    assert pipeline_state(0, "sync") == ledger.pipeline
    assert (ledger.pipeline.blocks, ledger.pipeline.stages) == (0, [])
    assert not ledger.stepwise("train/0/0")


def test_the_model_has_exactly_the_channels_of_the_stages() -> None:
    log = StageLog(A)
    assert tuple(log.ledger.channels) == NAMES
    other = StageLog.__new__(StageLog)
    other.ledger = Ledger(pipeline=pipeline_state(2, "sync"))
    assert not other.add(defined(VALUES))
    assert other.ledger.model is None


def test_assignments_follow_members() -> None:
    log = StageLog(A, B)
    log.assign(A, 0, 1)
    log.assign(B, 1)
    state = log.ledger.pipeline
    assert (state.serving(1), state.serving(0), state.serving(2)) == (sorted([A, B]), [A], [])
    for wrong in ((3,), (1, 0), (1, 1)):
        assert not log.add(e.StageAssigned(A, wrong, ""))
    assert not log.add(e.StageAssigned(C, (1,), "no member"))
    log.assign(A)
    assert state.assigned == {B: (1,)}
    log.ok(e.MemberLeft(B, "lost"))
    assert state.assigned == {}
    log.ok(joined(B))
    log.assign(B, 2)
    log.ok(e.MemberBanned(B, "lied"))
    assert state.assigned == {}


def test_closing_opens_and_chooses_every_stage_with_equal_weights() -> None:
    log = StageLog(A, B)
    assert step_key(log.ledger) == StepKey(0, 0, 0)
    log.ok(log.closing(A, B, micro_batches=3))
    for stage, name in enumerate(NAMES):
        channel = log.ledger.channels[name]
        assert channel.open is not None and channel.chosen is not None
        assert channel.open.key == RoundKey(0, name, 0, 0) == channel.chosen.key
        assert channel.open.values == VALUES
        assert channel.open.state_hash == state_hash(stage, 0)
        third = float(np.float32(1 / 3))
        assert [(c.index, c.value) for c in channel.chosen.coefficients] == [(0, third), (1, third)]


def test_ordinary_entries_do_not_touch_the_rounds_of_stages() -> None:
    log = StageLog(A, B)
    assert log.ledger.next_key(NAMES[0]) is None
    twin = StageLog(A, B, mode="diloco")
    body = opening(twin.ledger, [A], channel=NAMES[0])
    assert not log.add(body)
    log.ok(log.closing(A, B))
    opened = log.ledger.channels[NAMES[0]].open
    assert opened is not None
    assert not log.add(e.RoundSet(opened.key, (e.Coefficient(0, 1.0),)))
    assert not log.add(e.RoundCommitted(opened.key, hash_of("result")))
    assert not log.add(e.RoundAborted(opened.key, "x"))
    assert positions(log) == [(0, 0, True)] * 3
    assert log.ledger.next_key(GROUP) == RoundKey(0, GROUP, 0, 0)


def test_diloco_stages_have_ordinary_rounds_and_no_steps() -> None:
    log = StageLog(A, B, mode="diloco")
    assert not log.add(log.closing(A, B))
    assert not log.ledger.stepwise(NAMES[1])
    assert log.ledger.next_key(NAMES[1]) == RoundKey(0, NAMES[1], 0, 0)
    log.ok(opening(log.ledger, [A], channel=NAMES[1]))


def test_an_outcome_names_the_stage_that_the_next_step_leaves_out() -> None:
    log = StageLog(A, B)
    log.ok(log.closing(A, B))
    assert not log.add(log.outcome(skip=3)), "there are two"
    log.ok(log.outcome(skip=2))
    state = log.ledger.pipeline
    assert state.skip == 2
    log.ok(log.closing(A, B))
    log.ok(log.abort())
    assert state.skip == 2, "it is the same step"
    log.ok(log.closing(A, B))
    log.ok(log.outcome())
    assert state.skip == 0


def test_an_outcome_commits_all_stages() -> None:
    log = StageLog(A, B)
    log.ok(log.closing(A, B, micro_batches=8))
    log.ok(log.outcome(norm=9.0, scale=0.5))
    assert positions(log) == [(1, 0, False)] * 3
    state = log.ledger.pipeline
    assert (state.step, state.attempt, state.closed) == (1, 0, None)
    assert (state.loss, state.micro_batches) == (2.5, 8)
    for stage, name in enumerate(NAMES):
        done = log.ledger.channels[name].outcome(0)
        assert done is not None
        assert (done.root, done.scale) == (hash_of(f"result {stage}/0"), 0.5)
        assert done.contributors == tuple((m, 2.0, 0.125) for m in sorted([A, B]))
    assert log.ledger.rounds_committed == 1, "one step, however many stages"
    assert not log.add(log.outcome())


def test_an_abort_costs_an_attempt_of_all_stages_and_nothing_else() -> None:
    log = StageLog(A, B)
    log.ok(log.closing(A, B))
    late = log.outcome()
    log.ok(log.abort("a contributor is lost"))
    assert positions(log) == [(0, 1, False)] * 3
    state = log.ledger.pipeline
    assert (state.step, state.attempt, state.aborted, state.era) == (0, 1, 1, 0)
    assert state.last_abort == "a contributor is lost"
    assert log.ledger.rounds_aborted == 1
    assert not log.add(late) and not log.add(log.abort())
    log.step(A)
    assert positions(log) == [(1, 0, False)] * 3


WRONG_CLOSINGS: list[dict[str, Any]] = [
    {"generation": 1},
    {"step": 1},
    {"attempt": 1},
    {"micro_batches": 0},
    {"micro_batches": 1 << 20},
    {"loss": math.nan},
    {"stages": ()},
]


@pytest.mark.parametrize("changes", WRONG_CLOSINGS)
def test_a_closing_that_does_not_fit(changes: dict[str, Any]) -> None:
    log = StageLog(A, B)
    assert not log.add(log.closing(A, B, **changes))
    assert positions(log) == [(0, 0, False)] * 3 and log.ledger.pipeline.closed is None


WRONG_SUMS: list[dict[str, Any]] = [
    {"stage": 1},
    {"contributors": ()},
    {"parts": ()},
    {"holders": ()},
    {"contributors": (e.Contributor(max(A, B), hash_of("x"), 1.0, 0),) * 2},
    {"contributors": (e.Contributor(A, hash_of("x"), 0.0, 0),)},
    {"contributors": (e.Contributor(A, hash_of("x"), math.nan, 0),)},
]


@pytest.mark.parametrize("changes", WRONG_SUMS)
@pytest.mark.parametrize("place", [0, 2])
def test_one_bad_stage_refuses_the_whole_step(place: int, changes: dict[str, Any]) -> None:
    log = StageLog(A, B)
    good = log.closing(A, B)
    sums = list(good.stages)
    sums[place] = msgspec.structs.replace(sums[place], **changes)
    assert not log.add(msgspec.structs.replace(good, stages=tuple(sums)))
    assert positions(log) == [(0, 0, False)] * 3
    assert not log.add(msgspec.structs.replace(good, stages=good.stages[:2]))
    log.ok(good)
    assert not log.add(good), "closed once"


def test_paused_and_ended_runs_close_nothing_and_decide_what_is_closed() -> None:
    log = StageLog(A)
    log.ok(e.Paused("test"))
    assert not log.add(log.closing(A))
    log.ok(e.Resumed("test"))
    log.ok(log.closing(A))
    log.ok(e.RunEnded("enough"))
    log.ok(log.outcome())
    assert not log.add(log.closing(A))


WRONG_OUTCOMES: list[dict[str, Any]] = [
    {"generation": 1},
    {"step": 1},
    {"attempt": 1},
    {"scale": 0.0},
    {"scale": 1.5},
    {"scale": math.nan},
    {"scale": 0.1},
    {"norm": math.inf},
    {"norm": -1.0},
]


@pytest.mark.parametrize("changes", WRONG_OUTCOMES)
def test_an_outcome_that_does_not_fit(changes: dict[str, Any]) -> None:
    """0.1 is no fp32 value: machines would round it when they multiply by it."""
    log = StageLog(A)
    assert not log.add(log.outcome())
    log.ok(log.closing(A))
    assert not log.add(log.outcome(**changes))
    assert not log.add(msgspec.structs.replace(log.outcome(), stages=log.outcome().stages[1:]))
    assert positions(log) == [(0, 0, True)] * 3
    log.ok(log.outcome(scale=float(np.float32(0.1))))


def test_the_running_norm_follows_with_a_time_constant_of_twenty_steps() -> None:
    log = StageLog(A)
    log.step(A, norm=4.0)
    assert [s.square_norm for s in log.ledger.pipeline.stages] == [4.0] * 3
    log.step(A, norm=24.0)
    assert [s.square_norm for s in log.ledger.pipeline.stages] == [5.0] * 3


def test_a_lost_stage_drops_the_step_everywhere_and_stops_until_it_is_back() -> None:
    log = StageLog(A, B)
    log.step(A)
    log.ok(log.closing(A))
    log.ok(e.StageLost(1, 1, B, "silent"))
    state = log.ledger.pipeline
    assert (state.era, state.lost(), state.closed, state.attempt) == (1, [1], None, 1)
    assert positions(log) == [(1, 1, False)] * 3
    assert not log.add(log.outcome()) and not log.add(log.closing(A))
    assert not log.add(e.StageLost(1, 1, B, "again"))
    log.ok(e.StageLost(1, 1, A, "the host died"))
    assert (state.era, state.stages[1].host) == (1, A), "nothing more is dropped"
    log.ok(e.StageLost(2, 1, B, "its neighbour, too"))
    assert (state.era, state.lost(), state.attempt) == (2, [1, 2], 2)
    names, inputs = ("average", "copy"), (hash_of("left"), hash_of("right"))
    root = hash_of("rebuilt")
    good = e.StageRecovered(1, 1, A, names, (3.0, 2.5), 1, inputs, root)
    for wrong in (
        {"stage": 0},
        {"stage": 7},
        {"step": 0},
        {"host": B},
        {"choice": 2},
        {"losses": (3.0,)},
    ):
        assert not log.add(msgspec.structs.replace(good, **wrong))
    log.ok(good)
    assert not log.add(good)
    assert not log.add(log.closing(A)), "stage 2 is still lost"
    log.ok(msgspec.structs.replace(good, stage=2, host=B))
    stage = state.stages[1]
    assert (stage.generation, stage.host, stage.recovered_step) == (1, b"", 1)
    channel = log.ledger.channels[NAMES[1]]
    assert channel.pinned_hash(1) == root and channel.history == []
    assert log.ledger.channels[NAMES[0]].outcome(0) is not None
    assert positions(log) == [(1, 2, False)] * 3
    log.step(A)
    assert positions(log) == [(2, 0, False)] * 3


def test_wrong_losses_are_ignored() -> None:
    log = StageLog(A)
    for wrong in (
        e.StageLost(3, 0, A, ""),
        e.StageLost(1, 1, A, ""),
        e.StageLost(1, 0, C, "no member"),
    ):
        assert not log.add(wrong)
    log.ok(e.RunEnded("enough"))
    assert not log.add(e.StageLost(1, 0, A, "too late"))
    assert log.ledger.pipeline.era == 0


def test_a_lost_stage_of_a_diloco_run_drops_its_own_round_alone() -> None:
    log = StageLog(A, B, mode="diloco")
    for name in NAMES[:2]:
        log.ok(opening(log.ledger, [A], channel=name))
    log.ok(e.StageLost(1, 0, B, "silent"))
    assert positions(log) == [(0, 0, True), (0, 1, False), (0, 0, False)]
    log.ok(e.StageRecovered(1, 0, B, ("fresh",), (5.0,), 0, (), hash_of("rebuilt")))
    assert log.ledger.channels[NAMES[1]].pinned_hash(0) == hash_of("rebuilt")
    assert log.ledger.next_key(NAMES[1]) == RoundKey(0, NAMES[1], 0, 1)


def test_a_rewind_takes_all_stages_to_one_step() -> None:
    log = StageLog(A)
    for _ in range(3):
        log.step(A)
    log.ok(e.StageLost(1, 3, A, "silent"))
    roots = tuple(hash_of(f"back {name}") for name in NAMES)
    assert not log.add(e.Rewound(1, "one is missing", NAMES[:2], (1, 1), roots[:2]))
    assert not log.add(e.Rewound(1, "two steps", NAMES, (1, 1, 2), roots))
    log.ok(e.Rewound(1, "data loss", (*NAMES, GROUP), (1, 1, 1, 0), (*roots, hash_of("none"))))
    state = log.ledger.pipeline
    assert step_key(log.ledger) == StepKey(1, 1, 0)
    assert (state.closed, state.lost()) == (None, [])
    assert positions(log) == [(1, 0, False)] * 3
    log.step(A)
    assert state.step == 2


def test_a_snapshot_carries_the_pipeline() -> None:
    log = StageLog(A, B)
    log.assign(A, 0, 1, 2)
    log.step(A)
    log.ok(log.closing(A, B))
    copy = load_snapshot(log.ledger.snapshot())
    assert copy == log.ledger
    body = log.outcome()
    assert copy.apply(copy.index + 1, body) and log.add(body)
    assert copy.snapshot() == log.ledger.snapshot()


def test_names_of_channels() -> None:
    assert tuple(stage_channel(stage) for stage in range(3)) == NAMES
