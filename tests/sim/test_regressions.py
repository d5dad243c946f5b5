"""Schedules that once found a defect, replayed for ever. Never delete one."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarmtrain_protocols.testing.nightly import KINDS, explain
from swarmtrain_protocols.testing.schedules import Schedule, from_json

FILES = sorted((Path(__file__).parent / "schedules").glob("*.json"))


def recorded(name: str) -> Schedule:
    return from_json((Path(__file__).parent / "schedules" / name).read_bytes())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_schedule_that_found_a_defect_stays_quiet(path: Path) -> None:
    wanted = from_json(path.read_bytes())
    run = KINDS[wanted.kind][0]
    outcome = run(wanted.seed, wanted.listed())
    assert outcome.violation == "", f"{wanted.about} again?\n{explain(outcome, run=run)}"


def test_who_holds_a_ticket_of_which_every_address_is_gone_is_not_waited_for() -> None:
    """Seed 260 of a night: cut off at its start, and then the only site that it knew vanished."""
    wanted = recorded("rounds-260.json")
    assert KINDS[wanted.kind][0](wanted.seed, wanted.listed()).seen["stranded"] == 1


def test_files_say_what_they_are_about() -> None:
    assert len(FILES) >= 10
    for path in FILES:
        wanted = recorded(path.name)
        assert len(wanted.about) > 20
        assert wanted.faults or path.name == "local-395.json", "it takes no fault"
        assert path.name.startswith(f"{wanted.kind}-{wanted.seed}"), path
