"""What becomes of hand-overs, and losses at equal samples, by the benchmark's own account."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import unlike_members
from tests.swarm.harness import CHANNEL


class Seated:
    """A member that has handed over phases of so many samples each."""

    def __init__(self, folder: Path, name: str, phases: list[float]) -> None:
        self.id = name
        self.site = SimpleNamespace(folder=folder / name)
        self.site.folder.mkdir()
        (self.site.folder / "trainer.log").write_text("training lm-tiny on cpu\n")
        self._phases = phases

    def events(self, name: str) -> list[dict[str, Any]]:
        assert name == "handover"
        return [{"channel": CHANNEL, "samples": s, "inner_steps": s / 4} for s in self._phases]


def counted(*given: tuple[str, float]) -> dict[str, Any]:
    return {"contributors": [{"id": n, "samples": s, "coefficient": 0.5} for n, s in given]}


def test_what_was_left_out_is_counted_later_or_waits_and_nothing_else_is_lost(
    tmp_path: Path,
) -> None:
    run: Any = SimpleNamespace(
        seats={
            "a": Seated(tmp_path, "a", [80.0, 80.0, 80.0]),
            "slow": Seated(tmp_path, "slow", [80.0, 80.0, 16.0]),
            "robbed": Seated(tmp_path, "robbed", [80.0, 80.0]),
        }
    )
    rounds = [
        counted(("a", 80.0), ("robbed", 60.0)),
        counted(("a", 80.0), ("slow", 160.0)),
        counted(("a", 80.0)),
    ]
    found = unlike_members.accounts(run, rounds)
    assert (found["a"]["counted"], found["a"]["waiting"], found["a"]["lost"]) == (240.0, 0.0, 0.0)
    assert (found["slow"]["counted"], found["slow"]["waiting"]) == (160.0, 16.0)
    assert found["slow"]["phases_counted_in_a_later_round"] == 1
    assert found["slow"]["lost"] == 0.0 and found["slow"]["rounds"] == 1
    assert found["robbed"]["lost"] is None, "what counts is no sum of whole phases"


def test_a_curve_is_read_between_its_points() -> None:
    curve = [[0.0, 4.0], [100.0, 3.0], [300.0, 2.0]]
    assert unlike_members.loss_at(curve, 100.0) == 3.0
    assert unlike_members.loss_at(curve, 150.0) == pytest.approx(2.75)
    with pytest.raises(ValueError, match="301"):
        unlike_members.loss_at(curve, 301.0)
