"""Orders to the whole run, as they are asked for; what they lead to is in tests/swarm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from swarmtrain.cli.main import app
from tests.swarmtrain.cli.rig import Rig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()


@pytest.mark.parametrize(
    ("arguments", "asked", "said"),
    [
        (("run", "pause", "--reason", "tea"), {"kind": "pause", "reason": "tea"}, "paused; "),
        (("run", "resume"), {"kind": "resume", "reason": ""}, "the run goes on"),
        (("run", "stop"), {"kind": "stop", "reason": ""}, "the run has ended"),
        (("ban", "c0ffee"), {"kind": "ban", "member": "c0ffee", "reason": ""}, "c0ffee is banned"),
    ],
)
def test_an_order_is_asked_for_and_confirmed(
    rig: Rig, arguments: tuple[str, ...], asked: dict[str, str], said: str
) -> None:
    result = CliRunner().invoke(app, [*arguments, "--home", str(rig.home)])
    assert result.exit_code == 0 and result.stdout.startswith(said)
    assert rig.backend.asked == [("order", asked)]
    document = json.loads(
        CliRunner().invoke(app, [*arguments, "--home", str(rig.home), "--json"]).stdout
    )
    assert document == {"ok": True, "order": asked["kind"], "index": 7}
