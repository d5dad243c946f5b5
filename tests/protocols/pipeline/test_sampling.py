"""Choosing tokens: greedy, frequencies against probabilities, cuts by rank and by probability."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from swarmtrain_protocols.codecs.boundary import get_boundary_codec
from swarmtrain_protocols.errors import ConfigError, LocalProtocolError, PeerFault
from swarmtrain_protocols.pipeline.sampling import Sampling, decode_logits, next_token

PROBABILITIES = np.array([0.1, 0.4, 0.2, 0.3])
LOGITS = np.log(PROBABILITIES).astype(np.float32) + np.float32(2)
DRAWS = 8000


def frequencies(sampling: Sampling) -> list[float]:
    counts = Counter(next_token(LOGITS, sampling, position) for position in range(DRAWS))
    return [counts[token] / DRAWS for token in range(4)]


def test_greedy_takes_the_largest_and_the_first_of_equals() -> None:
    assert next_token(LOGITS, Sampling(), 0) == 1
    assert next_token(np.array([1, 3, 3, 2], np.float32), Sampling(), 5) == 1
    assert next_token(LOGITS, Sampling(temperature=0.0, top_k=3, top_p=0.1, seed=9), 7) == 1


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),  # squares over their sum
        (Sampling(1.0, top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(1.0, top_k=9), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(1.0, top_p=0.65), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(1.0, top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9]),
        (Sampling(1.0, top_p=1e-9), [0, 1, 0, 0]),
        (Sampling(1.0, top_k=3, top_p=0.5), [0, 4 / 7, 0, 3 / 7]),  # 4/9, then 7/9 of the three
        (Sampling(1e-300), [0, 1, 0, 0]),
    ],
)
def test_frequencies_are_probabilities(sampling: Sampling, expected: list[float]) -> None:
    found = frequencies(sampling)
    # Four standard deviations of a frequency over DRAWS draws, and never what has been cut off.
    for have, want in zip(found, expected, strict=True):
        assert abs(have - want) <= 4 * (want * (1 - want) / DRAWS) ** 0.5


def test_draws_follow_from_seed_and_position_alone() -> None:
    first = [next_token(LOGITS, Sampling(1.0, seed=1), p) for p in range(64)]
    assert first == [next_token(LOGITS, Sampling(1.0, seed=1), p) for p in range(64)]
    assert first != [next_token(LOGITS, Sampling(1.0, seed=2), p) for p in range(64)]
    assert first != [next_token(LOGITS, Sampling(1.0, seed=1), p) for p in range(64, 128)]


def test_huge_logits_do_not_overflow() -> None:
    logits = np.array([3e38, -3e38, 0], np.float32)
    assert next_token(logits, Sampling(1e-3), 0) == 0


@pytest.mark.parametrize(
    "logits",
    [
        np.array([1, np.nan], np.float32),
        np.array([1, np.inf], np.float32),
        np.zeros((1, 3), np.float32),
        np.zeros(0, np.float32),
    ],
)
def test_logits_that_say_nothing_are_refused(logits: np.ndarray) -> None:  # type: ignore[type-arg]
    for sampling in (Sampling(), Sampling(1.0)):
        with pytest.raises(LocalProtocolError):
            next_token(logits, sampling, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -1},
    ],
)
def test_settings_out_of_range(changes: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Sampling(**changes)  # type: ignore[arg-type]


def test_logits_from_the_wire() -> None:
    rows = np.random.default_rng(1).standard_normal((2, 1, 7)).astype(np.float32)
    data = get_boundary_codec("fp32").encode(rows)
    np.testing.assert_array_equal(decode_logits(data, 2, 7), rows[:, 0])
    for batch_max, vocabulary in ((1, 7), (2, 8)):
        with pytest.raises(PeerFault):
            decode_logits(data, batch_max, vocabulary)
