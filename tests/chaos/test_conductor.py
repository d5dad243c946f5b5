"""A run that is interrupted ends in good order, and tells of what it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.conductor import Conductor, Order, StandsStill
from tests.chaos.scenarios import SCENARIOS

PLANNED = [{"at_s": at_s, "kind": "kill", "site": 1, "for_s": 1.0} for at_s in (5.0, 15.0, 25.0)]


class Still:
    """A crew, and its hands, to which nothing happens."""

    homes: tuple[Any, ...] = ()
    own_bytes_max = 1 << 20

    def turn(self) -> None: ...
    def sample(self) -> None: ...
    def list_rounds(self) -> None: ...
    def heal(self) -> None: ...
    def there(self) -> list[Any]:
        return []

    alive = there


@pytest.fixture
def conductor(tmp_path: Path) -> Conductor:
    order = Order(SCENARIOS["C1"], 30.0, 1, 1.0, PLANNED)
    made = Conductor(order, tmp_path / "run", lambda line: None)
    made.crew = made.acts = Still()  # type: ignore[assignment]
    return made


def test_an_interrupted_run_still_settles(conductor: Conductor) -> None:
    conductor.order.enough.set()
    with pytest.raises(StandsStill, match="interrupted"):
        conductor._until(lambda: False, 60.0, "three rounds")
    conductor._trouble()
    conductor._settle()
    assert conductor._until(lambda: "all", 60.0, "everybody goes on") == "all"


def test_of_an_interrupted_run_counts_what_was_due(conductor: Conductor) -> None:
    conductor._marks = {"faults_from_s": 100.0, "faults_until_s": 118.0}
    conductor.crew.ground = type("Ground", (), {"name": "loopback"})()
    whole = conductor._document()
    assert (whole["planned"], whole["interrupted"]) == ({"kill": 3}, False)
    conductor.order.enough.set()
    part = json.loads(json.dumps(conductor._document()))
    assert (part["planned"], part["interrupted"]) == ({"kill": 2}, True)
    assert (part["minutes"], part["played_minutes"]) == (0.5, 0.3)
