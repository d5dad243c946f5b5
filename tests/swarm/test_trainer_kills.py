"""A trainer that dies in the middle of a hand-over has contributed nothing, or all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.swarm.trainer_kills import check, kill_often

KILLS = 8


@pytest.mark.timeout(100)
def test_a_trainer_killed_in_its_hand_over_leaves_nothing_torn(tmp_path: Path) -> None:
    check(kill_often(tmp_path, KILLS, seed=5), KILLS)
