"""Tickets on the command line: made, listed without their secrets, durations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from swarmtrain.cli.main import app
from swarmtrain.cli.ticket import parse_duration, state_of
from swarmtrain_protocols.errors import NotAuthorised, UsageError
from swarmtrain_protocols.manifest import Ticket
from tests.swarmtrain.cli.rig import KEY, TICKET_ROW, Rig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_a_ticket_is_one_line_that_parses(rig: Rig) -> None:
    result = invoke("ticket", "create", "--vote", "--expires", "12h", "--home", str(rig.home))
    assert result.exit_code == 0
    ticket = Ticket.parse(result.stdout)
    assert ticket.run == rig.site.run_id
    assert ticket.unverified.vote
    asked = {"role": "trainer", "vote": True, "expires_s": 43200, "uses": 0, "note": ""}
    assert rig.backend.asked == [("ticket", asked)]
    refused = invoke("ticket", "create", "--vote", "--uses", "99", "--home", str(rig.home))
    assert isinstance(refused.exception, NotAuthorised)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("15m", 900), ("7d", 604800), ("never", 0)]
)
def test_durations(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "0d", "-3h", "1y", "1.5h"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(UsageError):
        parse_duration(text)


def test_tickets_are_listed_with_who_came(rig: Rig) -> None:
    text = invoke("ticket", "list", "--home", str(rig.home)).stdout
    assert text.splitlines()[1].split() == [
        TICKET_ROW["id"], "good", "trainer", "-", "1", "of", "2", "never", "for", "bob",
    ]  # fmt: skip
    document = json.loads(invoke("ticket", "list", "--home", str(rig.home), "--json").stdout)
    assert document["tickets"] == [{**TICKET_ROW, "state": "good"}]


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ({}, "good"),
        ({"revoked": "leaked"}, "revoked"),
        ({"expires_s": 1_000}, "expired"),
        ({"bearers": [KEY, "cd" * 32]}, "used up"),
        ({"role": None, "uses": None, "expires_s": None}, "made elsewhere"),
    ],
)
def test_a_ticket_is_good_or_the_reason_why_not(change: dict[str, Any], state: str) -> None:
    assert state_of({**TICKET_ROW, **change}, 2_000.0) == state
