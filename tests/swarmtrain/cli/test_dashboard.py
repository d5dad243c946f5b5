"""The dashboard's command: what it shows, and a run looked at from elsewhere with a ticket."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from swarmtrain.cli.dashboard import _local, find_ticket
from swarmtrain_peer.config import PeerConfig
from swarmtrain_peer.events import read_events
from swarmtrain_peer.site import found_site
from swarmtrain_peer.spawn import child_environment, spawn_peer, stop_process
from swarmtrain_protocols.errors import ConfigError, UsageError
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.tickets import Ticket
from tests.swarmtrain.cli.rig import Rig

WAIT_S = 20.0


def ticket_of(rig: Rig) -> str:
    with rig.site.connect() as client:
        return str(client.call("ticket", {"role": "observer", "vote": False, "uses": 0})["ticket"])


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("SWARMTRAIN_TICKET", raising=False)
    one = Rig(tmp_path / "home")
    yield one
    one.close()


def test_where_the_ticket_comes_from(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = ticket_of(rig)
    file = tmp_path / "ticket"
    file.write_text(text)
    assert find_ticket(None, None, None) is None
    given = [find_ticket(text, None, None), find_ticket(None, file, None)]
    monkeypatch.setenv("SWARMTRAIN_TICKET", text)
    given.append(find_ticket(None, None, None))
    assert [str(ticket) for ticket in given] == [text] * 3
    assert find_ticket(None, None, str(rig.site.folder)) is None  # named: the variable gives way
    with pytest.raises(UsageError):
        find_ticket(text, None, str(rig.site.folder))
    with pytest.raises(ConfigError):
        find_ticket("swarm://nothing", None, None)


def test_a_live_site_of_the_run_is_looked_at_without_joining(rig: Rig, tmp_path: Path) -> None:
    ticket = Ticket.parse(ticket_of(rig))
    assert _local(rig.home, ticket) == rig.site
    assert _local(tmp_path / "elsewhere", ticket) is None
    rig.stop_server()
    assert _local(rig.home, ticket) is None


@pytest.mark.timeout(90)
def test_a_run_is_seen_from_elsewhere_with_its_ticket(tmp_path: Path) -> None:
    config = PeerConfig(name="founder", listen="127.0.0.1:0", trains=False, dashboard="")
    site = found_site(tmp_path / "home", RunKeys(name="seen"), config)
    peer = spawn_peer(site)
    try:
        with site.connect() as client:
            text = str(client.call("ticket", {"role": "observer", "vote": False})["ticket"])
        elsewhere = {"TMPDIR": str(tmp_path), "SWARMTRAIN_HOME": str(tmp_path / "none")}
        arguments = ["dashboard", "--ticket", "-", "--bind", "127.0.0.1:0"]
        viewer = subprocess.Popen(
            [sys.executable, "-m", "swarmtrain", *arguments],
            env=child_environment(elsewhere),
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert viewer.stdin is not None
            viewer.stdin.write(text + "\n")
            viewer.stdin.close()
            url = url_of(viewer)
            members = seen_members(url)
            assert {m["name"].split(" ")[0] for m in members} == {"founder", "dashboard"}
            (watcher,) = (m for m in members if m["is_self"])
            assert not (watcher["trains"] or watcher["votes"] or watcher["holds_state"])
            assert all(m["connected"] for m in members)
            assert httpx.get(url + "api/v1/run").json()["run"]["name"] == "seen"
            viewer.send_signal(signal.SIGINT)
            assert viewer.wait(WAIT_S) == 130
        finally:
            stop_process(viewer)
    finally:
        stop_process(peer)
    left = [r for r in read_events(site.events_path) if r["name"] == "member_left"]
    assert [(r["peer"], r["reason"]) for r in left] == [(watcher["id"], "leave")]
    assert list(tmp_path.glob("swarmtrain-dashboard-*")) == []
    assert not (tmp_path / "none").exists()


def url_of(viewer: subprocess.Popen[str]) -> str:
    """The address it prints; what it prints later is read away."""
    assert viewer.stderr is not None
    seen: list[str] = []
    for line in viewer.stderr:
        seen.append(line)
        found = re.search(r"dashboard: (http\S+)", line)
        if found:
            threading.Thread(target=viewer.stderr.read, daemon=True).start()
            return found[1]
    raise AssertionError(f"no address in {seen}")


def seen_members(url: str) -> list[dict[str, Any]]:
    """Members as the page has them, once there are two with links."""
    pause = threading.Event()
    for _ in range(int(WAIT_S / 0.2)):
        with httpx.stream("GET", url + "events") as stream:  # somebody who watches is polled for
            next(stream.iter_lines())
        members: list[dict[str, Any]] = httpx.get(url + "api/v1/peers").json()["peers"]
        if len(members) == 2 and all(m["connected"] for m in members):
            return members
        pause.wait(0.2)
    raise AssertionError("the second member never came")
