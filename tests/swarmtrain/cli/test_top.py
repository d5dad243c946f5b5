"""The run in a terminal: what a screen says, and that a pipe gets one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from swarmtrain.cli import top
from swarmtrain.cli.main import app
from swarmtrain_peer import host
from tests.swarmtrain.cli.rig import Rig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()


def invoke(rig: Rig, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["top", *arguments, "--home", str(rig.home)])


def drawn(rig: Rig) -> list[str]:
    with rig.site.connect() as client:
        found = top.look(client)
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(top.screen(found))
    console.file.close()
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_a_screen_says_how_the_run_is_and_what_each_member_does(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided = [r["decided_wall_s"] for r in rig.run.all_rounds()["rounds"]]
    newest = max(at for at in decided if at is not None)
    monkeypatch.setattr(host, "wall_s", lambda: newest + 3.0)
    lines = drawn(rig)
    assert lines[0].startswith("healthy: every member is connected · round 24 · 4 members")
    assert "a commit every 6." in lines[0] and "the last 3 s ago" in lines[0]
    assert lines[2].split() == [name for column, _ in top.COLUMNS for name in column.split()]
    bob = next(line for line in lines if line.startswith("bob-3090"))
    assert bob.split()[1:4] == ["leader", "linked", "24"]
    assert bob.split()[5:] == ["97", "%", "1.5", "MB", "1.5", "MB", "1", "s", "ago"]
    assert lines[-1] == "last abort: train/0/0#15: owner lost"


def test_names_cannot_move_the_cursor_and_a_crowd_is_cut_short(rig: Rig) -> None:
    rig.run.names[2] = "evil\x1b[2J[red]name"
    lines = drawn(rig)
    assert any("evil\\x1b[2J[red]name" in line for line in lines)
    peers = rig.run.peers()["peers"]
    assert len(top.rows(peers * 30)) == top.MEMBERS_SHOWN
    peers[0]["connected"] = False
    assert top.rows(peers)[-1][0].startswith("anna-laptop"), "who is away comes last"


def test_into_a_pipe_it_is_printed_once(rig: Rig) -> None:
    result = invoke(rig)
    assert result.exit_code == 0 and result.stdout.count("bob-3090") == 1
    document = json.loads(invoke(rig, "--json").stdout)
    assert set(document) == {"health", "reason", "status", "peers", "rounds"}
    assert document["health"] == "healthy"
