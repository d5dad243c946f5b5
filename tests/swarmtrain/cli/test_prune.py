"""Checkpoints by hand: asked of a live site, done in the folder of a stopped one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from swarmtrain.cli.main import app
from swarmtrain_peer.config import PeerConfig
from swarmtrain_peer.site import Site, found_site
from swarmtrain_peer.store import StateStore
from swarmtrain_protocols.errors import CheckpointError, UsageError
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.state import CanonicalState
from tests.swarmtrain.cli import rig as rigs
from tests.swarmtrain.cli.rig import Rig


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    kept = [{"number": 3, "rounds": {"train/0/0": 20}, "why": "pinned"}]
    answer = {"removed": [1, 2], "kept": kept, "damaged": ["refused x"]}
    monkeypatch.setitem(rigs.ANSWERS, "curate", answer)
    rig = Rig(tmp_path)
    yield rig
    rig.close()


@pytest.fixture
def stopped(tmp_path: Path) -> Site:
    site = found_site(tmp_path, RunKeys(), PeerConfig(name="seed"))
    store = StateStore(site.state_path)
    for number in (0, 10, 20):
        theta = np.full(100, number, np.float32)
        store.save([CanonicalState.first("train/0/0", theta, round=number)])
    return site


def invoke(home: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["ckpt", *arguments, "--home", str(home)])


def listed(home: Path) -> list[tuple[int, bool]]:
    document = json.loads(invoke(home, "list", "--json").stdout)
    return [(row["number"], row["pinned"]) for row in document["checkpoints"]]


def test_a_live_site_is_asked(live: Rig) -> None:
    told = invoke(live.home, "prune", "--keep", "2")
    assert told.exit_code == 0
    assert told.stdout.splitlines() == ["removed: 1, 2", "kept: 3 (pinned)", "damaged: refused x"]
    assert invoke(live.home, "pin", "3").exit_code == invoke(live.home, "unpin", "3").exit_code == 0
    invoke(live.home, "prune", "--number", "7")
    asked = [args for name, args in live.backend.asked if name == "curate"]
    assert asked == [
        {"action": "prune", "number": 0, "keep": 2},
        {"action": "pin", "number": 3, "keep": 0},
        {"action": "unpin", "number": 3, "keep": 0},
        {"action": "remove", "number": 7, "keep": 0},
    ]


def test_a_stopped_site_is_pruned_in_its_folder(stopped: Site) -> None:
    home = stopped.home
    assert json.loads(invoke(home, "pin", "1", "--json").stdout) == {
        "ok": True,
        "number": 1,
        "pinned": True,
    }
    told = json.loads(invoke(home, "prune", "--keep", "1", "--json").stdout)
    assert told["removed"] == [2]
    assert listed(home) == [(3, False), (1, True)]
    refused = invoke(home, "prune", "--number", "1").exception
    assert isinstance(refused, CheckpointError) and "pinned" in str(refused)
    assert invoke(home, "unpin", "1").exit_code == 0
    assert invoke(home, "prune", "--number", "1").exit_code == 0
    refused = invoke(home, "prune", "--number", "3").exception
    assert isinstance(refused, CheckpointError) and "only good state" in str(refused)
    assert listed(home) == [(3, False)]


def test_what_to_remove_must_be_said(stopped: Site) -> None:
    for arguments in ((), ("--keep", "1", "--number", "2")):
        assert isinstance(invoke(stopped.home, "prune", *arguments).exception, UsageError)
    assert invoke(stopped.home, "prune", "--keep", "0").exit_code == UsageError.exit_code
    assert len(listed(stopped.home)) == 3


def test_a_site_that_is_being_served_is_not_touched(stopped: Site) -> None:
    with stopped.lock():
        assert invoke(stopped.home, "prune", "--keep", "1").exit_code != 0
    assert len(listed(stopped.home)) == 3
