"""The shortest form of a scenario, through conductor and checker."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_members_come_and_go_and_the_histories_hold(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.chaos", "C2", "--minutes", "0.6"]
    command += ["--keep", str(tmp_path), "--output", str(tmp_path / "results.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found = json.loads((tmp_path / "results.json").read_text())["C2"]
    assert found["ok"] and found["rounds"] >= 20
    assert sum(found["faults"].values()) >= 7
    judged = {name for name, one in found["criteria"].items() if one["ok"]}
    assert {"one hash", "no gap, no repeat", "nothing lost", "no wait", "restarted"} <= judged
    assert {path.name for path in (tmp_path / "C2").iterdir()} >= {"conductor.jsonl", "sites"}
