"""``st.join``: which site a script belongs to, and which arguments it may give."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import swarmtrain as st
from swarmtrain.training.hook import join
from swarmtrain.training.place import await_run_keys, resolve
from swarmtrain_peer.config import PeerConfig
from swarmtrain_peer.site import found_site
from swarmtrain_protocols.errors import ConfigError, QuorumLost, UsageError
from swarmtrain_protocols.manifest import RunKeys
from tests.swarmtrain.training.served import served

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "examples" / "bring_your_own_loop.py"
Completed = subprocess.CompletedProcess[str]
KEYS = {"inner_steps": 2, "overlap": "off", "outer_lr": 1.0, "outer_momentum": 0.0}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    for name in [name for name in os.environ if name.startswith("SWARMTRAIN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SWARMTRAIN_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def loop(swarm: st.Swarm, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(4):
        model(torch.ones(5, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = torch.nn.Linear(2, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def test_public_names():
    assert st.join is join and st.Swarm.__name__ == "Swarm"


def test_with_nothing_to_join_it_is_offline(home):
    with join(*make()) as swarm:
        assert swarm.offline
    assert not home.exists(), "nothing was founded behind anybody's back"


def test_offline_wins_over_everything(home, monkeypatch):
    monkeypatch.setenv("SWARMTRAIN_OFFLINE", "1")
    monkeypatch.setenv("SWARMTRAIN_TICKET", "swarm://not-even-a-ticket")
    with join(*make(), run={"inner_steps": 2}) as swarm:
        assert swarm.offline


def test_the_live_site_of_this_home(home, tmp_path):
    with served(tmp_path, **KEYS) as (_, run, backend):
        model, optimizer = make()
        with join(model, optimizer, inner_steps=2, outer=(1.0, 0.0)) as swarm:
            assert not swarm.offline
            loop(swarm, model, optimizer)
    assert run.rounds == {"train/0/0": 2}
    assert [name for name, _ in backend.said][-1] == "detach"


def test_a_site_by_name(home, tmp_path, monkeypatch):
    with served(tmp_path, **KEYS) as (site, _, _):
        monkeypatch.setenv("SWARMTRAIN_HOME", str(tmp_path / "another"))
        with join(*make()) as swarm:
            assert swarm.offline
        monkeypatch.setenv("SWARMTRAIN_SITE", str(site.folder))
        with join(*make()) as swarm:
            assert not swarm.offline


def test_run_keys_must_be_the_runs(home, tmp_path):
    with served(tmp_path, **KEYS):
        with pytest.raises(ConfigError, match=r"inner_steps = 3.*this run has inner_steps = 2"):
            join(*make(), inner_steps=3)
        with pytest.raises(ConfigError, match="codec_scatter"):
            join(*make(), codec="fp32")
        with pytest.raises(ConfigError, match="outer_lr"):
            join(*make(), outer={"lr": 0.5, "momentum": 0.0})


def test_several_live_sites_are_listed(home, tmp_path):
    (tmp_path / "two").mkdir()
    with served(tmp_path, **KEYS) as (first, _, _), served(tmp_path / "two", **KEYS) as (two, _, _):
        second = first.folder.with_name(two.folder.name)
        second.symlink_to(two.folder)
        with pytest.raises(UsageError) as caught:
            join(*make())
    assert first.folder.name in str(caught.value) and second.name in str(caught.value)


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"state": {"ema": 1}}, ConfigError),
        ({"ticket": "swarm://nonsense"}, ConfigError),
        ({"run": {"inner_stepz": 3}}, ConfigError),
        ({"run": "missing.toml"}, ConfigError),
        ({"run": {}, "overlap": "sometimes"}, ConfigError),
    ],
)
def test_bad_arguments_are_typed_errors(home, arguments, error):
    with pytest.raises(error):
        join(*make(), **arguments)


def test_what_is_founded(home, tmp_path):
    """The file, then ``run``, then arguments; nothing runs yet."""
    (tmp_path / "run.toml").write_text('[train]\ninner_steps = 7\noverlap = "off"\n')
    place = resolve(None, None, {"overlap": "eager"}, os.environ)
    assert place is not None and place.founded
    manifest = place.site.manifest()
    assert manifest is not None
    assert (manifest.keys.inner_steps, manifest.keys.overlap) == (7, "eager")
    other = resolve(None, {"inner_steps": 9}, {}, os.environ)
    assert other is not None and other.site.manifest().keys.inner_steps == 9


def test_a_manifest_that_never_comes(home, tmp_path):
    site = found_site(home, RunKeys(), PeerConfig())
    assert await_run_keys(site, 0.0) == RunKeys()
    site.manifest_path.unlink()
    with pytest.raises(QuorumLost, match="manifest"):
        await_run_keys(site, 0.0)


def run_example(
    home: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "peer", "protocols"))
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments],
        env={**os.environ, "PYTHONPATH": paths, "SWARMTRAIN_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=100,
        cwd=home.parent,
    )


def test_the_example_is_short_and_runs_alone(home):
    assert len(EXAMPLE.read_text().splitlines()) < 40
    done = run_example(home, "30", SWARMTRAIN_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("step 30, round 0, loss 0.") and done.stderr == ""


def test_the_example_founds_a_run_with_a_peer_process_of_its_own(home):
    done = run_example(home, "30", "--found", SWARMTRAIN_NET__LISTEN="127.0.0.1:0")
    assert done.returncode == 0, done.stderr
    assert "starting a peer process" in done.stderr and "swarm://127.0.0.1:" in done.stderr
    assert re.match(r"step 30, round \d, loss 0\.", done.stdout)
    (site,) = (home / "runs").iterdir()
    assert not (site / "control.sock").exists(), "the peer process left with the script"
    names = re.findall(r'"name":"(\w+)"', (site / "events.jsonl").read_text())
    committed = names.count("round_committed")
    assert 1 <= committed == names.count("handover"), "close waits for the last round"
    assert names[-1] == "peer_stopped"
