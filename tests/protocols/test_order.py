"""Every sample once in every epoch, in an order that anybody can compute from the specification."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain_protocols.order import samples_at, shuffled

VECTORS = Path(__file__).resolve().parents[2] / "protocols" / "vectors" / "shards.json"
CASES = json.loads(VECTORS.read_text(encoding="utf-8"))["order"]
MASK = (1 << 64) - 1


def reference(index: int, samples: int, seed: int, epoch: int) -> int:
    """Spec 13 §1.3, one sample at a time, with the integers of the language."""
    digest = blake3(b"order\0" + seed.to_bytes(8, "little") + epoch.to_bytes(8, "little")).digest()
    keys = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 32, 8)]
    half = max(1, -(-(samples - 1).bit_length() // 2))
    value = index
    while True:
        left, right = value >> half, value % (1 << half)
        for key in keys:
            z = right ^ key
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
            left, right = right, left ^ ((z ^ (z >> 31)) % (1 << half))
        value = left << half | right
        if value < samples:
            return value


@given(st.integers(1, 3000), st.integers(0, (1 << 53) - 1), st.integers(0, 9))
def test_an_epoch_is_a_permutation(samples: int, seed: int, epoch: int) -> None:
    found = shuffled(np.arange(samples), samples, seed, epoch)
    assert sorted(found) == list(range(samples))
    some = range(0, samples, 1 + samples // 5)
    assert [found[i] for i in some] == [reference(i, samples, seed, epoch) for i in some]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['samples']}")
def test_vectors(case: dict[str, int | list[int]]) -> None:
    samples, seed, epoch = (int(case[name]) for name in ("samples", "seed", "epoch"))  # type: ignore[arg-type]
    indices = case["indices"]
    assert isinstance(indices, list)
    assert [reference(i, samples, seed, epoch) for i in indices] == case["found"]
    assert shuffled(np.array(indices), samples, seed, epoch).tolist() == case["found"]


def test_positions_run_through_the_epochs() -> None:
    found = samples_at(np.arange(25, 55), 10, 3)
    for epoch, first, stop in ((2, 25, 30), (3, 30, 40), (4, 40, 50), (5, 50, 55)):
        indices = np.arange(first, stop) - 10 * epoch
        assert found[first - 25 : stop - 25].tolist() == shuffled(indices, 10, 3, epoch).tolist()
    assert found[5:15].tolist() != found[15:25].tolist(), "epochs differ"
    assert samples_at(np.array([], np.int64), 10, 3).size == 0


def test_neighbours_end_up_apart() -> None:
    found = shuffled(np.arange(100_000), 100_000, 7, 1)
    assert abs(float(np.corrcoef(found[1:], found[:-1])[0, 1])) < 0.02
    assert abs(float(np.corrcoef(found, np.arange(100_000))[0, 1])) < 0.02
