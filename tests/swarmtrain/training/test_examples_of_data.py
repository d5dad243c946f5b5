"""The examples of data: the run file is one, and the script trains on a saved data set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from swarmtrain_peer.config import load_settings
from swarmtrain_peer.corpus_sources import parse_source
from swarmtrain_peer.spawn import child_environment

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def script(tmp_path: Path, *arguments: str, **environment: str) -> str:
    """What the example prints, run on a small data set."""
    rows = [f"the {n} of {n % 7} rows is like the others, mostly" for n in range(400)]
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(str(tmp_path / "rows"))
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "own_dataset.py"), str(tmp_path / "rows"), *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
        env={**child_environment(), "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_run_file_names_a_data_set_and_deals_it() -> None:
    keys = load_settings(EXAMPLES / "dataset.toml", {}).run
    named = parse_source(keys.corpus)
    assert (named.kind, named.options["streaming"]) == ("hf", "1") and keys.shards == 4096


@pytest.mark.slow
def test_the_script_trains_alone(tmp_path: Path) -> None:
    said = script(tmp_path, SWARMTRAIN_OFFLINE="1")
    assert said.startswith("step 50, round 0, loss ")
    assert float(said.split()[-1]) < 4.0


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_script_founds_a_run_whose_data_are_dealt(tmp_path: Path) -> None:
    home = {"SWARMTRAIN_HOME": str(tmp_path / "home")}
    said = script(tmp_path, "--found", "--steps", "130", **home)
    step, round_ = int(said.split()[1].rstrip(",")), int(said.split()[3].rstrip(","))
    # 400 rows are 50 batches: it has gone through them more than twice.
    assert step == 130 and round_ >= 3
    assert os.listdir(tmp_path / "home" / "runs")
