"""A member in the foreground: its processes, its signals, its exit code. The peer process is a
stand-in that answers on the real control socket."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from swarmtrain.cli import session as sessions
from swarmtrain.cli.output import Output
from swarmtrain.cli.session import MemberSession, TrainerCommand, preset_trainer
from swarmtrain_peer.config import PeerConfig
from swarmtrain_peer.events import Record
from swarmtrain_peer.site import Site, found_site
from swarmtrain_peer.spawn import start_process, wait_ready
from swarmtrain_protocols.manifest import RunKeys

PEER = """
import asyncio, signal, sys
from pathlib import Path
from swarmtrain_peer.controlserver import ControlServer
from swarmtrain_peer.events import EventLog
from swarmtrain_peer.site import Site
from swarmtrain_peer.spawn import watch_owner

site = Site(Path(sys.argv[1]))
polite_takes_long = "slow" in sys.argv[2]

class Backend:
    def __init__(self):
        self.events = EventLog(site.events_path, "ab" * 32)
        self.done = asyncio.Event()
        self.code = 0

    async def call(self, name, args, connection):
        if name == "events":
            self.events.subscribe(
                lambda record: connection.push({"event": "event", "record": record}))
            return {"events": self.events.query(since_seq=args["since_seq"], last=args["last"])}
        if name == "leave":
            self.events.emit("leaving", now=args["now"])
            if args["now"] or not polite_takes_long:
                self.done.set()
        if name == "end":
            self.code = args["code"]
            self.events.emit("run_ended", reason="test")
            self.done.set()
        return {}

async def main():
    backend = Backend()
    loop = asyncio.get_running_loop()
    watch_owner(lambda: loop.call_soon_threadsafe(backend.done.set))
    server = ControlServer(site.control_path, backend)
    await server.start()
    backend.events.emit("peer_started")
    await backend.done.wait()
    await asyncio.sleep(0.05)
    await server.close()
    return backend.code

sys.exit(asyncio.run(main()))
"""


class Recorder(Output):
    """Keeps what the session tells, and lets the test wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []
        self.names: queue.Queue[str] = queue.Queue()

    def event(self, record: dict[str, Any]) -> None:
        self.names.put(record["name"])

    def note(self, line: str) -> None:
        self.notes.append(line)

    def wait_for(self, name: str) -> None:
        while self.names.get(timeout=20) != name:
            pass


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return found_site(tmp_path, RunKeys(), PeerConfig(leave_grace_s=0.3))


def use_stand_in(monkeypatch: pytest.MonkeyPatch, mode: str = "") -> None:
    def spawn(site: Site, **unused: object) -> subprocess.Popen[bytes]:
        arguments = [sys.executable, "-c", PEER, str(site.folder), mode]
        process = start_process(arguments, site.output_path)
        wait_ready(site, process, 20.0)
        return process

    monkeypatch.setattr(sessions, "spawn_peer", spawn)


def script(code: str) -> TrainerCommand:
    return TrainerCommand([sys.executable, "-c", code], script=True)


WAITS = script("import sys; sys.stdin.read()")


def run(
    site: Site, output: Recorder, trainer: TrainerCommand | None, act: list[Any]
) -> tuple[int, MemberSession]:
    """Run a session; ``act`` is done on another thread: names to wait for, signals, calls."""
    session = MemberSession(site, output, trainer)
    session.start()

    def work() -> None:
        for step in act:
            if isinstance(step, signal.Signals):
                os.kill(os.getpid(), step)
            elif isinstance(step, str):
                output.wait_for(step)
            else:
                step()

    helper = threading.Thread(target=work)
    helper.start()
    code = session.run()
    helper.join(20)
    assert not helper.is_alive()
    return code, session


def test_it_ends_when_the_run_does(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    use_stand_in(monkeypatch)
    output = Recorder()

    def end() -> None:
        with site.connect() as client:
            client.call("end", {"code": 0})

    monkeypatch.setattr(sessions, "TRAINER_END_S", 0.2)
    code, session = run(site, output, WAITS, ["peer_started", end, "run_ended"])
    assert code == 0
    processes = session._supervisor.processes
    assert processes["trainer"].process.poll() == -signal.SIGTERM
    assert processes["peer"].process.poll() == 0


@pytest.mark.parametrize(("code", "exit_code"), [(0, 0), (3, 16)])
def test_it_leaves_when_the_script_is_done(
    site: Site, monkeypatch: pytest.MonkeyPatch, code: int, exit_code: int
) -> None:
    use_stand_in(monkeypatch)
    trainer = script(f"import os, sys; assert os.environ['SWARMTRAIN_SITE']; sys.exit({code})")
    got, session = run(site, Recorder(), trainer, ["leaving"])
    assert got == exit_code
    assert session._supervisor.processes["peer"].process.poll() == 0


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        (
            "error: run key stages = 3\\nwhy:   2 layers\\ndo:    choose a divisor of 2\\n",
            ["error: run key stages = 3", "  why: 2 layers", "  do:  choose a divisor of 2"],
        ),
        ("Traceback\\nBoom\\n", ["error: the trainer ended", "  why: Traceback | Boom"]),
    ],
)
def test_a_trainer_that_cannot_go_on_is_heard(
    site: Site, monkeypatch: pytest.MonkeyPatch, printed: str, said: list[str]
) -> None:
    use_stand_in(monkeypatch)
    output = Recorder()
    code = f"import sys; sys.stderr.write('{printed}'); sys.exit(3)"
    exit_code, _ = run(site, output, TrainerCommand([sys.executable, "-c", code]), [])
    assert exit_code == 3
    found = [line for line in output.notes if line.startswith(("error:", "  why:", "  do:"))]
    assert found[: len(said)] == said


def test_the_first_ctrl_c_is_polite(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    use_stand_in(monkeypatch)
    output = Recorder()
    code, _ = run(site, output, None, ["peer_started", signal.SIGINT, "leaving"])
    assert code == 0
    assert output.notes == ["leaving after this round; Ctrl-C again to leave now"]


def test_the_second_ctrl_c_does_not_wait(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    use_stand_in(monkeypatch, "slow")
    output = Recorder()
    steps = ["peer_started", signal.SIGINT, "leaving", signal.SIGINT, "leaving"]
    code, session = run(site, output, None, steps)
    assert code == 130
    assert output.notes[-1] == "leaving now; Ctrl-C again to kill"
    assert session._supervisor.processes["peer"].process.poll() == 0


def test_sigterm_is_polite_with_a_deadline(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    use_stand_in(monkeypatch, "slow")
    code, _ = run(site, Recorder(), None, ["peer_started", signal.SIGTERM, "leaving", "leaving"])
    assert code == 143


def test_a_killed_peer_process_comes_back_and_is_followed_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_stand_in(monkeypatch)
    output = Recorder()
    pids: list[int] = []

    def kill() -> None:
        process = session._supervisor.processes["peer"].process
        pids.append(process.pid)
        process.kill()

    session = MemberSession(site, output, None)
    session.start()

    def work() -> None:
        output.wait_for("peer_started")
        kill()
        output.wait_for("process_restarted")
        output.wait_for("peer_started")
        os.kill(os.getpid(), signal.SIGINT)

    helper = threading.Thread(target=work)
    helper.start()
    assert session.run() == 0
    helper.join(20)
    assert session._supervisor.processes["peer"].process.pid != pids[0]


def test_the_preset_trainer_has_no_secret_in_its_arguments(site: Site) -> None:
    command = preset_trainer(site, "cpu")
    assert command.arguments[1:] == [
        "-m",
        "swarmtrain.training.trainer",
        str(site.folder),
        "--device",
        "cpu",
    ]
    assert not command.script


def test_steps_and_checkpoints_of_stages_are_told_now_and_then(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Told(Output):
        """Remembers what it was given to show."""

        def __init__(self) -> None:
            super().__init__()
            self.records: list[tuple[str, int]] = []

        def event(self, record: Record) -> None:
            self.records.append((record["name"], record.get("step", record.get("round"))))

    now = [100.0]
    monkeypatch.setattr(sessions.host, "mono_s", lambda: now[0])
    output = Told()
    session = MemberSession(site, output, None)
    for number in range(6):
        session._tell({"name": "step_committed", "severity": "info", "step": number})
        now[0] += 0.7
    for _ in range(4):
        session._tell({"name": "checkpoint_saved", "severity": "info", "round": 6})
    session._tell({"name": "step_committed", "severity": "info", "step": 6})
    session._tell({"name": "run_ended", "severity": "info", "reason": "max_rounds"})
    assert output.records == [
        ("step_committed", 0),
        ("step_committed", 3),
        ("checkpoint_saved", 6),
        ("step_committed", 5),
        ("step_committed", 6),
        ("run_ended", None),
    ]
