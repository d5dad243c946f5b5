"""The processor floor of an all-reduce against sums worked out by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FLOOR = Path(__file__).resolve().parents[2] / "benchmarks" / "floor.py"


@pytest.fixture(scope="module")
def floor() -> ModuleType:
    location = importlib.util.spec_from_file_location("floor", FLOOR)
    assert location is not None and location.loader is not None
    module = importlib.util.module_from_spec(location)
    sys.modules["floor"] = module  # dataclasses look their module up
    location.loader.exec_module(module)
    return module


def test_two_peers_on_two_cores_by_hand(floor: ModuleType) -> None:
    costs = floor.Costs(1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
    parts = floor.floor_parts_s(costs, peers=2, values=8, nbytes=32, cores_shared=2)
    # Each sends 16 bytes of contribution and 16 of result, and receives as many: 64 bytes through
    # cipher and copy. It hashes its own 32, its result of 16 and the 32 it received.
    assert parts == {
        "aead": 64.0,
        "copy": 6400.0,
        "hash": 800.0,
        "encode": 12e3,  # its 8 values, and 4 of the result
        "sum": 8e4,
        "decode": 8e5,
    }


def test_four_peers_on_two_cores_take_twice_the_turns(floor: ModuleType) -> None:
    costs = floor.Costs(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    four = floor.floor_parts_s(costs, peers=4, values=8, nbytes=32, cores_shared=2)
    assert four["aead"] == 2 * (4 * 32 * 3 / 4)
    assert floor.floor_parts_s(costs, 4, 8, 32, 4)["aead"] == four["aead"] / 2
    assert floor.floor_parts_s(costs, 1, 8, 32, 2)["aead"] == 0.0
