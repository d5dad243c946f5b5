"""What a site has logged: live and stopped, about one peer, by age and gravity."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from swarmtrain.cli.main import app
from swarmtrain_protocols.errors import UsageError
from tests.swarmtrain.cli.rig import Rig

BOB = "5c" * 32


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()


def record(seq: int, name: str, age_s: float = 0.0, **fields: Any) -> dict[str, Any]:
    base = {"seq": seq, "name": name, "severity": "info", "code": "X1", "site": BOB[:16]}
    return {**base, "wall_s": time.time() - age_s, **fields}


def write(rig: Rig, *records: dict[str, Any]) -> None:
    lines = [json.dumps(one) + "\n" for one in records]
    rig.site.events_path.write_text("".join(lines) + "not a record\n" + '{"torn"')


def invoke(rig: Rig, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["logs", *arguments, "--home", str(rig.home)])


def shown(result: Result) -> list[int]:
    assert result.exit_code == 0, result.output
    return [json.loads(line)["seq"] for line in result.stdout.splitlines()]


STORY = (
    record(1, "peer_started", age_s=7200.0),
    record(2, "member_joined", peer=BOB, peer_name="bob-3090"),
    record(3, "round_opened", contributors=["1a" * 32, BOB]),
    record(4, "round_aborted", severity="warning", reason="owner lost"),
    record(5, "data_loss", severity="error", reason="gone"),
)


def test_a_stopped_site_can_be_read(rig: Rig) -> None:
    write(rig, *STORY)
    rig.stop_server()
    result = invoke(rig, "--json")
    assert shown(result) == [1, 2, 3, 4, 5]
    assert "is damaged and left out" in result.stderr
    assert invoke(rig, "-n", "1").stdout.split("  ", 1)[1] == "!! data loss  reason=gone\n"


def test_events_are_chosen_by_peer_age_and_gravity(rig: Rig) -> None:
    write(rig, *STORY)
    assert shown(invoke(rig, "5c5c", "--json")) == [2, 3], "the site itself is in every record"
    assert shown(invoke(rig, "bob-3090", "--json")) == [2]
    assert shown(invoke(rig, "--since", "1h", "--json")) == [2, 3, 4, 5]
    assert shown(invoke(rig, "--level", "warning", "--json")) == [4, 5]
    assert shown(invoke(rig, "--level", "error", "-n", "3", "--json")) == [5]
    assert isinstance(invoke(rig, "--level", "loud").exception, UsageError)
    assert isinstance(invoke(rig, "--since", "yesterday").exception, UsageError)


def test_what_the_process_printed(rig: Rig) -> None:
    assert invoke(rig, "--process").stdout == ""
    rig.site.output_path.write_text("one\ntwo\x1b[2J\nthree\n")
    assert invoke(rig, "--process", "-n", "2").stdout == "two\\x1b[2J\nthree\n"


def test_it_goes_on_as_events_come_until_the_process_ends(rig: Rig) -> None:
    write(rig, *STORY)

    def act() -> None:
        assert rig.backend.followed.wait(10)
        rig.push(record(5, "said already"))
        rig.push(record(900, "member_left", peer=BOB))
        rig.push(record(901, "member_left", peer="1a" * 32))
        rig.stop_server()

    helper = threading.Thread(target=act)
    helper.start()
    result = invoke(rig, BOB[:8], "--follow", "--json")
    helper.join()
    assert shown(result)[-1] == 900
