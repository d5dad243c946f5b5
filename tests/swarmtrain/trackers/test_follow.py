"""Trackers are fed from a site's control socket, and cannot hold up or end anything."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from swarmtrain.trackers import follow
from swarmtrain.trackers.follow import Follower
from swarmtrain_protocols.errors import ConfigError

Document = dict[str, Any]


class Site:
    """A control connection that answers from made-up documents."""

    def __init__(self) -> None:
        self.closed = False
        self.records: list[Document] = [record(1, 2.5)]
        self.pushes: list[Callable[[Document], None]] = []
        self.connections = 0

    def connect(self) -> Site:
        self.connections += 1
        self.closed = False
        return self

    def call(self, name: str, args: Document | None = None, timeout_s: float = 30.0) -> Document:
        if name == "events":
            return {"events": [r for r in self.records if r["seq"] > (args or {})["since_seq"]]}
        return {"run": "ab", "name": "tiny", "site": "cd", "site_name": "x", "members": 2}

    def subscribe(self, callback: Callable[[Document], None]) -> None:
        self.pushes.append(callback)

    def push(self, one: Document) -> None:
        self.records.append(one)
        self.pushes[-1]({"event": "event", "record": one})

    def close(self) -> None:
        self.closed = True


class Kept:
    """A tracker that keeps what it gets; ``wanted`` says when a name has come."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.run: Document = {}
        self.rows: list[tuple[int, float, dict[str, float]]] = []
        self.closed = 0
        self.news = threading.Condition()

    def begin(self, run: Document) -> None:
        self.run = run

    def scalars(self, step: int, wall_s: float, values: dict[str, float]) -> None:
        if self.fails:
            raise OSError("the disk is full")
        with self.news:
            self.rows.append((step, wall_s, values))
            self.news.notify_all()

    def close(self) -> None:
        self.closed += 1

    def wait(self, name: str, times: int = 1) -> None:
        with self.news:
            assert self.news.wait_for(
                lambda: sum(name in row[2] for row in self.rows) >= times, timeout=10
            )


def record(seq: int, loss: float) -> Document:
    return {"name": "evaluated", "seq": seq, "round": 10 * seq, "wall_s": 5.0 + seq, "loss": loss}


def test_events_and_the_state_of_the_run_reach_every_tracker() -> None:
    site, one, two = Site(), Kept(), Kept()
    with Follower(site.connect, [one, two], pytest.fail) as follower:
        one.wait("loss/held_out")
        site.push(record(2, 2.25))
        two.wait("loss/held_out", 2)
        two.wait("run/members")
        assert follower.dropped == 0
    losses = [row for row in one.rows if "loss/held_out" in row[2]]
    assert losses == [(10, 6.0, {"loss/held_out": 2.5}), (20, 7.0, {"loss/held_out": 2.25})]
    assert one.run == {"run": "ab", "name": "tiny", "site": "cd", "site_name": "x"}
    assert (one.closed, two.closed, site.closed) == (1, 1, True)


def test_a_tracker_that_fails_is_left_out_and_said_to_be() -> None:
    site, bad, good, said = Site(), Kept(fails=True), Kept(), []
    with Follower(site.connect, [bad, good], said.append):
        good.wait("run/members")
    assert len(said) == 1 and "OSError: the disk is full" in said[0]
    assert good.closed == 1 and bad.closed == 0


def test_a_site_that_was_away_is_followed_again_from_where_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(follow, "POLL_S", 0.05)
    site, one = Site(), Kept()
    with Follower(site.connect, [one], pytest.fail):
        one.wait("loss/held_out")
        site.closed = True
        site.records.append(record(2, 2.0))
        one.wait("loss/held_out", 2)
    assert site.connections >= 2
    assert [row[0] for row in one.rows if "loss/held_out" in row[2]] == [10, 20]


def test_one_that_cannot_begin_is_an_error_and_ends_the_others() -> None:
    class Refuses(Kept):
        def begin(self, run: Document) -> None:
            raise ConfigError("log.wandb", "no API key", "log in")

    one = Kept()
    with pytest.raises(ConfigError, match="no API key"):
        Follower(Site().connect, [one, Refuses()], pytest.fail).start()
    assert one.closed == 1


def test_without_trackers_nothing_is_connected() -> None:
    site = Site()
    with Follower(site.connect, [], pytest.fail):
        pass
    assert site.connections == 0
