"""JSON logs: one schema for every line, in the words of docs/json.md, and no secret in any."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from swarmtrain.cli.output import Output, record_of, wants_json_log
from swarmtrain_peer.event_kinds import KINDS
from swarmtrain_peer.events import RECORD_FIELDS
from swarmtrain_peer.spawn import child_environment
from swarmtrain_protocols.errors import DataUnavailable

ROOT = Path(__file__).resolve().parents[3]
SECRET = "c2VjcmV0LXRoYXQtbm9ib2R5LW1heS1zZWU"
TICKET = f"swarm://127.0.0.1:4433/{'ab' * 32}#{SECRET}"


def checked(line: str) -> dict[str, Any]:
    """A line of a log, which has the form that the page promises."""
    record: dict[str, Any] = json.loads(line)
    assert list(record)[: len(RECORD_FIELDS)] == list(RECORD_FIELDS), line
    kind = KINDS[record["name"]]
    assert (record["v"], record["code"]) == (1, kind.code)
    assert record["severity"] in ("info", "warning", "error")
    assert record["seq"] >= 0 and record["wall_s"] > 1e9 and record["mono_s"] >= 0
    assert all(field in record for field in kind.required), line
    for key in ("generation", "round", "attempt"):
        assert record[key] is None or isinstance(record[key], int)
    assert not re.search(r"swarm://\S*#[^.\s\"]", line), "a ticket's secret"
    return record


def test_every_line_of_every_kind_has_the_form(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(log_format="json")
    output.note(f"joined with {TICKET}")
    output.progress("nothing that a log needs")
    output.event({"name": "process_restarted", "severity": "warning", "process": "peer"} | RESTART)
    output.event(record_of("round_committed", root="ab", round=3) | {"seq": 9})
    output.error(DataUnavailable("corpus", f"not with {TICKET}", "try again"))
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [checked(line) for line in captured.err.splitlines()]
    assert [line["name"] for line in lines] == [
        "note",
        "process_restarted",
        "round_committed",
        "command_failed",
    ]
    assert lines[0]["text"].endswith("#...") and SECRET not in captured.err
    assert (lines[3]["exit_code"], lines[3]["severity"]) == (10, "error")
    assert (lines[2]["seq"], lines[2]["round"], lines[2]["channel"]) == (9, 3, None)


RESTART = {"exit_code": 1, "restarts": 1, "wait_s": 0.5}


def test_the_level_leaves_out_what_is_less_serious(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(log_format="json")
    output.level = "warning"
    output.note("information")
    output.event({"name": "process_restarted", "severity": "warning", "process": "peer"} | RESTART)
    (line,) = capsys.readouterr().err.splitlines()
    assert checked(line)["name"] == "process_restarted"


def test_results_stay_where_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(as_json=True, log_format="json")
    output.event(record_of("resumed"))
    output.result({"ok": True})
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1]) == {"ok": True}
    assert checked(captured.err)["name"] == "resumed"


def test_the_wish_for_json_is_heard_before_settings_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SWARMTRAIN_LOG__FORMAT", raising=False)
    assert wants_json_log(["join", "--log-format", "json"])
    assert wants_json_log(["join", "--log-format=json"])
    assert not wants_json_log(["join", "--log-format", "text"])
    assert not wants_json_log(["join", "--", "train", "--log-format", "json"])
    monkeypatch.setenv("SWARMTRAIN_LOG__FORMAT", "json")
    assert wants_json_log(["join"])


def test_the_page_names_every_field() -> None:
    page = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    section = page.split("\n## JSON logs\n")[1].split("\n## ")[0]
    assert [field for field in RECORD_FIELDS if f"`{field}`" not in section] == []


def run_file(folder: Path) -> Path:
    """A run of a few rounds on a saved data set, dealt in shards."""
    rows = [f"{word} {number} " * 20 for number in range(60) for word in ("one", "two", "three")]
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(str(folder / "set"))
    path = folder / "run.toml"
    path.write_text(
        f"""
[run]
max_rounds = 4
[train]
corpus = "hf:{folder / "set"}"
shards = 12
model = {{ d_model = 16, heads = 2, context = 32 }}
inner_steps = 10
inner_warmup_steps = 2
[dashboard]
bind = ""
[net]
listen = "127.0.0.1:0"
"""
    )
    return path


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_real_run_on_a_data_set_logs_json_and_reports_to_both(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "swarmtrain", "up", str(run_file(tmp_path))]
    command += ["--log-format", "json", "--home", str(tmp_path / "home"), "--json"]
    command += ["--tensorboard", str(tmp_path / "boards"), "--wandb", "swarms"]
    environment = {**child_environment(), "WANDB_MODE": "offline", "TMPDIR": os.environ["TMPDIR"]}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=140, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ticket = next(d["ticket"] for d in map(json.loads, done.stdout.splitlines()) if "ticket" in d)
    records = [checked(line) for line in done.stderr.splitlines()]
    assert ticket.split("#")[1] not in done.stderr
    names = Counter(record["name"] for record in records)
    assert names["round_committed"] == 4 and names["data_defined"] == 1
    assert names["run_ended"] == 1 and names["round_figures"] >= 3
    (board,) = (tmp_path / "boards").iterdir()
    found = EventAccumulator(str(board))
    found.Reload()
    assert {"loss/held_out", "loss/train", "round/compute_s"} <= set(found.Tags()["scalars"])
    losses = [event.value for event in found.Scalars("loss/held_out")]
    assert losses and losses[-1] < 5.6
    assert list((tmp_path / "home").rglob("offline-run-*/run-*.wandb"))
