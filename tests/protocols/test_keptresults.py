"""``swarmtrain_protocols.keptresults``: what is still to be applied is not pushed out."""

from __future__ import annotations

from collections import Counter

import pytest

from swarmtrain_protocols.keptresults import (
    RESULTS_KEPT_MAX,
    RESULTS_KEPT_PER_CHANNEL,
    KeptResults,
)

FORM = (10, "int8")


def root(number: int) -> bytes:
    return bytes([number]) * 32


@pytest.fixture
def dropped() -> Counter[bytes]:
    return Counter()


@pytest.fixture
def results(dropped: Counter[bytes]) -> KeptResults:
    return KeptResults(lambda one: dropped.update([one]))


def test_the_newest_few_are_kept_where_nothing_is_applied(
    results: KeptResults, dropped: Counter[bytes]
) -> None:
    for number in (5, 3, 9, 1, 7):
        results.keep("group", number, [root(number), root(100 + number)], FORM, None)
    assert dropped == {root(5): 1, root(105): 1}
    with pytest.raises(KeyError):
        results.form(root(5))
    assert results.form(root(7)) == FORM


def test_a_newer_one_outlives_older_ones_that_are_applied_first(
    results: KeptResults, dropped: Counter[bytes]
) -> None:
    results.keep("train", 50, [root(50)], FORM, 1)
    for number in range(1, 50):
        results.keep("train", number, [root(number)], FORM, number)
        results.applied(root(number))
    assert results.form(root(50)) == FORM and not dropped[root(50)]
    assert len(dropped) == 50 - RESULTS_KEPT_PER_CHANNEL


def test_the_result_of_an_old_attempt_that_ends_late_is_kept(results: KeptResults) -> None:
    """C9: parts of a round came after the site had caught up with ten others."""
    for number in range(10, 20):
        results.keep("train", number, [root(number)], FORM, number)
    results.keep("train", 7, [root(7)], FORM, 20)
    assert results.form(root(7)) == FORM
    results.keep("train", 20, [root(20)], FORM, 20)
    assert results.form(root(7)) == FORM
    with pytest.raises(KeyError):
        results.form(root(17))


def test_attempts_that_come_to_nothing_are_bounded(
    results: KeptResults, dropped: Counter[bytes]
) -> None:
    for attempt in range(30):
        results.keep("train", 7, [root(attempt)], FORM, 7)
    assert sorted(dropped) == [root(n) for n in range(30 - RESULTS_KEPT_MAX)]


def test_an_adopted_one_stays_until_it_is_applied(
    results: KeptResults, dropped: Counter[bytes]
) -> None:
    results.adopt("train", root(3), FORM)
    for number in range(3, 20):
        results.keep("train", number, [root(number)], FORM, 30)
    assert dropped[root(3)] == 1, "one of its two registrations"
    assert results.form(root(3)) == FORM
    results.applied(root(3))
    assert dropped[root(3)] == 2
    with pytest.raises(KeyError):
        results.form(root(3))


def test_a_channel_is_forgotten_with_all_it_has(
    results: KeptResults, dropped: Counter[bytes]
) -> None:
    results.keep("train", 1, [root(1), root(101)], FORM, 1)
    results.adopt("train", root(2), FORM)
    results.keep("other", 1, [root(3)], FORM, None)
    results.forget("train")
    assert dropped == {root(1): 1, root(101): 1, root(2): 1}
    assert results.form(root(3)) == FORM
