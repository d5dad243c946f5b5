"""Members come and go, every few seconds one, and nobody ever disagrees."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.swarm.churn import churn


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_members_come_and_go_and_every_round_has_one_hash(tmp_path: Path) -> None:
    found = churn(tmp_path, 40.0, members=5, members_min=3, seed=3, real=False, beat_s=4.0)
    assert found["rounds"] >= 20 and sum(found["happened"].values()) >= 8
    assert found["starts"] >= 2 and found["never_counted"] == []
