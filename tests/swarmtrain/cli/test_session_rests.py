"""A member that rests outside its hours and comes back by itself; the clock is the test's."""

from __future__ import annotations

import os
import signal
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from swarmtrain.cli import session as sessions
from swarmtrain.cli.session import MemberSession
from swarmtrain_peer.config import PeerConfig
from swarmtrain_peer.site import Site, found_site
from swarmtrain_protocols.errors import SwarmError
from swarmtrain_protocols.manifest import RunKeys
from tests.swarmtrain.cli.test_session import WAITS, Recorder, use_stand_in

NIGHT = datetime(2026, 2, 4, 23, 0, tzinfo=UTC)
NOON = datetime(2026, 2, 4, 12, 0, tzinfo=UTC)


class Clock:
    """What the session takes for the time of day; ``dozed`` is set when it waits for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, now: datetime) -> None:
        self.now = now
        self.dozed = threading.Event()
        self.woken = threading.Event()
        monkeypatch.setattr(sessions.host, "local_now", lambda: self.now)
        monkeypatch.setattr(sessions.host, "doze", self.doze)

    def doze(self, seconds: float) -> None:
        self.dozed.set()
        self.woken.wait(seconds)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    config = PeerConfig(leave_grace_s=0.3, hours="22:00-06:00")
    return found_site(tmp_path, RunKeys(), config)


def leave(site: Site) -> None:
    """The peer process leaves for a rest: it ends well, nobody has asked it to."""
    with site.connect() as client:
        client.call("end", {"code": 0})


@pytest.mark.slow
def test_it_rests_outside_its_hours_and_works_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_stand_in(monkeypatch)
    clock, output = Clock(monkeypatch, NIGHT), Recorder()
    session = MemberSession(site, output, WAITS)
    session.start()
    pids = [session._supervisor.processes["peer"].process.pid]

    def work() -> None:
        output.wait_for("peer_started")
        clock.now = NOON
        leave(site)
        clock.dozed.wait(20)
        clock.now = NIGHT
        output.wait_for("peer_started")
        pids.append(session._supervisor.processes["peer"].process.pid)
        os.kill(os.getpid(), signal.SIGINT)

    helper = threading.Thread(target=work)
    helper.start()
    assert session.run() == 0
    helper.join(20)
    assert len(set(pids)) == 2
    assert "outside its hours: resting until 2026-02-04 22:00" in output.notes


def test_it_starts_when_its_hours_begin(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    use_stand_in(monkeypatch)
    clock, output = Clock(monkeypatch, NOON), Recorder()
    session = MemberSession(site, output, None)
    helper = threading.Thread(target=session.start)
    helper.start()
    assert clock.dozed.wait(20)
    assert not session._supervisor.processes
    clock.now = NIGHT
    helper.join(20)
    assert "peer" in session._supervisor.processes
    session.close()


def test_who_leaves_for_good_does_not_come_back(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while it works, at the very end of its hours, and while it rests."""
    use_stand_in(monkeypatch)
    for resting in (False, True):
        clock, output = Clock(monkeypatch, NIGHT), Recorder()
        session = MemberSession(site, output, None)
        session.start()

        def work(rests: bool = resting, it: Clock = clock, told: Recorder = output) -> None:
            told.wait_for("peer_started")
            it.now = NOON
            if rests:
                leave(site)
                it.dozed.wait(20)
            os.kill(os.getpid(), signal.SIGINT)

        helper = threading.Thread(target=work)
        helper.start()
        assert session.run() == 0
        helper.join(20)
        assert not site.is_live()


def test_a_start_that_fails_within_the_hours_is_an_error(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(site: Site) -> None:
        raise SwarmError("no", "such", "luck")

    Clock(monkeypatch, NIGHT)
    monkeypatch.setattr(sessions, "spawn_peer", fail)
    with pytest.raises(SwarmError, match="no"):
        MemberSession(site, Recorder(), None).start()
