"""``st.serve``: models and tokens of a script's own in a pipeline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import swarmtrain as st
from swarmtrain.training.own import OwnData, cut_own, serve
from swarmtrain.training.stages.cut import CannotCut, Cut, cut_parts
from swarmtrain.training.stages.decoder import Decoder, DecoderSizes
from swarmtrain.training.stages.families import OWN_PRESET, cut_preset
from swarmtrain_peer.config import load_settings
from swarmtrain_protocols.errors import ConfigError, DataUnavailable, UsageError
from swarmtrain_protocols.manifest import RunKeys, check_stages, run_keys_from_mapping
from tests.swarmtrain.training.served import served

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples"
WIDTH, VOCABULARY, CONTEXT = 8, 11, 5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mix(x)


def sequential(blocks: int = 4) -> nn.Sequential:
    parts = [Block() for _ in range(blocks)]
    return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *parts, nn.Linear(WIDTH, VOCABULARY))


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SWARMTRAIN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SWARMTRAIN_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def test_it_is_public() -> None:
    assert st.serve is serve


def test_models_that_can_be_given() -> None:
    found = cut_own(sequential(), 2, CONTEXT)
    assert (found.stages, found.width, found.vocabulary, found.context) == (2, WIDTH, VOCABULARY, 5)
    assert cut_own(found, 2, None) is found

    def make(stages: int) -> Cut:
        model = sequential(6)
        return cut_parts(model[0], list(model)[1:-1], model[-1], stages, context=CONTEXT)

    assert cut_own(make, 3, None).stages == 3
    sizes = DecoderSizes(
        vocabulary=VOCABULARY, d_model=WIDTH, layers=2, heads=2, kv_heads=1, context=7
    )
    assert cut_own(Decoder(sizes), 2, None).context == 7


@pytest.mark.parametrize(
    ("make", "stages", "context", "why"),
    [
        (sequential, 2, None, "give context"),
        (sequential, 3, CONTEXT, "cannot be cut into that many equal stages"),
        (lambda: cut_own(sequential(), 2, CONTEXT), 4, None, "the run has stages = 4"),
        (lambda: nn.Sequential(nn.Embedding(3, 3)), 1, CONTEXT, "no embedding, blocks and head"),
        (lambda: nn.Linear(2, 2), 1, CONTEXT, "no known family"),
    ],
)
def test_models_that_do_not_fit_say_why(
    make: Any, stages: int, context: int | None, why: str
) -> None:
    with pytest.raises(ConfigError) as found:
        cut_own(make(), stages, context)
    said = f"{found.value.what} {found.value.why} {found.value.todo}"
    assert why in said
    assert found.value.exit_code == 3
    if "known family" in why:
        assert isinstance(found.value, CannotCut)


def test_data_is_taken_by_number() -> None:
    asked: list[int] = []

    def data(number: int) -> list[int]:
        asked.append(number)
        return [number % VOCABULARY] * CONTEXT + [3]

    own = OwnData(data, CONTEXT, VOCABULARY)
    tokens, targets = own.batch(seed=9, position=5, batch_size=2, context=CONTEXT)
    assert asked == [10, 11]
    assert tokens.tolist() == [[10] * 5, [0] * 5]
    assert targets.tolist() == [[10] * 4 + [3], [0] * 4 + [3]]
    asked.clear()
    own.evaluation(3, CONTEXT)
    assert asked == [-1, -2, -3]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ([1, 2, 3], "not 6 whole numbers"),
        ([0.5] * 6, "not 6 whole numbers"),
        ([1, 2, 3, 4, 5, 11], "the model knows 11"),
        ([-1, 2, 3, 4, 5, 6], "the model knows 11"),
    ],
)
def test_data_that_does_not_fit_says_why(row: Any, why: str) -> None:
    own = OwnData(lambda number: np.array(row), CONTEXT, VOCABULARY)
    with pytest.raises(DataUnavailable) as found:
        own.batch(0, 0, 1, CONTEXT)
    assert why in f"{found.value.what} {found.value.why}"


@pytest.mark.usefixtures("nowhere")
def test_without_a_run_there_is_nothing_to_serve() -> None:
    with pytest.raises(UsageError, match="no ticket, no site and no run"):
        serve(sequential(), context=CONTEXT)


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize(
    ("keys", "why"), [({}, "preset = 'own'"), ({"preset": OWN_PRESET}, "no pipeline")]
)
def test_a_run_of_another_kind_is_refused(tmp_path: Path, keys: dict[str, Any], why: str) -> None:
    with served(tmp_path, inner_steps=2, **keys), pytest.raises(ConfigError, match=why):
        serve(sequential(), context=CONTEXT)


def test_without_the_script_the_model_cannot_be_built() -> None:
    with pytest.raises(ConfigError, match="its members' own") as found:
        cut_preset({"preset": OWN_PRESET, "model": {}, "stages": 2, "seed": 1})
    assert "python SCRIPT" in found.value.todo


def test_the_run_file_of_the_examples_is_valid() -> None:
    settings = load_settings(EXAMPLES / "pipeline.toml")
    keys = settings.run
    assert (keys.stages, keys.model, keys.micro_batches) == (4, {"layers": 8}, 16)
    fields = {name: getattr(keys, name) for name in RunKeys.__struct_fields__}
    assert cut_preset(fields).stages == 4
    assert check_stages(keys.stages, keys.model["layers"]) == 2


def test_examples_are_short() -> None:
    for path in (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.toml")):
        lines = path.read_text().splitlines()
        assert len(lines) <= 50, path
    assert len((EXAMPLES / "own_pipeline.py").read_text().splitlines()) < 40


@pytest.mark.timeout(118)
def test_the_example_trains_its_own_model_in_stages(tmp_path: Path) -> None:
    """One site serves all stages, and the script ends with the run."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SWARMTRAIN_")}
    environment["SWARMTRAIN_HOME"] = str(tmp_path / "home")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "own_pipeline.py"), "--found"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "swarm://" in done.stderr
    assert "it is over: max_rounds" in done.stderr
    (log,) = (tmp_path / "home").glob("runs/*/events.jsonl")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [record for record in records if record["name"] == "step_committed"]
    assert [record["step"] for record in steps] == list(range(40))
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    scored = [record["loss"] for record in records if record["name"] == "evaluated"]
    assert scored[-1] < 0.7 * steps[0]["loss"], "on sequences that were never trained on"
    keys = run_keys_from_mapping({"stages": 2})
    assert keys.preset != OWN_PRESET, "the script says it, nobody else has to"
