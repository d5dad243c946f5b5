"""The catalogue of planted bugs is whole, and the cheapest of them are found.

A green simulator proves little by itself: how many planted bugs it finds is the honest measure.
``make sim-nightly`` hunts them all and prints the score, as does ``python -m tests.mutants``; here
are those that one schedule finds in a moment, one or more of each area.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutants import pins
from tests.mutants.__main__ import BAR, hunt, main
from tests.mutants.catalogue import AREAS, Mutant, catalogue, find
from tests.mutants.patching import Gone, changed, patch, planted
from tests.mutants.suites import SUITES

QUICK = (
    "sums run in member order",
    "a commit needs more than half of the holders",
    "an aborted attempt is over: the next one has another number",
    "coefficients are shares of the set, not of all that were listed",
    "a deputy applies the clip factor too",
    "a joiner counts only when it is in step",
    "every member decodes the same result, the owner included",
    "entries are durable before they count",
    "only certificates commit",
    "while the set is joint, both sets must agree",
    "half is not enough",
    "who is gone for long is let go",
    "writing takes a read of the same key",
    "have-sets are empty when a step begins",
    "every micro-batch weighs the same",
    "a commit counts what it contains",
)
QUICK_SEEDS = 24
"""Of each suite, where the pin has moved."""

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
    item, pin = known()[name], pins.read().get(name)
    found = hunt(item, QUICK_SEEDS, pin)
    assert found is not None, f"no schedule noticed: {name}"
    assert not found[0].startswith("units"), "a simulation, not a unit test"
    if pin not in (None, found[:2]):
        warnings.warn(f"the pin of {name!r} has moved from {pin} to {found[:2]}", stacklevel=1)


def test_pins_are_schedules_of_bugs_that_are_known() -> None:
    items = known()
    assert set(pins.read()) <= set(items)
    for name, (suite, seed) in pins.read().items():
        assert suite in {finder.suite for finder in items[name].finders} and seed >= 0, name
    assert pins.FILE.read_text(encoding="utf-8") == pins.written(pins.read())


def _toy(monkeypatch: pytest.MonkeyPatch, *loud: int) -> Mutant:
    """A bug that changes nothing, and a suite that complains of it for some seeds."""
    nothing = patch("pipeline.requests:trouble", "if ledger.ended and training:", "if False:")
    planted_now = nothing.edits[0][1]

    def suite(seed: int) -> str:
        from swarmtrain_protocols.pipeline import requests

        planted_in = requests.trouble.__code__.co_filename.startswith("<planted")
        return planted_now if planted_in and seed in loud else ""

    monkeypatch.setitem(SUITES, "toy", suite)
    return Mutant("toy", "log", "nowhere", False, (nothing,), (find("toy", 0, 9),))


def test_a_pin_is_tried_first_and_what_it_does_not_find_is_searched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    item = _toy(monkeypatch, 4, 7)
    assert hunt(item) == ("toy", 4, "if False:")
    assert hunt(item, pin=("toy", 7)) == ("toy", 7, "if False:")
    assert hunt(item, pin=("toy", 8)) == ("toy", 4, "if False:"), "the pin has moved"
    assert hunt(item, most=3, pin=("toy", 8)) is None, "not found by the schedules it was given"


def test_a_schedule_that_complains_of_the_code_as_it_is_has_found_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    item = replace(_toy(monkeypatch), finders=(find("always", 0, 3),))
    monkeypatch.setitem(SUITES, "always", lambda seed: "wrong")
    assert hunt(item) is None


def test_a_pin_that_moved_is_said_and_written_down(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    item = _toy(monkeypatch, 4)
    monkeypatch.setattr("tests.mutants.__main__.catalogue", lambda: (item,))
    monkeypatch.setattr(pins, "FILE", tmp_path / "pins.json")
    pins.FILE.write_text(pins.written({"toy": ("toy", 8), "gone": ("toy", 1)}))
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert "pin moved: toy" in printed and "pins moved=1" in printed and "killed=1/1" in printed
    assert pins.read()["toy"] == ("toy", 8), "nobody asked for it"
    assert main(["--write-pins"]) == 0
    assert pins.read() == {"toy": ("toy", 4)}
    assert main([]) == 0 and "pins moved=0" in capsys.readouterr().out


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
