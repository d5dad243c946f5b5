"""What the documents tell people to type exists: commands, flags, make targets, links, settings."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import typer

from swarmtrain.cli.main import app
from swarmtrain_peer.config import load_settings

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```(?:bash|sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`((?:swarmtrain|make) [^`]+)`")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
TARGETS = frozenset(
    re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
)


def documents() -> list[Path]:
    """Every Markdown page that git would carry."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    ).stdout
    return [ROOT / name for name in sorted(listed.split("\0")) if name and (ROOT / name).is_file()]


def typed_lines(text: str) -> Iterator[str]:
    """Lines of shell blocks, and commands quoted in running text."""
    for block in FENCE.findall(text):
        yield from (line.strip().removeprefix("$ ") for line in block.splitlines())
    yield from SPAN.findall(text)


@lru_cache(maxsize=1)
def commands() -> Any:
    """All commands as click has them; typer may bring its own copy of click."""
    return typer.main.get_command(app)


def complaint(line: str) -> str:
    """What is wrong with a typed line, or "" if it names only things that exist."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return f"{line!r} is not a shell line"
    while words and re.match(r"^[A-Z_]+=", words[0]):
        words.pop(0)
    if words[:1] == ["make"]:
        wrong = [word for word in words[1:] if "=" not in word and word not in TARGETS]
        return f"{line!r}: no target {wrong[0]}" if wrong else ""
    if words[:1] != ["swarmtrain"] or words[1:2] in (["…"], ["COMMAND"]):
        return ""
    command = commands()
    rest = words[1:]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        if name not in command.commands:
            return f"{line!r}: no command {name}"
        command = command.commands[name]
    known = {"--help", "-h"}
    for parameter in command.params:
        known.update(parameter.opts, parameter.secondary_opts)
    for word in rest:
        if word == "--":
            break
        if word.startswith("-") and word != "-" and word.split("=")[0] not in known:
            return f"{line!r}: no option {word}"
    return ""


def test_every_quoted_command_exists() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {found}"
        for path in documents()
        for line in typed_lines(path.read_text(encoding="utf-8"))
        if (found := complaint(line))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "swarmtrain no-such-command",
        "swarmtrain join --no-such-flag",
        "swarmtrain ticket no-such-command",
        "make no-such-target",
        "swarmtrain join 'unclosed",
    ],
)
def test_a_command_that_does_not_exist_is_noticed(line: str) -> None:
    assert complaint(line)


@pytest.mark.parametrize(
    "line",
    [
        "make test",
        "swarmtrain join TICKET -- python train.py --any-flag",
        "swarmtrain ticket create --vote",
    ],
)
def test_a_command_that_exists_is_accepted(line: str) -> None:
    assert complaint(line) == ""


def test_every_command_of_the_makefile_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    lines = re.findall(r"^\t\$\(BIN\)/(swarmtrain .*)$", makefile, re.MULTILINE)
    assert lines
    assert [found for line in lines if (found := complaint(line))] == []


def test_the_quick_start_is_two_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert FENCE.findall(readme)[0].split("\n") == ["make demo", "make test", ""]


def broken_links(path: Path, text: str) -> list[str]:
    """Relative links of a page that lead nowhere."""
    return [
        target
        for target in LINK.findall(text)
        if not target.startswith(("http:", "https:", "mailto:", "swarm:"))
        and not (path.parent / target).exists()
    ]


def test_links_between_documents_lead_somewhere(tmp_path: Path) -> None:
    assert broken_links(tmp_path / "a.md", "[x](missing.md) [y](https://example.org)") == [
        "missing.md"
    ]
    wrong = {
        str(path.relative_to(ROOT)): found
        for path in documents()
        if (found := broken_links(path, path.read_text(encoding="utf-8")))
    }
    assert not wrong


def test_the_example_settings_are_the_defaults() -> None:
    path = ROOT / "peer" / "peer.toml"
    given, default = load_settings(path).peer, load_settings(None).peer
    assert given == default
    assert set(tomllib.loads(path.read_text(encoding="utf-8"))) == {
        "peer",
        "net",
        "dashboard",
        "log",
    }


def test_the_service_and_the_containers_use_real_commands() -> None:
    unit = (ROOT / "peer" / "swarmtrain-peer.service").read_text(encoding="utf-8")
    started = re.findall(r"^ExecStart=/usr/bin/env (.*)$", unit, re.MULTILINE)
    compose = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    seed = compose.split("  seed:")[1].split("  ticket:")[0]
    given = seed.split("command:")[1].split("ports:")[0]
    words = re.findall(r"^      - (\S+)$", given, re.MULTILINE)
    trainer = re.findall(r"command: \[(.*)\]", compose)[-1].replace('"', "").replace(",", "")
    image = (ROOT / "peer" / "Dockerfile").read_text(encoding="utf-8")
    defaults = re.findall(r"^CMD \[(.*)\]", image, re.MULTILINE)
    lines = [
        *started,
        "swarmtrain " + " ".join(words),
        f"swarmtrain {trainer}",
        *(f"swarmtrain {line.replace(chr(34), '').replace(',', '')}" for line in defaults),
    ]
    assert len(lines) == 5
    assert [found for line in lines if (found := complaint(line))] == []


def test_the_member_without_training_in_the_readme_runs(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    code = next(block for block in blocks if "st.Peer.start()" in block)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={
            "PYTHONPATH": os.pathsep.join(
                str(ROOT / folder) for folder in (".", "peer", "protocols")
            ),
            "SWARMTRAIN_HOME": str(tmp_path),
        },
    )
    assert done.returncode == 0, done.stderr
    assert "[1. 1. 1." in done.stdout


# --- what tests/README.md says of the tests ---

NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`")
SWARMS_MAX = 12
NO_SITE = frozenset({"test_proxy.py"})
"""Files of tools of the swarms, which are tried alone."""
ONE_SITE = frozenset(
    {
        "test_bad_tickets_end_with_their_exit_codes_and_change_nothing",
        "test_a_dead_peer_process_is_started_again_and_its_trainer_goes_on",
    }
)


def named_tests(heading: str) -> list[tuple[str, str]]:
    """(file, test or "") of every row below a heading of tests/README.md."""
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `") or " | `" in line]
    return [found for row in rows for found in NAMED.findall(row)]


def quick_tests(path: Path) -> list[str]:
    """Test functions of a file that are not marked slow, neither alone nor with the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    marks = [
        ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    ]
    if any("mark.slow" in mark for mark in marks):
        return []
    return [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and "pytest.mark.slow" not in [ast.unparse(mark) for mark in node.decorator_list]
    ]


def test_every_test_that_the_readme_of_tests_names_exists() -> None:
    wrong = []
    for heading in ("Real swarms of `make test`", "Bad input"):
        listed = named_tests(heading)
        assert len(listed) > 9
        for file, name in listed:
            path = ROOT / file
            if not path.is_file() or (name and f"def {name}(" not in path.read_text()):
                wrong.append(f"{file}::{name}")
    assert not wrong, wrong


def test_make_test_starts_at_most_a_dozen_real_swarms() -> None:
    listed = named_tests("Real swarms of `make test`")
    assert len(listed) <= SWARMS_MAX
    whole = {file for file, name in listed if not name}
    for file, name in listed:
        assert not name or name in quick_tests(ROOT / file), f"{name} is slow"
    unlisted = [
        f"{path.name}::{name}"
        for path in sorted((ROOT / "tests" / "swarm").glob("test_*.py"))
        if f"tests/swarm/{path.name}" not in whole and path.name not in NO_SITE
        for name in quick_tests(path)
        if (f"tests/swarm/{path.name}", name) not in listed and name not in ONE_SITE
    ]
    assert not unlisted, f"mark them slow, or list them in tests/README.md: {unlisted}"
