"""Starting processes, and starting them again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from swarmtrain_peer import spawn
from swarmtrain_peer.config import PeerConfig
from swarmtrain_peer.site import Site, found_site
from swarmtrain_peer.spawn import (
    Supervisor,
    child_environment,
    may_restart,
    start_process,
    stop_process,
    wait_ready,
)
from swarmtrain_protocols import errors, limits
from swarmtrain_protocols.errors import SwarmError
from swarmtrain_protocols.manifest import RunKeys

SERVER = """
import asyncio, sys
from pathlib import Path
from swarmtrain_peer.controlserver import ControlServer
from swarmtrain_peer.site import Site
from swarmtrain_peer.spawn import watch_owner

class Backend:
    async def call(self, name, args, connection):
        return {"pid": __import__("os").getpid()}

async def main():
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    watch_owner(lambda: loop.call_soon_threadsafe(gone.set))
    server = ControlServer(Site(Path(sys.argv[1])).control_path, Backend())
    await server.start()
    await gone.wait()
    await server.close()

asyncio.run(main())
"""


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return found_site(tmp_path, RunKeys(), PeerConfig())


def start(site: Site, code: str) -> subprocess.Popen[bytes]:
    return start_process([sys.executable, "-c", code, str(site.folder)], site.output_path)


def test_waiting_until_the_control_socket_answers(site: Site) -> None:
    process = start(site, SERVER)
    wait_ready(site, process, 20.0)
    with site.connect() as client:
        assert client.call("ping")["pid"] == process.pid
    assert process.stdin is not None
    process.stdin.close()  # as if this process had died
    assert process.wait(10) == 0
    assert not site.control_path.exists()


@pytest.mark.parametrize(
    ("exit_code", "kind"),
    [(6, errors.NotAuthorised), (11, errors.CheckpointError), (1, SwarmError)],
)
def test_an_early_end_is_told_with_its_last_words(
    site: Site, exit_code: int, kind: type[SwarmError]
) -> None:
    process = start(site, f"import sys; print('ticket expired'); sys.exit({exit_code})")
    with pytest.raises(SwarmError) as caught:
        wait_ready(site, process, 20.0)
    assert type(caught.value) is kind
    assert caught.value.exit_code == exit_code
    assert "ticket expired" in caught.value.why
    stop_process(process)


def test_a_process_that_never_answers_has_a_deadline(site: Site) -> None:
    process = start(site, "import sys; sys.stdin.read()")
    with pytest.raises(errors.QuorumLost, match="did not answer"):
        wait_ready(site, process, 0.1)
    assert stop_process(process) == -signal.SIGTERM


def test_a_process_that_ignores_sigterm_is_killed(site: Site) -> None:
    code = (
        "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    process = start(site, code)
    while "ready" not in spawn.output_tail(site.output_path):
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
    assert stop_process(process, timeout_s=0.1) == -signal.SIGKILL


def test_no_secret_is_in_the_argument_list(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def fake_start(arguments: list[str], output: Path, **keys: object) -> object:
        seen.append(arguments)
        raise errors.DiskFull("stop here")

    monkeypatch.setattr(spawn, "start_process", fake_start)
    with pytest.raises(errors.DiskFull):
        spawn.spawn_peer(site)
    assert seen == [[sys.executable, "-m", "swarmtrain_peer", str(site.folder)]]


@pytest.mark.parametrize("exit_code", [1, 4, 12, 75, -9, -11])
def test_what_is_restarted(exit_code: int) -> None:
    assert may_restart(exit_code)


@pytest.mark.parametrize("exit_code", [0, 2, 3, 6, 7, 8, 13, 130, 143])
def test_what_is_never_restarted(exit_code: int) -> None:
    assert not may_restart(exit_code)


class FakeProcess:
    """A process whose end the test decides."""

    stdin = None

    def __init__(self) -> None:
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self.returncode


class Bench:
    """A supervisor with virtual time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.started: list[FakeProcess] = []
        self.reports: list[tuple[str, dict[str, object]]] = []
        self.refuse: SwarmError | None = None
        self.supervisor = Supervisor(
            lambda name, fields: self.reports.append((name, fields)), mono_s=lambda: self.now
        )
        self.supervisor.add("peer", self.start)

    def start(self) -> subprocess.Popen[bytes]:
        if self.refuse is not None:
            raise self.refuse
        self.started.append(FakeProcess())
        return self.started[-1]  # type: ignore[return-value]

    def die(self, exit_code: int) -> None:
        self.started[-1].returncode = exit_code
        self.supervisor.poll()


def test_a_killed_process_starts_again_after_a_growing_wait() -> None:
    bench = Bench()
    waits: list[float] = []
    for number in range(8):
        bench.die(-9)
        name, fields = bench.reports[-1]
        assert (name, fields["restarts"]) == ("process_restarted", number + 1)
        waits.append(float(str(fields["wait_s"])))
        bench.now += waits[-1] - 0.01
        bench.supervisor.poll()
        assert len(bench.started) == number + 1
        bench.now += 0.01
        bench.supervisor.poll()
        assert len(bench.started) == number + 2
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    bench.now += spawn.STABLE_S
    bench.die(-9)
    assert bench.reports[-1][1]["wait_s"] == 0.5


def test_restarts_end_at_a_bound_and_the_user_is_told() -> None:
    bench = Bench()
    for _ in range(limits.RESTARTS_MAX):
        bench.die(1)
        bench.now += spawn.BACKOFF_MAX_S
        bench.supervisor.poll()
    bench.die(1)
    assert bench.reports[-1] == (
        "process_ended",
        {"process": "peer", "exit_code": 1, "reason": "too many restarts"},
    )
    assert bench.supervisor.all_ended()


def test_a_refusal_is_final() -> None:
    bench = Bench()
    bench.die(6)
    assert bench.reports == [
        ("process_ended", {"process": "peer", "exit_code": 6, "reason": "restarting does not help"})
    ]
    assert bench.supervisor.processes["peer"].exit_code == 6


def test_a_restart_that_fails_counts_as_a_death() -> None:
    bench = Bench()
    bench.die(-9)
    bench.refuse = errors.NotAuthorised("banned")
    bench.now += 1.0
    bench.supervisor.poll()
    assert bench.reports[-1][0] == "process_ended"
    assert bench.supervisor.processes["peer"].exit_code == 6


def test_an_end_that_was_asked_for_is_no_news() -> None:
    bench = Bench()
    bench.supervisor.expect_end()
    bench.die(-15)
    assert bench.reports == []
    assert bench.supervisor.all_ended()


def test_children_find_the_same_packages() -> None:
    code = "import swarmtrain_protocols; print(swarmtrain_protocols.__file__)"
    out = subprocess.run(
        [sys.executable, "-c", code],
        env=spawn.child_environment(),
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    import swarmtrain_protocols

    assert os.path.samefile(out.stdout.strip(), swarmtrain_protocols.__file__)


def test_a_ticket_in_the_environment_is_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARMTRAIN_TICKET", "swarm://secret")
    monkeypatch.setenv("SWARMTRAIN_HOME", "here")
    given = child_environment({"SWARMTRAIN_SITE": "there"})
    assert "SWARMTRAIN_TICKET" not in given
    assert (given["SWARMTRAIN_HOME"], given["SWARMTRAIN_SITE"]) == ("here", "there")
