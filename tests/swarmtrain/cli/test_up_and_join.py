"""README's real thing, as it is typed: ``swarmtrain up`` on one machine, ``join`` on another."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from swarmtrain_peer.spawn import child_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

RUN = """
[run]
name = "typed"
start_peers = 2
[train]
model = { d_model = 32, layers = 1, heads = 2, context = 64 }
batch_size = 4
inner_steps = 5
overlap = "off"
[comm]
grace_s = 2.0
"""
WAIT_S = 90.0


class Command:
    """A command with a home of its own, and what it prints."""

    def __init__(self, home: Path, *arguments: str, stdin: str = "") -> None:
        self.home = home
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "swarmtrain", *arguments],
            env=child_environment({"SWARMTRAIN_HOME": str(home)}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(stdin)
        self.process.stdin.close()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def wait(self, what: str, found: Callable[[], Any]) -> Any:
        end_s = time.monotonic() + WAIT_S
        while not (result := found()):
            assert time.monotonic() < end_s, f"{what}: not in time\n{self.text}"
            assert self.process.poll() is None, f"{what}: it ended\n{self.text}"
            threading.Event().wait(0.1)
        return result

    def events(self, name: str) -> list[dict[str, Any]]:
        """What the site of this home has logged."""
        found = [
            json.loads(line)
            for file in sorted(self.home.glob("runs/*/events.jsonl"))
            for line in file.read_text().splitlines(keepends=True)
            if line.endswith("\n")
        ]
        return [record for record in found if record["name"] == name]

    def kill_all(self) -> None:
        """kill -9: the command, its peer process and its trainer at once."""
        family = [self.process, *psutil.Process(self.process.pid).children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.send_signal(signal.SIGKILL)
        self.process.wait(WAIT_S)

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(WAIT_S)


@contextlib.contextmanager
def running(*commands: Command) -> Iterator[None]:
    try:
        yield
    finally:
        for command in commands:
            if command.process.poll() is None:
                command.kill_all()


def ask(home: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "swarmtrain", *arguments, "--json"],
        env=child_environment({"SWARMTRAIN_HOME": str(home)}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def states(command: Command) -> dict[int, str]:
    return {r["round"]: r["state_hash"] for r in command.events("state_applied")}


def test_a_killed_joiner_returns_and_both_end_with_the_same_model(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    one, two = tmp_path / "one", tmp_path / "two"
    up = Command(one, "up", str(tmp_path / "run.toml"), "--listen", "127.0.0.1:0", "--dashboard=")
    with running(up):
        ticket = up.wait("a ticket", lambda: re.search(r"swarm://\S+#[\w-]+", up.text))[0]
        entered = ["join", "-", "--listen", "127.0.0.1:0"]
        first = Command(two, *entered, stdin=ticket + "\n")
        with running(first):
            first.wait("a round of both", lambda: max(states(first), default=0) >= 2)
            opened = len(up.events("round_opened"))
            up.wait("the next round", lambda: len(up.events("round_opened")) > opened)
            first.kill_all()
            committed = len(up.events("round_committed"))
            up.wait("rounds without it", lambda: len(up.events("round_committed")) > committed + 1)
        second = Command(two, *entered, stdin=ticket + "\n")
        with running(second):
            since = up.events("round_committed")[-1]["round"] + 3
            second.wait("its return", lambda: max(states(second), default=0) > since)
            people = ask(one, "peers")["peers"]
            assert sorted(p["connected"] for p in people) == [True, True]
            assert ask(two, "status")["health"] in ("healthy", "degraded")
            assert second.interrupt() == 0, second.text  # a clean leave
        left = up.wait("its farewell", lambda: up.events("member_left"))
        assert left[-1]["reason"] == "leave"
        ours, theirs = states(up), states(second)
        both = sorted(set(ours) & set(theirs))
        assert len(both) > 5 and all(ours[number] == theirs[number] for number in both)
        assert not second.events("rewound")
        assert up.interrupt() == 0, up.text
