"""docs/operations.md: every command parses; `tests/swarm/test_operations.py` executes them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import typer

from swarmtrain.cli.main import app

PAGE = Path(__file__).resolve().parents[3] / "docs" / "operations.md"
BLOCK = re.compile(r"(?:<!-- (\w+) -->\n)?```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
MACHINES = ("first", "second", "third")


def steps() -> list[tuple[str, list[str]]]:
    """(machine, words of the command) of every command on the page, in order."""
    found = []
    for machine, block in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            assert words[0] == "swarmtrain", line
            found.append((machine, words[1:]))
    return found


def test_every_command_is_typed_at_a_machine_and_parses() -> None:
    """In this process, and nothing is executed: names, options, types and arguments."""
    command: Any = typer.main.get_command(app)
    samples = {"ROUND": "7", "FUTURE": "7"}
    topics = set()
    for machine, words in steps():
        assert machine in MACHINES, words
        given = [samples.get(word, word) for word in words]
        context = command.make_context("swarmtrain", list(given))
        current, rest = command, given
        while hasattr(current, "commands"):
            current, rest = current.commands[rest[0]], rest[1:]
        current.make_context(" ".join(words), list(rest), parent=context)
        topics.add(" ".join(words[: 2 if words[0] in ("run", "ticket", "allow", "ckpt") else 1]))
    asked = {"up", "ticket create", "join", "status", "top", "logs", "doctor", "run pause"}
    asked |= {"run resume", "run set", "run rollback", "export", "run handover", "run stop"}
    asked |= {"ticket list", "ticket revoke", "allow add", "ban", "config", "leave"}
    assert asked <= topics, "start, invite, watch, pause, rewind, export, hand over"
