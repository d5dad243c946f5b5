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
from swarmtrain_protocols.errors import QuorumLost


def test_the_runs_keys_follow_the_options() -> None:
    keys = DemoOptions(peers=5, steps=70, overlap="delayed", codec="bf16").run_keys()
    assert (keys.inner_steps, keys.max_rounds, keys.total_steps) == (20, 3, 60)
    assert (keys.start_peers, keys.min_peers) == (5, 1)
    assert (keys.overlap, keys.codec_scatter, keys.codec_gather) == ("delayed", "bf16", "bf16")


def test_stages_step_together_or_each_by_itself() -> None:
    together = DemoOptions(steps=60, stages=3)
    keys = together.run_keys()
    found = (keys.pipeline_mode, keys.max_rounds, together.rounds, together.commits)
    assert found == ("sync", 60, 60, 60)
    alone = DemoOptions(steps=60, stages=3, pipeline_mode="diloco")
    keys = alone.run_keys()
    found = (keys.pipeline_mode, keys.max_rounds, alone.rounds, alone.commits)
    assert found == ("diloco", 6, 6, 24), "each of four stages has six rounds"
    assert (keys.inner_steps, keys.total_steps) == (10, 60)


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
    def broken(*unused: object, **also: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "Traceback\nImportError: no numba")

    monkeypatch.setattr(Demo, "_start_trainer", lambda self, number: None)
    monkeypatch.setattr(subprocess, "run", broken)
    demo = Demo(DemoOptions(), Output(), tmp_path)
    summary = demo.run()
    assert summary["ok"] is False
    assert summary["peers"] == 1
    assert summary["rounds_committed"] == 0
    assert demo.error is not None
    assert demo.error.what == "the kernels cannot be built"
    assert demo.error.why == "ImportError: no numba"


def run_demo(folder: Path, *arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = child_environment({"TMPDIR": str(folder)})
    if path:
        environment["PYTHONPATH"] = f"{path}:{environment['PYTHONPATH']}"
    return subprocess.run(
        [sys.executable, "-m", "swarmtrain", "demo", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )


def read_raw(folder: Path) -> list[list[dict[str, Any]]]:
    """The members' event logs as plain JSON lines, without the package's own reader."""
    files = sorted(folder.glob("home-*/runs/*/events.jsonl"))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def named(log: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [record for record in log if record["name"] == name]


def states_of(log: list[dict[str, Any]]) -> dict[int, str]:
    return {record["round"]: record["state_hash"] for record in named(log, "state_applied")}


@pytest.mark.timeout(300)
def test_a_real_swarm_from_nothing(tmp_path: Path) -> None:
    done = run_demo(tmp_path, "--peers", "4", "--steps", "240", "--json", "--keep")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = tmp_path.glob("swarmtrain-demo-*")
    summary = json.loads(done.stdout.splitlines()[-1])
    assert list(summary) == [
        "ok", "peers", "rounds_committed", "rounds_aborted", "loss_first", "loss_last",
        "state_hashes_equal", "state_hash", "bytes_sent", "compute_utilization", "dashboard_url",
    ]  # fmt: skip
    assert summary["ok"] is True
    assert summary["dashboard_url"].startswith("http://127.0.0.1:")
    check_summary(summary, read_raw(folder))
    check_figures(read_raw(folder))


def check_summary(summary: dict[str, Any], logs: list[list[dict[str, Any]]]) -> None:
    """Every field again, from what the members wrote down."""
    assert summary["peers"] == len({record["site"] for log in logs for record in log}) == 4
    keys = ("generation", "channel", "round", "attempt")
    for name, field in (("round_committed", 3), ("round_aborted", 4)):
        found = {tuple(r[k] for k in keys[:field]) for log in logs for r in named(log, name)}
        assert summary[name.replace("round", "rounds")] == len(found)
    assert 10 <= summary["rounds_committed"] <= 12

    losses = {r["round"]: r["loss"] for log in logs for r in named(log, "evaluated")}
    assert min(losses) == 1
    assert max(losses) == summary["rounds_committed"]
    assert (summary["loss_first"], summary["loss_last"]) == (losses[1], losses[max(losses)])
    assert losses[max(losses)] < losses[1] < 5.6  # ln 256 is knowing nothing

    states = [states_of(log) for log in logs]
    for number in range(1, summary["rounds_committed"] + 1):
        hashes = {one[number] for one in states}  # every member applied every round
        assert len(hashes) == 1, f"members differ after round {number}"
    assert summary["state_hashes_equal"] is True
    assert summary["state_hash"] == states[0][summary["rounds_committed"]]
    assert len(set(states[0].values())) == len(states[0])

    stopped = [record for log in logs for record in named(log, "peer_stopped")]
    assert len(stopped) == 4
    assert summary["bytes_sent"] == sum(record["bytes_sent"] for record in stopped)
    # Links on one machine lose nothing: what was sent arrived, but for the last farewells.
    received = sum(record["bytes_received"] for record in stopped)
    assert abs(received - summary["bytes_sent"]) < 0.05 * summary["bytes_sent"]

    used = [named(log, "round_figures")[-1]["compute_utilization"] for log in logs]
    assert summary["compute_utilization"] == pytest.approx(sum(used) / 4, abs=1e-4)
    for log, share in zip(logs, used, strict=True):
        handovers = named(log, "handover")
        wall_s = handovers[-1]["mono_s"] - named(log, "trainer_attached")[0]["mono_s"]
        blocked_s = sum(record["blocked_s"] for record in handovers)
        assert share == pytest.approx(1 - blocked_s / wall_s, abs=0.05)


def check_figures(logs: list[list[dict[str, Any]]]) -> None:
    """What members tell of a round fits what the log says of it, and the bytes that it moved."""
    figures = [record for log in logs for record in named(log, "round_figures")]
    up: dict[int, int] = {}
    for record in figures:
        up[record["round"]] = up.get(record["round"], 0) + record["bytes_up"]
    assert sum(up.values()) <= sum(record["bytes_sent"] for record in figures)
    # One part: all others who contributed send theirs to the owner, who sends the sum to three.
    # A slow member may still be fetching when the owner tells its figures: then some is missing.
    one = named(logs[0], "contribution_ready")[-1]["bytes"]
    people = {r["round"]: len(r["contributors"]) for r in named(logs[0], "round_opened")}
    vectors = {number: nbytes / one - 3 for number, nbytes in up.items()}
    assert all(vectors[number] <= people[number] + 0.05 for number in up)
    whole = [n for n in up if vectors[n] == pytest.approx(people[n] - 1, abs=0.05)]
    assert len(whole) >= len(up) / 2
    for log in logs:
        opened = {r["round"]: r["mono_s"] for r in named(log, "round_opened")}
        applied = {r["round"]: r["mono_s"] for r in named(log, "state_applied")}
        for record in named(log, "round_figures"):
            number = record["round"]
            if "apply_s" in record:
                end_s = record["t_apply_offset_s"] + record["apply_s"]
                assert end_s == pytest.approx(applied[number + 1] - opened[number], abs=0.5)
            for phase in ("send", "receive"):
                spans = record.get(f"{phase}_spans_s", [])
                assert all(begin <= end for begin, end in spans)
                total = sum(end - begin for begin, end in spans)
                assert total >= record.get(f"{phase}_s", 0.0) - 0.001 * (1 + len(spans))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_member_that_dies_ends_the_demo_at_once(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('this torch is broken')")
    done = run_demo(tmp_path, "--peers", "2", "--steps", "4000", "--json", path=str(tmp_path))
    assert done.returncode == 1
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["ok"] is False
    assert summary["error"]["what"].startswith("trainer-")
    assert "this torch is broken" in summary["error"]["why"]
    assert "this torch is broken" in done.stderr
    assert list(tmp_path.glob("swarmtrain-demo-*")) == []
