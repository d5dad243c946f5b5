"""Hops and paths of micro-batches."""

from __future__ import annotations

import pytest

from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.pipeline.hops import (
    hops_of,
    is_path,
    plain_path,
    skipped_path,
    stage_of,
    swapped_path,
)


def test_both_ends_hops_belong_to_stage_zero() -> None:
    assert [stage_of(hop, 3) for hop in range(5)] == [0, 1, 2, 3, 0]
    assert [hops_of(stage, 3) for stage in range(4)] == [(0, 4), (1,), (2,), (3,)]


def test_paths() -> None:
    assert plain_path(4) == (0, 1, 2, 3, 4, 5)
    assert swapped_path(6) == (0, 2, 1, 3, 4, 6, 5, 7)
    assert skipped_path(plain_path(3), 2) == (0, 1, 3, 4)
    assert all(is_path(path, 4) for path in (plain_path(4), swapped_path(4), (0, 2, 5), (0, 5)))


@pytest.mark.parametrize(
    "path", [(), (5,), (1, 2, 5), (0, 1, 1, 5), (0, 1, 2), (0, 9, 5), (0, 5, 1, 5)]
)
def test_what_is_no_path(path: tuple[int, ...]) -> None:
    assert not is_path(path, 4)


def test_misuse_is_refused() -> None:
    with pytest.raises(LocalProtocolError):
        swapped_path(3)
    with pytest.raises(LocalProtocolError):
        skipped_path(plain_path(3), 0)
