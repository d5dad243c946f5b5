"""docs/operations.md, as it is typed: every command of the page, in its order, on its machine."""

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
from tests.swarmtrain.cli.test_operations_page import MACHINES, steps

STAYS = ("up", "join", "seed")
"""Commands that stay in the foreground of their terminal."""
HEALTH = (0, 20, 21)
WAIT_S = 150.0
CAPITALS = re.compile(r"\b(?:TICKET|ID|KEY|MEMBER|ROUND|FUTURE)\b")


class Terminal:
    """One machine: a home of its own, and the commands that stay in the foreground there."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = {
            "SWARMTRAIN_HOME": str(home),
            "SWARMTRAIN_LISTEN": "127.0.0.1:0",
            "SWARMTRAIN_DASHBOARD__BIND": "",
        }
        self.process: subprocess.Popen[str] | None = None
        self.lines: list[str] = []

    def start(self, words: list[str], folder: Path) -> None:
        assert self.process is None or self.process.poll() is not None, "it still runs"
        self.lines = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "swarmtrain", *words],
            env=child_environment(self.environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.lines.extend(iter(process.stdout.readline, ""))

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def run(self, words: list[str], folder: Path) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "swarmtrain", *words],
            env=child_environment(self.environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    def ask(self, *words: str) -> dict[str, Any]:
        code, text = self.run([*words, "--json"], self.home)
        assert code in HEALTH, text
        found: dict[str, Any] = json.loads(text.splitlines()[-1])
        return found

    def kill(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        for one in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                one.send_signal(signal.SIGKILL)


class Walk:
    """The three machines, and what the words in capitals stand for at the moment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machines = {name: Terminal(folder / name) for name in MACHINES}
        for terminal in self.machines.values():
            terminal.home.mkdir()
        self.ticket = ""
        self.bobs = ""
        self.member = ""

    @property
    def first(self) -> Terminal:
        return self.machines["first"]

    def wait(self, what: str, found: Callable[[], Any]) -> Any:
        end_s = time.monotonic() + WAIT_S
        while not (result := found()):
            told = "\n".join(f"--- {name}\n{t.text}" for name, t in self.machines.items())
            assert time.monotonic() < end_s, f"{what}: not in time\n{told}"
            threading.Event().wait(0.2)
        return result

    def front(self) -> int:
        channels = self.first.ask("status")["channels"]
        return int(channels["train/0/0"]["round"]) if channels else 0

    def stands_for(self, word: str) -> str:
        """What a person would fill in."""
        if word == "TICKET":
            return self.ticket
        if word == "ID":
            return str(self.first.ask("ticket", "list")["tickets"][0]["id"])[:8]
        if word == "KEY":
            return "c0" * 32
        if word == "MEMBER":
            self.member = self.member or self.machines["second"].ask("status")["site"][:16]
            return self.member
        if word == "ROUND":
            return str(max(one["round"] for one in self.first.ask("run", "rollback")["rounds"]))
        return str(self.front() + 40)

    def do(self, machine: str, words: list[str]) -> None:
        terminal = self.machines[machine]
        if words[0] == "run" and words[1] == "rollback" and words[-1] != "rollback":
            time_to_go_back(self)
        filled = [CAPITALS.sub(lambda m: self.stands_for(m[0]), word) for word in words]
        if words[0] in STAYS:
            if words[0] == "join" and self.bobs:
                filled = ["join", self.bobs]  # the same command as the first time
            terminal.start(filled, self.folder)
            self.settle(machine, words[0])
            return
        code, text = terminal.run(filled, self.folder)
        allowed = HEALTH if words[0] == "status" else (0,)
        assert code in allowed, f"{machine}$ swarmtrain {' '.join(filled)}\n{code}: {text}"
        self.after(words, text)

    def settle(self, machine: str, command: str) -> None:
        """Wait for what a person would wait for before typing on."""
        terminal = self.machines[machine]
        if command == "up":
            found = re.compile(r"swarm://\S+#[\w-]+")
            self.wait("a ticket", lambda: found.search(terminal.text))
            self.wait("the first rounds", lambda: self.front() >= 1)
            return
        self.bobs = self.bobs or self.ticket
        members = 2 if command == "join" else 3
        self.wait("it is in", lambda: self.first.ask("status")["members"] >= members)
        if command == "join":
            at = self.front()
            self.wait("rounds of both", lambda: self.front() >= at + 4)

    def after(self, words: list[str], text: str) -> None:
        made = re.search(r"swarm://\S+#[\w-]+", text)
        if words[:2] == ["ticket", "create"]:
            assert made is not None, text
            self.ticket = made[0]
        elif words[0] == "init":
            small(self.folder / "my-run" / "run.toml")
        elif words[:2] == ["run", "handover"]:
            second = self.machines["second"]
            self.wait("the new founder", lambda: second.ask("status")["is_founder"])
        elif words[0] == "ban" and "--reason" in words:
            ended = self.machines["second"].process
            assert ended is not None and ended.wait(WAIT_S) == 6


def time_to_go_back(walk: Walk) -> None:
    walk.wait("a state to go back to", lambda: walk.first.ask("run", "rollback")["rounds"])


def small(run_file: Path) -> None:
    """A model and rounds that a busy test machine gets through; the page says to look at it."""
    text = run_file.read_text()
    sizes = "model = { d_model = 32, layers = 1, heads = 2, context = 64 }\n"
    text = text.replace("[train]\n", "[train]\n" + sizes).replace(
        "inner_steps = 20", "inner_steps = 10"
    )
    run_file.write_text(text + "\n[checkpoint]\nevery_rounds = 3\n")


@contextlib.contextmanager
def walking(folder: Path) -> Iterator[Walk]:
    walk = Walk(folder)
    try:
        yield walk
    finally:
        for terminal in walk.machines.values():
            terminal.kill()


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_the_page_can_be_walked_through(tmp_path: Path) -> None:
    with walking(tmp_path) as walk:
        for machine, words in steps():
            walk.do(machine, words)
        for name, terminal in walk.machines.items():
            assert terminal.process is not None
            assert terminal.process.wait(WAIT_S) == 0, f"{name}\n{terminal.text}"
        model = tmp_path / "my-model"
        assert (model / "config.json").is_file() and (model / "model.safetensors").is_file()
        events = list(walk.machines["second"].home.glob("runs/*/events.jsonl"))
        names = {json.loads(line)["name"] for line in events[0].read_text().splitlines()}
        assert {"paused", "resumed", "config_changed", "rewound", "founder_changed"} <= names
        assert {"allow_changed", "ticket_revoked", "run_ended"} <= names
