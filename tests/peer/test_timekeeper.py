"""A process that stands still, and wall clocks that are off."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarmtrain_peer.events import EventLog
from swarmtrain_peer.timekeeper import Timekeeper
from swarmtrain_protocols.core import PeerId

LOOK_S = 0.25
HOUR_S = 3600.0
WALL_S = 1.7e9


class Bench:
    def __init__(self, folder: Path) -> None:
        self.mono_s, self.wall_s = 50.0, WALL_S
        self.events = EventLog(folder / "events.jsonl", "ab" * 32)
        self.said: list[tuple[float, float]] = []
        self.time = Timekeeper(self.events, mono_s=lambda: self.mono_s, wall_s=lambda: self.wall_s)
        self.time.changed = lambda now, wall_s: self.said.append((now, wall_s))

    def live(self, seconds: float) -> float:
        """Let time pass while the process runs; returns the time of its cores."""
        now = self.time.look()
        for _ in range(round(seconds / LOOK_S)):
            self.mono_s += LOOK_S
            self.wall_s += LOOK_S
            now = self.time.look()
        return now

    def sleep(self, seconds: float) -> None:
        self.mono_s += seconds
        self.wall_s += seconds

    def told(self) -> list[tuple[str, float]]:
        return [
            (r["name"], r["slept_s"] if r["name"] == "stood_still" else r["off_s"])
            for r in self.events.query()
        ]


def peers(count: int) -> list[PeerId]:
    return [PeerId(bytes([n]) * 32) for n in range(count)]


def test_time_in_which_it_did_not_run_is_no_time(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    before = bench.live(10.0)
    bench.sleep(600.0)
    assert bench.time.now() == pytest.approx(before), "whoever asks first"
    after = bench.live(5.0)
    assert after == pytest.approx(before + 5.0)
    assert bench.told() == [("stood_still", 600.0)]
    assert bench.time.wall_s() == pytest.approx(bench.wall_s), "the wall clock went on"
    assert bench.said == [(pytest.approx(before), pytest.approx(WALL_S + 610.0))]


def test_being_late_is_not_being_asleep(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    before = bench.live(10.0)
    bench.sleep(1.5)
    assert bench.live(0.0) == pytest.approx(before + 1.5)
    assert bench.told() == [] and bench.said == []


def test_nobody_looks_before_it_serves(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.sleep(30.0)  # reading a large checkpoint
    assert bench.time.now() == 80.0
    assert bench.live(0.0) == 80.0 and bench.told() == []


def test_a_machine_whose_clock_is_off_goes_by_the_others_and_says_so(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.live(1.0)
    for peer in peers(2):
        bench.time.connected(peer, bench.wall_s + 3 * HOUR_S)
    bench.live(1.0)
    assert bench.told() == [("clock_off", 3 * HOUR_S)]
    assert bench.time.wall_s() == pytest.approx(bench.wall_s + 3 * HOUR_S)
    ((now, wall_s),) = bench.said
    assert wall_s - now == pytest.approx(bench.wall_s + 3 * HOUR_S - bench.mono_s)
    bench.live(60.0)
    assert len(bench.told()) == len(bench.said) == 1, "once"
    bench.wall_s += 3 * HOUR_S  # somebody sets it right
    bench.live(1.0)
    assert bench.told()[1:] == [("clock_off", 0.0)]
    assert bench.time.wall_s() == pytest.approx(bench.wall_s)
    bench.time.disconnected(peers(1)[0])
    bench.live(1.0)
    assert len(bench.told()) == 2
