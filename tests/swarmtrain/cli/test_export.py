"""``swarmtrain export`` on a site's checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from typer.testing import CliRunner, Result

from swarmtrain.cli.main import app
from swarmtrain_peer.config import PeerConfig
from swarmtrain_peer.site import Site, found_site
from swarmtrain_peer.store import StateStore
from swarmtrain_protocols.errors import CheckpointError, ConfigError, SwarmError, UsageError
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.state import CanonicalState

MODEL = "from torch import nn\n\ndef make():\n    return nn.Linear(3, 2)\n\nnothing = 5\n"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    site = found_site(tmp_path / "home", RunKeys(name="own"), PeerConfig(name="anna"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_model_for_export.py").write_text(MODEL)
    return site


def invoke(site: Site, *arguments: str) -> Result:
    home = str(site.folder.parent.parent)
    return CliRunner().invoke(app, ["export", *arguments, "--home", home, "--json"])


def saved(site: Site, *starts: float) -> list[CanonicalState]:
    store, found = StateStore(site.state_path), []
    for number, start in enumerate(starts):
        theta = np.arange(8, dtype=np.float32) + np.float32(start)
        state = CanonicalState.first("train/0/0", theta, round=number)
        store.save([state])
        found.append(state)
    return found


def test_the_newest_checkpoint_or_the_one_asked_for(site: Site, tmp_path: Path) -> None:
    states = saved(site, 0.0, 100.0)
    model = ("--model", "own_model_for_export:make")
    document = json.loads(invoke(site, *model).stdout)
    assert document["ok"] is True and document["rounds"] == {"train/0/0": 1}
    with safe_open(tmp_path / "export" / "model.safetensors", "np") as file:
        assert file.get_tensor("bias").tolist() == [106.0, 107.0]
        assert file.metadata()["run"] == site.run_id.hex()
        assert file.metadata()["state.train/0/0"] == states[1].root().hex()
    older = invoke(site, *model, "--checkpoint", str(document["checkpoint"] - 1), "--out", "older")
    assert json.loads(older.stdout)["rounds"] == {"train/0/0": 0}
    with safe_open(tmp_path / "older" / "model.safetensors", "np") as file:
        assert file.get_tensor("bias").tolist() == [6.0, 7.0]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("--to", "onnx"), UsageError, "no such format"),
        (("--checkpoint", "77"), CheckpointError, "no checkpoint 77"),
        (("--model", "nowhere"), UsageError, "not MODULE:FUNCTION"),
        (("--model", "no_such_module:make"), ConfigError, "No module named"),
        (("--model", "own_model_for_export:other"), ConfigError, "no attribute"),
        (("--model", "own_model_for_export:nothing"), ConfigError, "no function"),
        ((), CheckpointError, "values, the model has"),
    ],
)
def test_refusals(
    site: Site, arguments: tuple[str, ...], error: type[SwarmError], words: str
) -> None:
    saved(site, 0.0)
    found = invoke(site, *arguments).exception
    assert isinstance(found, error) and words in str(found)


def test_a_site_without_checkpoints_has_nothing_to_export(site: Site) -> None:
    found = invoke(site).exception
    assert isinstance(found, CheckpointError) and "seeds hold none" in str(found.todo)
