"""What is printed, and where."""

from __future__ import annotations

import json

import pytest

from swarmtrain.cli.output import Output, event_line, human_bytes, news_line, table, wants_json
from swarmtrain_protocols.errors import DiskFull, SwarmError


def test_errors_are_three_lines(capsys: pytest.CaptureFixture[str]) -> None:
    Output().error(DiskFull("results are not kept", "no space left", "free some"))
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: results are not kept\n  why: no space left\n  do:  free some\n"
    Output(as_json=True).error(SwarmError("odd\x1b[0m"))
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["what"] == "odd\x1b[0m"
    assert err.splitlines() == [
        "error: odd\\x1b[0m",
        "  why: not known",
        "  do:  see docs/exit-codes/1.md",
    ]


def test_events_are_lines_for_people() -> None:
    record = {
        "v": 1, "seq": 3, "wall_s": 1.0, "mono_s": 1.0, "site": "ab", "name": "round_aborted",
        "severity": "warning", "code": "R321", "generation": 0, "channel": "train/0/0",
        "round": 4, "attempt": 2, "reason": "owner\nlost", "peer": "c" * 64, "wait_s": 0.12345,
        "nothing": None,
    }  # fmt: skip
    line = event_line(record)
    assert (
        line == "! round aborted  train/0/0#4.2  reason=owner\\nlost  peer=cccccccc  wait_s=0.1235"
    )


def test_progress_is_for_terminals_and_trouble_for_everybody(
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = Output()
    assert not output.is_terminal
    output.event({"name": "round_committed", "severity": "info"})
    output.event({"name": "disk_full", "severity": "error"})
    out, err = capsys.readouterr()
    assert (out, err) == ("", "!! disk full\n")
    output.is_terminal = True
    output.event({"name": "round_committed", "severity": "info", "round": 4})
    output.event({"name": "part_reduced", "severity": "info"})
    output.event({"name": "evaluated", "severity": "info", "round": 4, "loss": 2.34567})
    output.event({"name": "leader_changed", "severity": "info", "leader": None, "term": 2})
    output.event({"name": "member_left", "severity": "info", "peer": "c" * 64})  # lacks a field
    assert capsys.readouterr().err.splitlines() == [
        "round 4 committed",
        "loss 2.346 after round 4",
        "nobody leads the log",
        "member left  peer=cccccccc",
    ]


def test_long_lists_are_counted() -> None:
    record = {"name": "round_opened", "contributors": ["a" * 64, "b" * 64], "holders": [1, 2, 3, 4]}
    record["send_spans_s"] = [[0.0, 1.0]]
    line = "round opened  contributors=aaaaaaaa,bbbbbbbb  holders=(4)  send_spans_s=(1)"
    assert event_line(record) == line


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_550_000, "1.6 MB"), (3e12, "3.0 TB")],
)
def test_bytes_for_people(nbytes: float, text: str) -> None:
    assert human_bytes(nbytes) == text


def test_tables_are_aligned() -> None:
    assert table(("a", "long"), [("xyz", 1), ("\n", 22)]) == ["a    long", "xyz  1", "\\n   22"]


def test_json_is_looked_for_among_own_arguments_only() -> None:
    assert wants_json(["join", "--json", "T", "--", "python"])
    assert not wants_json(["join", "T", "--", "python", "t.py", "--json"])


def test_events_of_stages_are_sentences() -> None:
    assigned = {
        "name": "stage_assigned",
        "severity": "info",
        "peer": "ab" * 32,
        "stages": [0, 2, 3, 5],
    }
    assert news_line(assigned) == "abababab serves the ends, stage 2, stage 3, stage 5"
    assert news_line(assigned | {"stages": []}) == "abababab serves no stage any more"
    back = {
        "name": "stage_recovered",
        "severity": "warning",
        "stage": 2,
        "step": 40,
        "host": "ab" * 32,
        "candidates": ["average", "copy-left"],
        "losses": [2.51, 2.498],
        "choice": "copy-left",
    }
    assert news_line(back) == (
        "! stage 2 is back: copy-left was the best of average 2.510, copy-left 2.498"
    )
    lost = {"name": "stage_lost", "severity": "error", "stage": 2, "step": 40, "host": "ab" * 32}
    assert news_line(lost) == "!! stage 2 is lost before step 40: abababab rebuilds it"


def test_who_is_gone_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = Output()
    monkeypatch.setattr(output, "is_terminal", True)
    for reason in ("no route", "no route", "refused", "no route"):
        output.event({"name": "link_refused", "severity": "warning", "reason": reason})
    assert [line.split("reason=")[1] for line in capsys.readouterr().err.splitlines()] == [
        "no route",
        "refused",
    ]
