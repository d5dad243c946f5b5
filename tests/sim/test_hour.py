"""A swarm under churn for minutes; ``python -m swarmtrain_protocols.testing.hour``: for an hour."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from swarmtrain_protocols.dht.events import DhtFailed
from swarmtrain_protocols.testing.hour import WINDOWS_MAX, Hour, Options, main, run_hour

SMALL = Options(
    members=10, churn=6.0, seconds=150.0, grow_s=75.0, phase_s=(20.0, 25.0), lookup_every_s=3.0
)


def test_a_swarm_that_loses_its_leader_and_others_misses_no_bar() -> None:
    figures = run_hour(Hour(replace(SMALL, seed=1)))
    assert figures["missed"] == [], figures
    assert figures["leaders_lost"] and figures["members_lost"], "else nothing was tried"
    assert figures["members_joined"] == SMALL.members + int(str(figures["members_lost"]))
    assert figures["rounds_committed"] and figures["lookups"]


def test_what_is_missed_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork, a lookup that finds nothing and a member that waits for ever each end with 1."""

    def short(hour: Hour) -> None:
        hour.add(0.0)
        hour.world.run(1.0)

    monkeypatch.setattr(Hour, "grow", short)
    monkeypatch.setattr(Hour, "run", lambda hour, until_s: None)

    def finish(hour: Hour) -> None:
        hour.tally.lookups, hour._asked["m0", 7] = 1, ("m0", 0.0)
        hour.answered("m0", DhtFailed(7, b"key", "unreachable"))
        hour.ready_since["m0"] = hour.world.now - WINDOWS_MAX * hour.options.phase_s[1] - 1.0
        hour.counted("m0")
        hour.world.violation("AR1", "two outcomes")

    monkeypatch.setattr(Hour, "finish", finish)
    assert main(["--members", "1"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["missed"] == ["fork", "late", "lookups", "rounds"]
    assert told["fork"].startswith("AR1") and told["late"][0].startswith("m0")
