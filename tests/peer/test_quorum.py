"""Silence of all leaders is a loss of the majority; standing still oneself is not."""

from __future__ import annotations

from pathlib import Path

from swarmtrain_peer.events import EventLog
from swarmtrain_peer.quorum import LOOK_S, QuorumChanged, QuorumWatch
from swarmtrain_protocols.log.events import LogTimeouts

PATIENCE_S = LogTimeouts().stale_s


class Log:
    """A log that felt a leader at a certain time."""

    timeouts = LogTimeouts()

    def __init__(self) -> None:
        self.felt_s = 0.0

    def silent_s(self, now: float) -> float:
        return now - self.felt_s


class Node:
    def __init__(self) -> None:
        self.log = Log()


class Bench:
    def __init__(self, folder: Path) -> None:
        self.now = 0.0
        self.node = Node()
        self.told: list[bool] = []
        self.events = EventLog(folder / "events.jsonl", "ab" * 32)
        self.watch = QuorumWatch(
            self.node,  # type: ignore[arg-type]
            self.events,
            self.tell,
            mono_s=lambda: self.now,
        )

    def tell(self, event: QuorumChanged) -> None:
        self.told.append(event.lost)

    def live(self, seconds: float, *, leader: bool) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += LOOK_S
            if leader:
                self.node.log.felt_s = self.now
            self.watch.look()

    def names(self) -> list[str]:
        return [record["name"] for record in self.events.query()]


def test_it_is_told_once_when_it_goes_and_once_when_it_comes_back(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.live(100.0, leader=True)
    bench.live(PATIENCE_S - 1.0, leader=False)
    assert bench.told == [] and not bench.watch.lost
    bench.live(30.0, leader=False)
    assert bench.told == [True] and bench.watch.lost
    bench.live(30.0, leader=True)
    assert bench.told == [True, False] and not bench.watch.lost
    assert bench.names() == ["quorum_lost", "quorum_regained"]
    assert PATIENCE_S <= bench.events.query(name="quorum_lost")[0]["wait_s"] < PATIENCE_S + 1


def test_a_machine_that_stood_still_gives_the_others_their_time(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.live(1.0, leader=True)
    bench.now += 3600.0
    bench.live(PATIENCE_S - 1.0, leader=False)
    assert bench.told == []
    bench.live(2.0, leader=False)
    assert bench.told == [True]
