"""Looking at a live site: what is printed, and the exit codes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from swarmtrain.cli.main import app
from swarmtrain.cli.query import health
from swarmtrain_peer.control import ControlClosed
from swarmtrain_protocols.errors import UsageError
from tests.swarmtrain.cli.rig import Rig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()


def invoke(rig: Rig, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--home", str(rig.home)])


def test_status_for_people_and_for_programs(rig: Rig) -> None:
    result = invoke(rig, "status")
    assert result.exit_code == 0
    assert result.stdout.startswith("healthy: every member is connected\n")
    assert "24 committed, 2 aborted, generation 0" in result.stdout
    assert "tiny-lm c0ffee11c0ffee11" in result.stdout
    result = invoke(rig, "status", "--json")
    document = json.loads(result.stdout)
    assert document["ok"] is True
    assert document["health"] == "healthy"
    assert document["rounds_committed"] == 24
    assert document["channels"]["train/0/0"]["state_hash"] == "ab12cd34" * 8


@pytest.mark.parametrize(
    ("change", "word", "exit_code"),
    [
        ({}, "healthy", 0),
        ({"connected": 2}, "degraded", 20),
        ({"connected": 2, "members": 64}, "healthy", 0),
        ({"syncing": True}, "degraded", 20),
        ({"disk_full": ["log", "results"]}, "degraded", 20),
        ({"leader": None}, "stalled", 21),
        ({"paused": "no hash has a majority"}, "stalled", 21),
        ({"ended": "max_rounds", "leader": None}, "stopped", 22),
    ],
)
def test_health_has_an_exit_code(
    rig: Rig, change: dict[str, Any], word: str, exit_code: int
) -> None:
    answer = rig.run.status() | change
    assert health(answer)[:2] == (word, exit_code)


def test_a_named_site_that_is_not_live_is_stopped(rig: Rig) -> None:
    rig.stop_server()
    result = invoke(rig, "status", "--site", str(rig.site.folder), "--json")
    assert result.exit_code == 22
    assert json.loads(result.stdout)["health"] == "stopped"
    with pytest.raises(UsageError):
        raise_from(invoke(rig, "status"))
    with pytest.raises(ControlClosed):
        raise_from(invoke(rig, "peers", "--site", str(rig.site.folder)))


def raise_from(result: Result) -> None:
    assert result.exception is not None
    raise result.exception


def test_peers_in_columns_with_escaped_names(rig: Rig) -> None:
    rig.run.names[2] = "evil\x1b[2J\u202ename"
    result = invoke(rig, "peers")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["id", "name", "role", "does", "link", "round", "addresses"]
    assert lines[2].split() == [
        "5c5c5c5c", "bob-3090", "leader", "trains", "connected", "24", "203.0.113.11:7400",
    ]  # fmt: skip
    assert "evil\\x1b[2J\\u202ename" in lines[3]
    assert "\x1b" not in result.stdout
    names = [peer["name"] for peer in json.loads(invoke(rig, "peers", "--json").stdout)["peers"]]
    assert names[0] == "anna-laptop"


def test_rounds_with_their_outcomes(rig: Rig) -> None:
    lines = invoke(rig, "rounds", "--last", "5").stdout.splitlines()
    assert any("train/0/0#23.0" in line and "committed" in line for line in lines)
    assert any("aborted" in line and "owner lost" in line for line in lines)
    assert ("rounds", {"last": 5}) in rig.backend.asked
    rounds = json.loads(invoke(rig, "rounds", "--json").stdout)["rounds"]
    assert sum(one["outcome"] == "aborted" for one in rounds) == 2


def test_events_can_be_filtered_by_code(rig: Rig) -> None:
    lines = invoke(rig, "events", "--code", "R321", "--last", "3").stdout.splitlines()
    assert lines == []  # the filter looks at the newest that were asked for
    result = invoke(rig, "events", "--code", "R321", "--last", "4096")
    clock, line = result.stdout.splitlines()[0].split("  ", 1)
    assert line == "! round aborted  train/0/0#7  reason=owner lost"
    aborted_s = rig.run.opened_s(7) - 0.5
    assert int(clock[3:5]) == int(aborted_s // 60) % 60  # whatever the time zone's hour
    assert int(clock[6:8]) == int(aborted_s) % 60
    found = json.loads(invoke(rig, "events", "--json", "-n", "3").stdout)["events"]
    assert [record["name"] for record in found] == [
        "evaluated",
        "round_committed",
        "evaluated",
    ]


def test_following_events_prints_them_as_they_come(rig: Rig) -> None:
    record = {"seq": 900, "name": "run_ended", "severity": "info", "code": "U710"}

    def act() -> None:
        assert rig.backend.followed.wait(10)
        rig.push(record | {"seq": 1, "reason": "already in the answer"})
        rig.push(record | {"reason": "max_rounds"})
        rig.stop_server()

    helper = threading.Thread(target=act)
    helper.start()
    result = invoke(rig, "events", "--follow", "--json", "-n", "1")
    helper.join()
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["name"] for line in lines] == ["evaluated", "run_ended"]
    assert result.exit_code == 0


def test_leave_after_the_round_or_now(rig: Rig) -> None:
    assert invoke(rig, "leave").stdout == "leaving after this round\n"
    assert json.loads(invoke(rig, "leave", "--now", "--json").stdout) == {"ok": True, "now": True}
    assert rig.backend.asked == [("leave", {"now": False}), ("leave", {"now": True})]
