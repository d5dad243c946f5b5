"""Arithmetic of recovered stages, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from blake3 import blake3

from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.pipeline.candidates import (
    average,
    fresh,
    from_neighbours,
    is_output_projection,
    near_identity,
    share_of_left,
    values_of,
)

LAYOUT = (
    ("blocks.0.norm.gain", (2,)),
    ("blocks.0.up.weight", (2, 2)),
    ("blocks.0.down.weight", (1, 2)),
    ("blocks.0.down.bias", (1,)),
)


def f32(*values: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.array(values, np.float32)


LEFT = f32(1, 2, 3, 4, 5, 6, 7, 8, 9)
RIGHT = f32(5, 6, 7, 8, 9, 10, 11, 12, 13)


@pytest.mark.parametrize(
    ("left", "right", "plain", "squared"),
    [
        (1.0, 1.0, 1 / 2, 1 / 2),
        (2.0, 1.0, 2 / 3, 4 / 5),
        (1.0, 2.0, 1 / 3, 1 / 5),
        (7.0, 1.0, 3 / 4, 49 / 50),  # plain is capped at 3:1, the paper's square is not
        (0.1, 0.7, 1 / 4, 1 / 50),
        (0.0, 1.0, 1 / 2, 1 / 2),
        (math.nan, 1.0, 1 / 2, 1 / 2),
        (1.0, math.inf, 1 / 2, 1 / 2),
        (1e300, 1e-300, 3 / 4, 1.0),
        (1e-300, 1e300, 1 / 4, 0.0),
    ],
)
def test_shares_by_gradient_norms(left: float, right: float, plain: float, squared: float) -> None:
    assert share_of_left(left, right, "plain") == pytest.approx(plain)
    assert share_of_left(left, right, "squared") == pytest.approx(squared)
    assert share_of_left(left, right, "uniform") == 0.5


def test_averages_worked_out_by_hand() -> None:
    assert average(LEFT, RIGHT, 0.5).tolist() == [3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert average(LEFT, RIGHT, 0.75).tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert average(LEFT, RIGHT, 1.0).tolist() == LEFT.tolist()
    assert average(LEFT, RIGHT, 0.0).tolist() == RIGHT.tolist()
    with pytest.raises(LocalProtocolError):
        average(LEFT, RIGHT[:-1], 0.5)


def test_near_identity_scales_what_writes_to_the_stream() -> None:
    assert near_identity(LEFT, LAYOUT, 0.0).tolist() == [1, 2, 3, 4, 5, 6, 0, 0, 0]
    tenth = near_identity(LEFT, LAYOUT, 0.1)
    assert tenth.tolist() == [1, 2, 3, 4, 5, 6, *(f32(7, 8, 9) * np.float32(0.1)).tolist()]
    assert LEFT.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    with pytest.raises(LocalProtocolError):
        near_identity(LEFT[:-1], LAYOUT, 0.0)
    with pytest.raises(LocalProtocolError, match="near-identity"):
        near_identity(f32(1, 2), [("blocks.0.up.weight", (1, 2))], 0.0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.0.attention.out.weight", True),
        ("blocks.11.mlp.down.weight", True),
        ("blocks.1.self_attn.o_proj.weight", True),
        ("blocks.1.mlp.down_proj.weight", True),
        ("blocks.1.attn.c_proj.bias", True),
        ("blocks.0.attention.q.weight", False),
        ("blocks.0.mlp.up.weight", False),
        ("blocks.0.layout.weight", False),
        ("head.logits.weight", False),
        ("embed.tokens.weight", False),
    ],
)
def test_output_projections_are_known_by_name(name: str, expected: bool) -> None:
    assert is_output_projection(name) is expected


def test_fresh_values_are_a_pure_function_with_the_right_spread() -> None:
    layout = (("blocks.0.up.weight", (300, 1000)), *LAYOUT[:1], ("blocks.0.out.weight", (500, 600)))
    found = fresh(layout, 5, 2, depth=8)
    assert found.size == values_of(layout) == 600_002
    up, gain, out = found[:300_000], found[300_000:300_002], found[300_002:]
    assert up.mean() == pytest.approx(0, abs=2e-4) and up.std() == pytest.approx(0.02, rel=0.01)
    assert out.std() == pytest.approx(0.02 / 4, rel=0.01)
    # Beyond two standard deviations lie 4.55 % of a Gaussian; a sum of eight has thinner tails.
    assert np.mean(np.abs(up) > 0.04) == pytest.approx(0.0455, rel=0.05)
    assert 0.001 < np.mean(np.abs(up) > 0.06) < 0.0027
    assert gain.tolist() == [1, 1]
    assert abs(float(np.corrcoef(up, out)[0, 1])) < 0.01
    np.testing.assert_array_equal(found, fresh(layout, 5, 2, depth=8))
    for other in (fresh(layout, 6, 2, depth=8), fresh(layout, 5, 3, depth=8)):
        assert np.abs(other - found).max() > 0.01


def test_fresh_values_are_pinned() -> None:
    """Replicas draw θ⁰ on their own machines: these bytes may never change."""
    found = fresh(LAYOUT, 1, 1, depth=2)
    assert found[[0, 1, 8]].tolist() == [1, 1, 0]
    assert blake3(found.tobytes()).hexdigest()[:16] == "98c2e5f19b59c1d7"


def test_fresh_values_by_hand() -> None:
    """Eight 16-bit words of Philox make one value: their sum, centred and scaled."""
    found = fresh([("blocks.0.up.weight", (1, 3))], 1, 1, depth=2)
    words = np.random.Philox(key=np.array([1, 1], np.uint64)).random_raw(6)
    for value in range(3):
        pieces = [
            int(w) >> s & 0xFFFF for w in words[2 * value : 2 * value + 2] for s in (0, 16, 32, 48)
        ]
        centred = sum(pieces) - 8 * 65535 / 2
        std = math.sqrt(8 * (65536**2 - 1) / 12)
        assert found[value] == pytest.approx(0.02 * centred / std, rel=1e-6)


def test_fresh_values_of_nothing_are_refused() -> None:
    with pytest.raises(LocalProtocolError):
        fresh([], 1, 1, depth=2)
    with pytest.raises(LocalProtocolError):
        fresh(LAYOUT, 1, 1, depth=0)


def test_candidates_of_an_inner_stage() -> None:
    found = from_neighbours(LEFT, RIGHT, (3.0, 1.0), LAYOUT, seed=1, stage=2, depth=4)
    assert list(found) == [
        "average-plain",
        "average-squared",
        "average-uniform",
        "copy-left",
        "copy-right",
        "near-identity-0",
        "near-identity-0.1",
        "fresh",
    ]
    assert found["average-plain"].tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    np.testing.assert_allclose(found["average-squared"], 0.9 * LEFT + 0.1 * RIGHT, rtol=1e-6)
    assert found["near-identity-0"].tolist() == [3, 4, 5, 6, 7, 8, 0, 0, 0]
    np.testing.assert_array_equal(found["fresh"], fresh(LAYOUT, 1, 2, depth=4))
    found["copy-left"][0] = 99
    assert LEFT[0] == 1


def test_candidates_with_one_neighbour_or_none() -> None:
    one = from_neighbours(None, RIGHT, (1.0, 1.0), LAYOUT, seed=1, stage=1, depth=4)
    assert list(one) == ["copy-right", "near-identity-0", "near-identity-0.1", "fresh"]
    assert one["near-identity-0"].tolist() == [5, 6, 7, 8, 9, 10, 0, 0, 0]
    none = from_neighbours(None, None, (0.0, 0.0), LAYOUT, seed=1, stage=1, depth=4)
    assert list(none) == ["near-identity-0", "near-identity-0.1", "fresh"]
    assert none["near-identity-0"][6:].tolist() == [0, 0, 0]
    unknown = from_neighbours(LEFT[:2], None, (1, 1), [("w", (1, 2))], seed=1, stage=1, depth=4)
    assert list(unknown) == ["copy-left", "fresh"]
