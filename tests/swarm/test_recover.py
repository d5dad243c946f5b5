"""A majority of the stewards is lost for ever, and the founder begins the log again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from swarmtrain.cli.main import app
from swarmtrain_protocols.errors import NotAuthorised, UsageError
from tests.swarm.harness import CHANNEL, Seat, Swarm, closing_all, poll_until, wait_same_stand
from tests.swarm.synthetic import Plan, Trainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


def run(seat: Seat, *arguments: str) -> tuple[int, dict[str, object]]:
    """``swarmtrain run recover`` at one site."""
    site = ["--site", str(seat.site.folder), "--home", str(seat.site.home), "--json"]
    result = CliRunner().invoke(app, ["run", "recover", *arguments, *site])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return getattr(result.exception, "exit_code", 1), {}
    return result.exit_code, json.loads(result.stdout.splitlines()[-1])


def rounds(seat: Seat) -> int:
    found = seat.status()["channels"].get(CHANNEL)
    return int(found["round"]) if found is not None else -1


def test_the_run_goes_on_from_a_survivor_and_old_stewards_come_back_as_members(
    tmp_path: Path,
) -> None:
    with Swarm(tmp_path) as swarm:
        seed = swarm.found(config={"trains": False})
        ticket, plain = seed.ticket(), {"votes": False}
        ada, bob = swarm.enter("ada", ticket), swarm.enter("bob", ticket)
        seed.wait_event("stewards_changed", lambda r: len(r["voters"]) == 3)
        cyd, dan = (swarm.enter(name, ticket, config=plain) for name in ("cyd", "dan"))
        trainers = [
            Trainer(seat.site, Plan(key=key, phase_s=0.1)).start()
            for key, seat in enumerate((cyd, dan), 1)
        ]
        with closing_all(*trainers):
            poll_until(lambda: rounds(cyd) >= 3, "training")
            for steward in (seed, ada, bob):
                steward.kill()
            cyd.wait_event("quorum_lost")
            assert run(cyd)[0] == NotAuthorised.exit_code, "the founder's key is not here"
            key = str(seed.site.founder_path)
            assert run(cyd, "--founder-key", key, "--yes")[0] == UsageError.exit_code, "it runs"
            cyd.stop()
            code, told = run(cyd, "--founder-key", key)
            assert (code, told["done"]) == (0, False)
            stood = told["rounds"][CHANNEL]  # type: ignore[index]
            code, done = run(cyd, "--founder-key", key, "--yes")
            assert (code, done["done"], done["rounds"]) == (0, True, told["rounds"])
            assert Path(str(done["old_log"])).exists()
            before = dan.last_seq
            cyd.start()
            dan.wait_event("log_superseded", lambda r: r["generation"] == told["generation"])
            dan.wait_event("round_committed", lambda r: r["round"] > stood, before, timeout_s=60.0)
            assert cyd.status()["generation"] == told["generation"]
            for old in (ada, bob):
                old.start()
                said = old.wait_event("log_superseded", timeout_s=60.0)
                assert (said["generation"], said["old_generation"]) == (told["generation"], 0)
            poll_until(lambda: cyd.status()["members"] >= 4, "old stewards are members again")
            poll_until(lambda: len(cyd.status()["stewards"]) == 3, "and may vote", 60.0)
        wait_same_stand([ada, bob, cyd, dan])
        swarm.check_hashes()
