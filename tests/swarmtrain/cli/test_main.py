"""The command as a process: start-up, help, errors in three lines, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from swarmtrain.cli.main import app
from swarmtrain_peer.spawn import child_environment

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = (
    "demo", "init", "up", "seed", "join", "leave", "status", "peers", "rounds", "events",
    "doctor", "logs", "top", "generate", "export", "run", "ban", "allow", "ticket",
    "ckpt", "config", "dashboard", "version",
)  # fmt: skip


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "swarmtrain", *arguments],
        env=child_environment(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_help_loads_neither_torch_nor_numba_nor_numpy() -> None:
    code = (
        "import sys; from swarmtrain.cli.main import app\n"
        "try: app(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'numba', 'numpy', 'starlette', 'uvicorn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=child_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all(f" {name} " in done.stdout for name in COMMANDS)


def test_every_command_has_help() -> None:
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    names |= {str(group.name) for group in app.registered_groups}
    assert names == set(COMMANDS)
    for command in app.registered_commands:
        assert command.callback.__doc__


def test_an_error_is_three_lines_and_a_code(tmp_path: Path) -> None:
    done = run("status", "--home", str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0] == "error: no peer process is running"
    assert lines[1].startswith("  why: 0 stopped site(s) in")
    assert lines[2] == "  do:  start one with `swarmtrain join TICKET` or `swarmtrain up`"


def test_with_json_an_error_is_also_an_object(tmp_path: Path) -> None:
    done = run("peers", "--json", "--home", str(tmp_path))
    assert done.returncode == 2
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["ok"] is False
    assert document["error"]["code"] == "UsageError"
    assert document["error"]["exit_code"] == 2


def test_unknown_commands_and_options_are_usage_errors() -> None:
    assert run("jion").returncode == 2
    assert run("status", "--nonsense").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "exit_code", "text"),
    [
        (("join",), 2, "no ticket"),
        (("join", "swarm://h:1/abc#x"), 3, "malformed ticket"),
        (("join", "--ticket-file", "/nonexistent/ticket"), 2, "No such file"),
        (("config", "check", "/nonexistent/run.toml"), 3, "No such file"),
        (("ticket", "create", "--role", "king"), 2, "no such role"),
        (("ticket", "create", "--expires", "soon"), 2, "not a duration"),
    ],
)
def test_mistakes_are_told_at_the_edge(
    tmp_path: Path, arguments: tuple[str, ...], exit_code: int, text: str
) -> None:
    done = run(*arguments, SWARMTRAIN_HOME=str(tmp_path))
    assert done.returncode == exit_code
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 3


def test_every_exit_code_has_a_page() -> None:
    from swarmtrain.cli import output
    from swarmtrain_peer.control import _error_classes

    codes = {kind.exit_code for kind in _error_classes().values()}
    codes |= {value for name, value in vars(output).items() if name.startswith("EXIT_")}
    pages = {page.stem for page in (ROOT / "docs" / "exit-codes").glob("[0-9]*.md")}
    assert {str(code) for code in codes} | {"0"} <= pages
