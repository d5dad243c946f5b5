"""The demo: what it asks of a run, whom it kills, and a real one from end to end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from swarmtrain.cli import demo as demos
from swarmtrain.cli.demo import Demo, DemoOptions
from swarmtrain.cli.output import Output
from swarmtrain_peer.spawn import Supervised, child_environment
from swarmtrain_protocols.errors import QuorumLost, SwarmError


def test_the_runs_keys_follow_the_options() -> None:
    keys = DemoOptions(peers=5, steps=70, overlap="delayed", codec="bf16").run_keys()
    assert (keys.inner_steps, keys.max_rounds, keys.total_steps) == (20, 3, 60)
    assert (keys.start_peers, keys.min_peers) == (5, 1)
    assert (keys.overlap, keys.codec_scatter, keys.codec_gather) == ("delayed", "bf16", "bf16")


class FakeProcess:
    """Remembers its signals."""

    def __init__(self) -> None:
        self.signals: list[int] = []

    def poll(self) -> None:
        return None

    def send_signal(self, number: int) -> None:
        self.signals.append(number)


class Bench(Demo):
    """A demo without processes: the test says who leads and what was committed."""

    def __init__(self, tmp_path: Path, options: DemoOptions) -> None:
        super().__init__(options, Output(), tmp_path)
        self.leads: int | None = 0
        self.fakes: dict[str, FakeProcess] = {}
        for number in range(options.peers):
            for kind in ("peer", "trainer"):
                name = f"{kind}-{number}"
                fake: Any = FakeProcess()
                self.fakes[name] = fake
                self._supervisor.processes[name] = Supervised(name, lambda f=fake: f, fake, 0.0)

    def _leader(self) -> int | None:
        return self.leads

    def commit(self, count: int) -> None:
        for number in range(count):
            record = {"generation": 0, "channel": "train/0/0", "round": number}
            self._on_record(0, {"name": "round_committed", "severity": "info", **record})
        self._chaos()

    def killed(self) -> list[str]:
        return [name for name, fake in self.fakes.items() if signal.SIGKILL in fake.signals]


def test_chaos_kills_a_member_and_then_the_leader(tmp_path: Path) -> None:
    bench = Bench(tmp_path, DemoOptions(peers=3, steps=160, chaos=True))
    bench.commit(1)
    assert bench.killed() == []
    bench.leads = None
    bench.commit(2)
    assert bench.killed() == []  # nobody leads: wait
    bench.leads = 1
    bench.commit(2)
    assert bench.killed() == ["peer-2", "trainer-2"]
    bench.leads = 0
    bench.commit(3)
    assert bench.killed() == ["peer-2", "trainer-2"]
    bench.commit(4)
    assert bench.killed() == ["peer-0", "peer-2", "trainer-2"]
    bench.commit(8)
    assert sum(len(fake.signals) for fake in bench.fakes.values()) == 3


def test_without_chaos_nobody_is_killed(tmp_path: Path) -> None:
    bench = Bench(tmp_path, DemoOptions(peers=3, steps=160))
    bench.commit(8)
    assert bench.killed() == []


def test_standing_still_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(demos.host, "mono_s", lambda: now[0])
    bench = Bench(tmp_path, DemoOptions(steps=160))
    now[0] += demos.STALL_S
    bench._check_progress(["trainer-0"])
    bench.commit(1)
    now[0] += demos.STALL_S
    bench._check_progress(["trainer-0"])
    now[0] += 1
    with pytest.raises(QuorumLost, match="stands still"):
        bench._check_progress(["trainer-0"])
    bench._on_record(0, {"name": "run_ended", "severity": "info", "reason": "max_rounds"})
    bench._check_progress(["trainer-0"])
    now[0] += demos.END_S + 1
    bench._check_progress([])
    with pytest.raises(QuorumLost, match="trainer-2 still running"):
        bench._check_progress(["trainer-2"])


def test_a_demo_that_fails_still_counts_what_came_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*unused: object, **also: object) -> None:
        raise SwarmError("no kernels")

    monkeypatch.setattr(subprocess, "run", broken)
    demo = Demo(DemoOptions(), Output(), tmp_path)
    summary = demo.run()
    assert summary["ok"] is False
    assert summary["peers"] == 0
    assert demo.error is not None
    assert demo.error.what == "no kernels"


def test_a_real_swarm_from_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "swarmtrain", "demo", "--steps", "60", "--json"],
        env=child_environment({"TMPDIR": str(tmp_path)}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert list(summary) == [
        "ok", "peers", "rounds_committed", "rounds_aborted", "loss_first", "loss_last",
        "state_hashes_equal", "state_hash", "bytes_sent", "compute_utilization", "dashboard_url",
    ]  # fmt: skip
    assert summary["ok"] is True
    assert (summary["peers"], summary["rounds_committed"]) == (3, 3)
    assert summary["state_hashes_equal"] is True
    assert len(summary["state_hash"]) == 64
    assert summary["loss_last"] < summary["loss_first"] < 5.6  # ln 256 is knowing nothing
    # Three rounds, each about 135 kB from every member to the owner and back.
    assert 500_000 < summary["bytes_sent"] < 50_000_000
    assert 0.5 < summary["compute_utilization"] <= 1.0
    assert summary["dashboard_url"].startswith("http://127.0.0.1:")
    assert list(tmp_path.glob("swarmtrain-demo-*")) == []
