"""Whole pipelines whose micro-batches take other paths: swapped ones, and past a slow stage."""

from __future__ import annotations

from dataclasses import replace

import pytest

from swarmtrain_protocols.testing.faults import Fault
from swarmtrain_protocols.testing.network import NetworkModel
from swarmtrain_protocols.testing.pipeline_site import PipelinePart
from swarmtrain_protocols.testing.pipeline_swarm import (
    Outcome,
    Pipeline,
    build,
    make_spec,
    run_built,
)
from swarmtrain_protocols.testing.toystage import Toy

TOY = Toy(9, 4, 8)
SHARE = 0.25
# Drivers die with what they keep, workers and the leader die: paths survive all of it.
TROUBLE = [
    Fault(8.0, "aim-crash", "b", "send:hop?", 2.0),
    Fault(11.0, "aim-crash", "d", "do:Compute", 3.0),
    Fault(15.0, "aim-crash", "e", "send:close", 2.0),
    Fault(18.0, "aim-crash", "a", "send:plan", 2.0),
]


def swarm(seed: int, **keys: object) -> Pipeline:
    """Five workers for four stages and the ends, one each; one is slow, one drives, and so does
    the steward."""
    keys = {"replicas_min": 1, "ends_replicas": 1, "start_peers": 5, **keys}
    spec = make_spec(seed, replace(TOY, seed=seed), **keys)
    parts = [PipelinePart("a", trains=False, holds_state=False, drives=True)]
    parts += [
        PipelinePart(name, drives=name == "b", slower=8.0 if name == "f" else 1.0)
        for name in "bcdef"
    ]
    return build(seed, replace(spec, hop_s=(0.01, 0.02), room=1), parts, model=NetworkModel())


def run(seed: int, **keys: object) -> Outcome:
    return run_built(swarm(seed, **keys), seed, TROUBLE)


def test_odd_micro_batches_take_the_swapped_path_through_all_trouble() -> None:
    outcome = run(1, swapped=True)
    assert not outcome.violation, outcome.text
    assert outcome.committed >= 3 and outcome.seen["step:skipped"] == 0


@pytest.mark.parametrize("swapped", [False, True])
def test_an_overloaded_stage_is_left_out_by_some_and_the_rest_is_exact(swapped: bool) -> None:
    outcomes = [run(seed, skip_fraction=SHARE, swapped=swapped) for seed in (1, 2, 3)]
    assert [outcome.text for outcome in outcomes if outcome.violation] == []
    assert all(outcome.committed >= 3 for outcome in outcomes)
    for outcome in outcomes:
        assert 0 < outcome.seen["step:skipped"] <= SHARE * outcome.micro_batches


def test_without_the_key_nothing_is_left_out_however_slow_a_stage_is() -> None:
    outcome = run(2)
    assert not outcome.violation, outcome.text
    assert outcome.seen["step:skipped"] == 0
