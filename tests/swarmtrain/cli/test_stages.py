"""What the command line says of a pipeline: coverage, steps, and trouble with an exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from swarmtrain.cli.main import app
from swarmtrain.cli.query import health
from swarmtrain.cli.stages import seconds, span, stage_health, status_fields
from tests.swarmtrain.cli.rig import Rig
from tests.swarmtrain.fake_pipeline import FakePipeline


def invoke(folder: Path, run: FakePipeline, *arguments: str) -> Result:
    rig = Rig(folder)
    try:
        rig.run = rig.backend.run = run
        return CliRunner().invoke(app, [*arguments, "--home", str(rig.home)])
    finally:
        rig.close()


def test_status_shows_every_stage_and_who_serves_it(tmp_path: Path) -> None:
    result = invoke(tmp_path, FakePipeline(), "status")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert "steps    24 committed, 1 aborted, one every 3.00 s, 5.3 micro-batches/s" in lines
    assert "drivers  anna-laptop, cloud-spot-7" in lines
    assert "stages   3 and the ends, one step together, int8 between them" in lines
    ends = next(line for line in lines if line.startswith("ends "))
    assert ends.split()[:5] == ["ends", "ok", "3", "of", "2+"]
    assert ends.endswith("anna-laptop, cloud-spot-7, emil-a6000")
    assert not any(line.startswith("overlap") for line in lines), "it means nothing here"
    assert lines[-1] == (
        "stage 2 was rebuilt before step 9 in 4.50 s from average "
        "(average 3.204, copy-left 3.391, near-identity-0.1 3.266)"
    )


@pytest.mark.parametrize(
    ("run", "word", "exit_code", "why"),
    [
        (FakePipeline(), "healthy", 0, "every member is connected"),
        (FakePipeline(lost=2), "stalled", 21, "stage 2 is lost: dora-lab rebuilds it"),
    ],
)
def test_a_lost_stage_stalls_the_run(
    run: FakePipeline, word: str, exit_code: int, why: str
) -> None:
    found = health(run.status())
    assert found[:2] == (word, exit_code)
    assert why in found[2]


def test_an_endangered_stage_is_told_of(tmp_path: Path) -> None:
    run = FakePipeline(away=5)
    pipeline = run.status()["pipeline"]
    assert stage_health(pipeline) == (
        "degraded",
        "stage 3 is endangered: 1 member in reach, at least 2 wanted",
    )
    answer = run.status() | {"connected": 5}
    assert health(answer)[:2] == ("degraded", 20), "also if every link but that one is there"
    result = invoke(tmp_path, run, "status")
    assert result.exit_code == 20
    line = next(one for one in result.stdout.splitlines() if one.startswith("stage 3"))
    assert "endangered" in line
    assert line.endswith("cloud-spot-7, fritz-mini (away)")


def test_peers_show_their_stages(tmp_path: Path) -> None:
    run = FakePipeline()
    run.names[5] = "evil\x1b[2Jname"
    result = invoke(tmp_path, run, "peers")
    assert "\x1b" not in result.stdout
    lines = result.stdout.splitlines()
    assert lines[0].split()[3:8] == ["stages", "busy", "queued", "drives", "link"]
    assert lines[1].split()[2:6] == ["steward", "ends,", "1", "72"]
    assert lines[1].split()[7:9] == ["0", "5"]
    assert lines[2].split()[:4] == ["3c3c3c3c", "bob-3090", "leader", "2"]


def test_rounds_are_steps(tmp_path: Path) -> None:
    result = invoke(tmp_path, FakePipeline(), "rounds")
    header, *lines = result.stdout.splitlines()
    assert header.split()[:5] == ["step", "outcome", "micro-batches", "workers", "loss"]
    done = next(line for line in lines if line.startswith("23 "))
    assert done.split()[:4] == ["23", "committed", "16", "6"]
    assert done.split()[5:9] == ["2.80", "s", "600", "ms"]
    document = json.loads(invoke(tmp_path / "b", FakePipeline(), "rounds", "--json").stdout)
    assert document["rounds"][0]["channel"] == "steps"


def test_times() -> None:
    assert (seconds(0.0123), seconds(1.25), span(None, 1.0)) == ("12 ms", "1.25 s", "-")
    assert span(2.0, 1.0) == "0 ms", "clocks may step back"


def test_stages_that_step_by_themselves_have_rounds() -> None:
    run = FakePipeline()
    pipeline = run.status()["pipeline"] | {"mode": "diloco", "step": 0, "step_s": None}
    fields = status_fields(pipeline)
    assert fields["rounds"] == "of all stages: 24 committed, 1 aborted, 5.3 micro-batches/s"
    assert fields["now"] == "computing"
    assert "steps" not in fields
