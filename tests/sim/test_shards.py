"""Swarms whose data are dealt in shards, under seeded trouble: each sample counts once.

The checks behind that promise are taken out one by one, and the schedules notice: those of
``shards_kit``, which has no network and thousands of orders of events, or those of whole swarms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from swarmtrain_protocols import ledger
from swarmtrain_protocols.shards import DataState, LeaseBook
from swarmtrain_protocols.testing.faults import Fault
from swarmtrain_protocols.testing.shard_swarm import run_data_swarm
from swarmtrain_protocols.testing.swarm import Outcome, spec_of
from tests.protocols import shards_kit
from tests.sim.test_mutants import Mutant, mutated

SCHEDULES = 5


@functools.cache
def outcome(seed: int) -> Outcome:
    return run_data_swarm(seed)


@pytest.mark.parametrize("seed", range(SCHEDULES))
def test_each_sample_counts_once_through_any_trouble(seed: int) -> None:
    found = outcome(seed)
    assert found.violation == "", found.text
    assert found.seen["data:counted"] >= 260 or found.seen["excused"]


def test_trouble_occurred_and_claims_stay_small() -> None:
    seen = outcome(0).seen.copy()
    for seed in range(1, SCHEDULES):
        seen += outcome(seed).seen
    for what in ("data:committed", "data:aborted", "data:excluded"):
        assert seen[what] >= 1, what
    assert max(outcome(seed).seen["data:bytes"] for seed in range(SCHEDULES)) <= 5 * 16


def test_a_site_that_is_gone_for_good_leaves_nothing_unfinished() -> None:
    seed = next(s for s in range(20) if len(spec_of(s)[1]) >= 4)
    found = run_data_swarm(seed, [Fault(14.0, "vanish", "c")])
    assert found.violation == "" and not found.seen["excused"], found.text
    assert found.seen["entry:MemberLeft"] >= 1


# --- planted bugs ---


def without_network(seed: int) -> str:
    try:
        shards_kit.play(seed, calm=seed % 2 == 1)
    except AssertionError as broken:
        return str(broken) or "an assertion"
    return ""


def whole_swarm(seed: int) -> str:
    return run_data_swarm(seed).violation


def case(
    check: str,
    owner: object,
    name: str,
    old: str,
    new: str,
    run: Callable[[int], str] = without_network,
    seeds: range = range(150),
) -> Mutant:
    return Mutant(check, owner, name, old, new, run, seeds)


MUTANTS = (
    case(
        "a claim begins where its shard was left",
        DataState,
        "refusal",
        "if held.get(shard) != first:",
        "if shard not in held:",
    ),
    case(
        "a shard that lost its holder is dealt again",
        DataState,
        "deal",
        "self.free.update(self.leases.pop(member))",
        "self.leases.pop(member)",
    ),
    case(
        "what an open attempt lists stays where it is",
        DataState,
        "deal",
        "if member not in self.claimed and (",
        "if (",
    ),
    case(
        "only what is in the set counts",
        DataState,
        "decided",
        "if member in chosen:",
        "if True:",
    ),
    case(
        "a rewind takes back what counted",
        DataState,
        "rewound",
        "self.next, self.counted, self.round = mark.next, mark.counted, round_number",
        "self.round = round_number",
    ),
    case(
        "a shard goes on where its holder left it",
        DataState,
        "_supply",
        "done = self.free.pop(shard)",
        "done = self.first(shard) + 0 * self.free.pop(shard)",
    ),
    case(
        "what was aborted goes into the next claim",
        LeaseBook,
        "decided",
        "self._queued = joined([*self._queued, *flying])",
        "pass",
    ),
    case(
        "what counted is not trained on again before the log's news of it",
        LeaseBook,
        "decided",
        "self._settled.append((round_number, flying))",
        "pass",
    ),
    case(
        "progress on what is somebody else's is given up",
        LeaseBook,
        "boundary",
        "if self._void or without(claims, self._held):",
        "if False:",
    ),
    case(
        "progress that is thrown away is trained on again",
        LeaseBook,
        "dropped",
        "self._fresh = ()",
        "pass",
    ),
    case(
        "a commit counts what it contains",
        ledger,
        "_committed",
        "if ledger.counts_data(channel.name):",
        "if False:",
        whole_swarm,
        range(4),
    ),
)


def plant(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = mutated(mutant)
    monkeypatch.setattr(mutant.owner, mutant.name, changed)
    if mutant.owner is ledger:
        for body, handler in list(ledger._HANDLERS.items()):
            if handler.__name__ == mutant.name:
                monkeypatch.setitem(ledger._HANDLERS, body, changed)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.check)
def test_a_check_that_is_missing_is_noticed(
    mutant: Mutant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(mutant, monkeypatch)
    found = next((seed for seed in mutant.seeds if mutant.run(seed)), None)
    assert found is not None, f"{len(mutant.seeds)} schedules did not notice: {mutant.check}"
