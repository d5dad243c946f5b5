"""Schedules that once found a defect, replayed for ever. Never delete one."""

from __future__ import annotations

import pytest

from swarmtrain_protocols.testing.faults import Fault
from swarmtrain_protocols.testing.nightly import explain
from swarmtrain_protocols.testing.pipeline_swarm import run_pipeline
from swarmtrain_protocols.testing.swarm import run_swarm

FOUND = {
    5043: "a restarted owner fetched the part that it had computed before from itself",
    5048: "the same, beside two contributors",
    5126: "the same, after a pause aimed at the reduction",
    525: "a contribution announced again by a member behind the log was counted twice",
    174: "an answer that was held up while its asker restarted was called an answer to nothing",
    4100: "announcements that all got lost were never repeated, and a channel stood still",
    20026: "a deputy of a former leader was accused of speaking for a part that is not its own",
    20083: "the same, where 20026 is a leader that accused itself after its re-election",
}


FOUND_PIPELINES = {
    304: "a worker that missed the word to go on took no backwards for five minutes",
}


@pytest.mark.parametrize("seed", sorted(FOUND))
def test_a_schedule_that_found_a_defect_stays_quiet(seed: int) -> None:
    outcome = run_swarm(seed)
    assert outcome.violation == "", f"{FOUND[seed]} again?\n{explain(outcome)}"


def test_who_holds_a_ticket_of_which_every_address_is_gone_is_not_waited_for() -> None:
    """Seed 260 of a night: cut off at its start, and then the only site that it knew vanished."""
    faults = [Fault(5.44, "isolate", "b", "", 1.274), Fault(7.966, "vanish", "a", "", 0.082)]
    outcome = run_swarm(260, faults)
    assert outcome.violation == "", explain(outcome)
    assert outcome.seen["stranded"] == 1


@pytest.mark.parametrize("seed", sorted(FOUND_PIPELINES))
def test_a_schedule_of_a_pipeline_that_found_a_defect_stays_quiet(seed: int) -> None:
    outcome = run_pipeline(seed)
    assert outcome.violation == "", explain(outcome, run=run_pipeline)
