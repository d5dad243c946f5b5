"""The founder pauses, resumes, bans and stops a run of real processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from swarmtrain.cli.main import app
from swarmtrain_peer.control import ControlClosed
from swarmtrain_peer.spawn import output_tail
from swarmtrain_protocols.errors import ConfigError, NotAuthorised
from tests.swarm.harness import CHANNEL, WAIT_S, Seat, Swarm, closing_all, wait_same_stand
from tests.swarm.synthetic import Plan, Trainer

pytestmark = pytest.mark.timeout(100)


def order(seat: Seat, *arguments: str) -> dict[str, Any]:
    """The command line at a site, as the founder types it."""
    result = CliRunner().invoke(app, [*arguments, "--site", str(seat.site.folder), "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def committed(seat: Seat, since_seq: int) -> int:
    wanted = seat.wait_event("round_committed", lambda r: r["channel"] == CHANNEL, since_seq)
    return int(wanted["round"])


@pytest.mark.slow
def test_a_run_is_paused_resumed_relieved_of_a_member_and_stopped(tmp_path: Path) -> None:
    with Swarm(tmp_path) as swarm:
        founder = swarm.found(start_peers=3)
        ada, bob = (swarm.enter(name, founder.ticket(vote=False)) for name in ("ada", "bob"))
        keyed = {founder: 1, ada: 2, bob: 3}
        trainers = [Trainer(s.site, Plan(key=k, phase_s=0.05)).start() for s, k in keyed.items()]
        with closing_all(*trainers):
            committed(founder, 0)
            with pytest.raises(NotAuthorised, match="only the founder"):
                order(ada, "run", "pause")
            assert order(founder, "run", "pause", "--reason", "tea")["ok"] is True
            paused = {seat: seat.wait_event("paused")["seq"] for seat in keyed}
            assert founder.status()["paused"] == "tea"
            at = wait_same_stand(list(keyed))
            with pytest.raises(ConfigError, match="no member of that key"):
                order(founder, "ban", "feedbeef")
            with pytest.raises(ConfigError, match="it is the only steward"):
                order(founder, "ban", founder.id)
            order(founder, "run", "resume")
            for seat, since in paused.items():
                resumed = seat.wait_event("resumed")["seq"]
                assert not [r for r in seat.events("round_opened", since) if r["seq"] < resumed]
                assert committed(seat, resumed) >= at[0]
            with pytest.raises(ConfigError, match="not paused"):
                order(founder, "run", "resume")
            _ban(founder, ada, bob)
            order(founder, "run", "stop", "--reason", "done")
            for seat in (founder, ada):
                assert seat.wait_event("run_ended")["reason"] == "done"
        swarm.check_hashes()


def _ban(founder: Seat, ada: Seat, bob: Seat) -> None:
    """Bob is turned out and not let in again; the others go on."""
    assert order(founder, "ban", bob.id[:12], "--reason", "noise")["ok"] is True
    banned = ada.wait_event("member_banned")
    assert (banned["peer"], banned["reason"]) == (bob.id, "noise")
    assert bob.process is not None
    assert bob.process.wait(WAIT_S) == NotAuthorised.exit_code
    both = {founder.id, ada.id}
    ada.wait_event("round_opened", lambda r: set(r["contributors"]) == both, banned["seq"])
    committed(ada, banned["seq"])
    bob.process = None
    try:
        bob.start()
    except NotAuthorised:
        assert bob.process is None, "it ended before it was ready"
    except ControlClosed:
        assert bob.process is not None, "it was ready, and had ended before it was followed"
    if bob.process is not None:
        assert bob.process.wait(WAIT_S) == NotAuthorised.exit_code
    assert "refuses this site" in output_tail(bob.site.output_path)
