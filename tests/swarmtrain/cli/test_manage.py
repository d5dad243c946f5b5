"""Checkpoints, settings, new projects, versions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from swarmtrain.cli.main import app
from swarmtrain_peer.config import load_settings
from swarmtrain_protocols.errors import ConfigError
from swarmtrain_protocols.manifest import RunKeys
from tests.swarmtrain.cli.rig import Rig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_settings_with_their_origins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[train]\ninner_steps = 30\n")
    monkeypatch.setenv("SWARMTRAIN_COMM__CODEC", "bf16")
    document = json.loads(invoke("config", "show", str(path), "--json").stdout)
    assert document["train.inner_steps"] == {
        "kind": "run",
        "value": 30,
        "origin": f"file {path}",
    }
    assert document["comm.codec_gather"]["origin"] == "environment SWARMTRAIN_COMM__CODEC"
    assert document["net.listen"]["kind"] == "peer"
    text = invoke("config", "show", str(path), "--origin").stdout
    assert any(line.split()[:3] == ["run", "train.inner_steps", "30"] for line in text.splitlines())
    assert invoke("config", "check", str(path)).stdout == "good: 3 key(s) given\n"
    path.write_text("[train]\ninner_stebs = 30\n")
    bad = invoke("config", "check", str(path))
    assert isinstance(bad.exception, ConfigError)
    assert bad.exception.todo == "did you mean train.inner_steps?"


def test_init_writes_a_run_that_can_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "my-run"
    result = invoke("init", str(folder))
    assert result.exit_code == 0
    settings = load_settings(folder / "run.toml")
    assert settings.run == RunKeys(name="my-run")
    compile((folder / "train.py").read_text(), "train.py", "exec")
    again = invoke("init", str(folder))
    assert isinstance(again.exception, ConfigError)


def test_versions(tmp_path: Path) -> None:
    document = json.loads(invoke("version", "--json").stdout)
    assert document["protocol"] == 1
    assert set(document) == {"swarmtrain", "protocol", "python", "system"}


def test_checkpoints_are_listed_and_verified(rig: Rig) -> None:
    import numpy as np

    from swarmtrain_peer.store import StateStore
    from swarmtrain_protocols.state import CanonicalState

    state = CanonicalState.first("train/0/0", np.arange(1000, dtype=np.float32))
    StateStore(rig.site.state_path).save([state])
    home = ("--home", str(rig.home), "--json")
    (row,) = json.loads(invoke("ckpt", "list", *home).stdout)["checkpoints"]
    assert (row["channel"], row["round"], row["values"]) == ("train/0/0", 0, 1000)
    assert row["state_hash"] == state.root().hex()
    good = invoke("ckpt", "verify", *home)
    assert (good.exit_code, json.loads(good.stdout)) == (0, {"ok": True, "good": 1, "damaged": []})
    (file,) = [p for p in rig.site.state_path.rglob("*") if p.is_file() and p.stat().st_size > 4000]
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    bad = invoke("ckpt", "verify", *home)
    assert bad.exit_code == 11
    assert json.loads(bad.stdout)["ok"] is False
