"""``swarmtrain generate``: what is asked, what is printed, and exit codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from swarmtrain.cli.main import app
from swarmtrain_peer.control import error_to_dict
from swarmtrain_peer.controlserver import ControlConnection
from swarmtrain_protocols.errors import NoWorker, PromptTooLong, RunOver, SwarmError, UsageError
from tests.swarmtrain.cli.rig import Rig

BEGUN = {"id": 0, "run": "ab" * 32, "name": "tiny-lm", "prompt_tokens": 4, "counts": "steps"}
PIECES = [
    {"token": 104, "text": "h", "version": 3},
    {"token": 195, "text": "", "version": 3},
    {"token": 164, "text": "ä", "version": 4},
]
LAST = {
    "finish": "length",
    "text": "hä",
    "tokens": [104, 195, 164],
    "versions": [[3, 2], [4, 1]],
}


class Scripted:
    """Answers ``generate`` with these pushes, or with an error."""

    def __init__(self, *pushes: dict[str, Any], error: SwarmError | None = None) -> None:
        self.pushes = pushes
        self.error = error
        self.asked: list[dict[str, Any]] = []

    async def call(
        self, name: str, args: dict[str, Any], connection: ControlConnection
    ) -> dict[str, Any]:
        assert name == "generate"
        self.asked.append(args)
        if self.error is not None:
            raise self.error
        for push in self.pushes:
            connection.push({"event": "generated", "id": 0, **push})
        return BEGUN


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()


def invoke(rig: Rig, backend: Scripted, *arguments: str, **more: Any) -> Result:
    rig.server._backend = backend
    return CliRunner().invoke(app, ["generate", *arguments, "--home", str(rig.home)], **more)


def test_text_is_printed_as_it_comes(rig: Rig) -> None:
    backend = Scripted(*PIECES, LAST)
    result = invoke(
        rig, backend, "-p", "def ", "-n", "3", "-t", "0.8", "--seed", "7", "--stop", "x"
    )
    assert result.exit_code == 0 and result.stdout == "hä\n"
    assert backend.asked == [
        {
            "prompt": "def ",
            "max_tokens": 3,
            "temperature": 0.8,
            "top_p": 1.0,
            "top_k": 0,
            "seed": 7,
            "stop": ["x"],
            "timeout_s": 30.0,
        }
    ]


def test_one_object_for_programs(rig: Rig) -> None:
    result = invoke(rig, Scripted(*PIECES, LAST), "-p", "def ", "--json")
    document = json.loads(result.stdout)
    assert document == {
        "ok": True,
        "text": "hä",
        "tokens": [104, 195, 164],
        "finish_reason": "length",
        "usage": {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7},
        "versions": [{"version": 3, "tokens": 2}, {"version": 4, "tokens": 1}],
        "counts": "steps",
        "run": "ab" * 32,
    }


def test_prompts_come_from_a_file_standard_input_or_as_ids(rig: Rig, tmp_path: Path) -> None:
    backend = Scripted(LAST)
    (tmp_path / "prompt.txt").write_text("aus der Datei")
    invoke(rig, backend, "--prompt-file", str(tmp_path / "prompt.txt"))
    invoke(rig, backend, "-p", "-", input="from a pipe")
    result = invoke(rig, Scripted(*PIECES, LAST), "--tokens", "1,2 3")
    assert result.stdout == "104 195 164 \n"
    invoke(rig, backend, "--tokens", "1,2 3")
    given = [asked.get("prompt", asked.get("tokens")) for asked in backend.asked]
    assert given == ["aus der Datei", "from a pipe", [1, 2, 3]]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("-p", "a", "--tokens", "1"),
        ("--tokens", "one"),
        ("--prompt-file", "/nowhere/at/all"),
    ],
)
def test_prompts_that_cannot_be_meant(rig: Rig, arguments: tuple[str, ...]) -> None:
    backend = Scripted(LAST)
    result = invoke(rig, backend, *arguments)
    assert isinstance(result.exception, UsageError) and result.exception.exit_code == 2
    assert backend.asked == []


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (PromptTooLong("a prompt of 65 tokens", "the model's context is 64"), 2),
        (RunOver("the run is over", "max_rounds"), 22),
        (NoWorker("nobody serves stage 2"), 75),
    ],
)
def test_refusals_keep_their_type_and_exit_code(
    rig: Rig, error: SwarmError, exit_code: int
) -> None:
    at_once = invoke(rig, Scripted(error=error), "-p", "a")
    halfway = invoke(rig, Scripted(*PIECES, {"error": error_to_dict(error)}), "-p", "a")
    assert halfway.stdout == "hä"
    for result in (at_once, halfway):
        assert type(result.exception) is type(error)
        assert getattr(result.exception, "exit_code", 0) == exit_code
