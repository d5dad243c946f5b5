"""The catalogue of planted bugs is whole, and the cheapest of them are found.

A green simulator proves little by itself: how many planted bugs it finds is the honest measure.
``make sim-nightly`` hunts them all and prints the score, as does ``python -m tests.mutants``; here
are those that one schedule finds in a moment, one or more of each area.
"""

from __future__ import annotations

import pytest

from tests.mutants.__main__ import BAR, hunt, main
from tests.mutants.catalogue import AREAS, Mutant, catalogue
from tests.mutants.patching import Gone, changed, patch, planted
from tests.mutants.suites import SUITES

QUICK = {
    "sums run in member order": ("rounds", 0),
    "a commit needs more than half of the holders": ("rounds: holder lost", 0),
    "an aborted attempt is over: the next one has another number": ("rounds", 0),
    "coefficients are shares of the set, not of all that were listed": ("rounds", 0),
    "a deputy applies the clip factor too": ("rounds: owners die", 14),
    "a joiner counts only when it is in step": ("rounds", 0),
    "every member decodes the same result, the owner included": ("rounds", 0),
    "entries are durable before they count": ("log: power cut", 0),
    "only certificates commit": ("log", 1),
    "while the set is joint, both sets must agree": ("log: chaos of 3", 6),
    "half is not enough": ("log: chaos of 3", 1),
    "who is gone for long is let go": ("members: gone for good", 0),
    "writing takes a read of the same key": ("dht: blind", 1),
    "have-sets are empty when a step begins": ("pipelines: workers die", 5),
    "every micro-batch weighs the same": ("pipelines: workers die", 5),
    "a commit counts what it contains": ("data", 0),
}
"""By name: a suite, and the first of the ``TRIES`` seeds of which one finds it."""
TRIES = 3

ISSUE = (
    *("forgotten fsync of a vote", "double count on resend", "residual updated on abort"),
    *("stale leader commits", "joiner counted early", "deputy and owner both broadcast"),
)
"""Bugs that were asked for by these words; they stand beside the section that rules them out."""


def known() -> dict[str, Mutant]:
    return {item.name: item for item in catalogue()}


def test_the_catalogue_has_bugs_of_every_area_and_half_of_those_asked_for_from_specs() -> None:
    items = catalogue()
    assert len(known()) == len(items) >= 30
    assert sum(item.from_spec for item in items) >= 15
    for area in AREAS:
        assert sum(item.area == area for item in items) >= 6, area
    for words in ISSUE:
        assert any(words in item.source for item in items), words
    for item in items:
        assert all(finder.suite in SUITES and len(finder.seeds) for finder in item.finders), item


def test_what_a_bug_replaces_is_still_in_the_code() -> None:
    for item in catalogue():
        for part in item.patches:
            owner, name, _, made = changed(part)
            assert made is not None and hasattr(owner, name), part


def test_a_patch_is_planted_everywhere_and_taken_out_again() -> None:
    from swarmtrain_protocols.pipeline import requests, worker

    before = requests.trouble
    with planted(patch("pipeline.requests:trouble", "if ledger.ended and training:", "if True:")):
        assert requests.trouble is worker.trouble is not before
    assert requests.trouble is worker.trouble is before


def test_a_patch_whose_text_is_gone_fails() -> None:
    with pytest.raises(Gone, match="0 times"):
        changed(patch("pipeline.requests:trouble", "no such text", ""))


@pytest.mark.parametrize("name", QUICK)
def test_a_planted_bug_is_found_at_once(name: str) -> None:
    suite, first = QUICK[name]
    item = known()[name]
    assert any(finder.suite == suite for finder in item.finders)
    with planted(*item.patches):
        found = any(SUITES[suite](seed) for seed in range(first, first + TRIES))
    assert found, f"{suite} from {first} did not notice: {name}"


@pytest.mark.parametrize("suite", sorted({suite for suite, _ in QUICK.values()}))
def test_without_a_bug_the_same_schedules_are_quiet(suite: str) -> None:
    seed = min(seed for found, seed in QUICK.values() if found == suite)
    assert SUITES[suite](seed) == ""


def test_the_score_names_survivors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SUITES, "log: power cut", lambda seed: "")
    assert main(["--name", "entries are durable"]) == 1
    printed = capsys.readouterr().out
    assert "survivor: log: entries are durable before they count" in printed
    assert "killed=0/1" in printed


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nearly_all_planted_bugs_are_found() -> None:
    survivors = [item.name for item in catalogue() if hunt(item) is None]
    assert len(survivors) <= (1 - BAR) * len(catalogue()), survivors
