"""Checkpoints, settings, new projects, versions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from swarmtrain.cli.main import app
from swarmtrain_peer.config import load_settings
from swarmtrain_protocols.errors import ConfigError, UsageError
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


def test_a_flag_is_an_origin_too_and_its_typos_get_a_suggestion() -> None:
    document = json.loads(invoke("config", "show", "--set", "net.up=8Mbit", "--json").stdout)
    assert document["net.up"] == {"kind": "peer", "value": 1_000_000, "origin": "flag"}
    bad = invoke("config", "show", "--set", "net.upp=8Mbit")
    assert isinstance(bad.exception, ConfigError) and bad.exception.todo == "did you mean net.up?"
    assert isinstance(invoke("config", "show", "--set", "net.up").exception, UsageError)


def test_what_holds_in_a_run_says_which_keys_were_changed_in_flight(rig: Rig) -> None:
    changes = [
        {"at_round": 20, "key": "inner_steps", "value": "40"},
        {"at_round": 23, "key": "outer_lr", "value": "auto"},
        {"at_round": 99, "key": "inner_lr", "value": "0.5"},
    ]
    rig.run.changes = changes
    home = ("--home", str(rig.home))
    found = json.loads(invoke("config", "show", "--run", "--json", *home).stdout)
    steps = {"kind": "run", "value": 40, "origin": "changed at round 20"}
    assert found["train.inner_steps"] == steps
    assert found["train.outer_lr"]["value"] == "auto"
    assert found["train.inner_lr"] == {"kind": "run", "value": 3e-3, "origin": "the run"}
    assert found["peer.name"]["value"] == "anna-laptop"
    assert found["peer.name"]["origin"].endswith("peer.json")
    assert isinstance(invoke("config", "show", "x.toml", "--run", *home).exception, UsageError)


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
