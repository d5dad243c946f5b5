"""Orders to the whole run, as they are asked for; what they lead to is in tests/swarm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from swarmtrain.cli.main import app
from swarmtrain_protocols.errors import UsageError
from tests.swarmtrain.cli.rig import KEY, ORDERED, Rig


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
        (
            ("run", "evict", "c0ffee", "--reason", "noise"),
            {"kind": "evict", "member": "c0ffee", "reason": "noise"},
            "c0ffee is no member any more",
        ),
        (("ban", "c0ffee"), {"kind": "ban", "member": "c0ffee", "reason": ""}, "c0ffee is banned"),
        (
            ("ban", "c0ffee", "--lift"),
            {"kind": "unban", "member": "c0ffee", "reason": ""},
            "c0ffee may come back",
        ),
        (
            ("run", "set", "train.inner_lr=1e-3", "--at-round", "40"),
            {"kind": "set", "key": "inner_lr", "value": "1e-3", "at_round": 40, "reason": ""},
            "from round 40 on, inner_lr is 0.001",
        ),
        (
            ("run", "rollback", "10"),
            {"kind": "rollback", "round": 10, "reason": ""},
            "the run goes on from round 10, in generation 1",
        ),
        (
            ("run", "handover", "ab", "--void-tickets"),
            {"kind": "handover", "member": "ab", "tickets": False, "reason": ""},
            f"the run is {KEY}'s now",
        ),
        (
            ("allow", "add", KEY, "--note", "bob"),
            {"kind": "allow", "member": KEY, "add": True, "note": "bob"},
            f"{KEY} may enter",
        ),
        (
            ("allow", "rm", "ab"),
            {"kind": "allow", "member": "ab", "add": False},
            f"{KEY} is off the list",
        ),
        (("allow", "off"), {"kind": "allow", "member": "", "add": True}, "whoever has a ticket"),
        (("allow", "on"), {"kind": "allow", "member": "", "add": False}, "only listed keys"),
        (
            ("ticket", "revoke", "1234"),
            {"kind": "revoke", "ticket": "1234", "reason": ""},
            "ticket 1234567812345678 is void",
        ),
    ],
)
def test_an_order_is_asked_for_and_confirmed(
    rig: Rig, arguments: tuple[str, ...], asked: dict[str, Any], said: str
) -> None:
    result = CliRunner().invoke(app, [*arguments, "--home", str(rig.home)])
    assert result.exit_code == 0 and result.stdout.startswith(said)
    assert rig.backend.asked == [("order", asked)]
    document = json.loads(
        CliRunner().invoke(app, [*arguments, "--home", str(rig.home), "--json"]).stdout
    )
    kind = asked["kind"]
    assert document == {"ok": True, "order": kind, "index": 7, **ORDERED.get(kind, {})}


@pytest.mark.parametrize("setting", ["inner_lr", "=3", "inner_lr="])
def test_a_setting_has_a_key_and_a_value(rig: Rig, setting: str) -> None:
    result = CliRunner().invoke(app, ["run", "set", setting, "--home", str(rig.home)])
    assert isinstance(result.exception, UsageError) and rig.backend.asked == []


@pytest.mark.parametrize(
    ("arguments", "seen", "key"),
    [
        (("run", "rollback"), ["round", "10", "train/0/0", "cd" * 8], "rounds"),
        (("allow", "list"), ["only these keys may enter", KEY, "bob"], "allowed"),
        (("ban",), [KEY, "noise"], "banned"),
    ],
)
def test_what_there_is_can_be_listed(
    rig: Rig, arguments: tuple[str, ...], seen: list[str], key: str
) -> None:
    text = CliRunner().invoke(app, [*arguments, "--home", str(rig.home)]).stdout
    assert all(word in text for word in seen)
    answer = CliRunner().invoke(app, [*arguments, "--home", str(rig.home), "--json"]).stdout
    assert json.loads(answer)[key]
