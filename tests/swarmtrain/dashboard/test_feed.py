"""The feed: what it keeps, what it tells, and what happens when nobody answers or reads."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from swarmtrain.dashboard import feed as feeds
from swarmtrain.dashboard.feed import Feed
from tests.swarmtrain.fake_run import FakeClient, FakeRun


def drain(subscriber: feeds.Subscriber) -> list[dict[str, Any] | None]:
    queue = subscriber._queue
    return [queue.get_nowait() for _ in range(queue.qsize())]


async def settle() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


def test_only_what_changed_is_told() -> None:
    async def go() -> None:
        run = FakeRun()
        client = FakeClient(run)
        feed = Feed(lambda: client)
        feed.poll()
        subscriber = feed.subscribe(asyncio.get_running_loop())
        assert subscriber is not None
        feed.poll()
        await settle()
        assert drain(subscriber) == []
        run.rounds += 1
        feed.poll()
        await settle()
        (delta,) = drain(subscriber)
        assert delta is not None
        assert set(delta) == {"run", "peers", "rounds", "timeline"}
        client.push({"seq": 9000, "name": "evaluated", "code": "T520", "round": 25, "loss": 1.5})
        await settle()
        (delta,) = drain(subscriber)
        assert delta is not None
        assert delta["losses"] == [[25, 1.5]]
        assert [record["seq"] for record in delta["events"]] == [9000]
        client.push({"seq": 9000, "name": "evaluated", "code": "T520", "round": 25, "loss": 1.5})
        await settle()
        assert drain(subscriber) == []  # already known
        assert feed.snapshot()["losses"][-1] == [25, 1.5]

    asyncio.run(go())


def test_a_peer_process_that_goes_away_and_comes_back() -> None:
    clients = [FakeClient(FakeRun()), FakeClient(FakeRun(30))]
    feed = Feed(lambda: clients[0])
    feed.poll()
    assert feed.connected
    clients[0].closed = True
    feed.poll()
    assert not feed.connected
    snapshot = feed.snapshot()
    assert "went away" in snapshot["source"]["error"]
    assert snapshot["run"]["rounds_committed"] == 24  # the last that was known
    clients.pop(0)
    feed.poll()
    assert feed.connected
    assert feed.snapshot()["run"]["rounds_committed"] == 30


def test_a_viewer_that_does_not_read_is_dropped() -> None:
    async def go() -> None:
        feed = Feed(lambda: FakeClient(FakeRun()))
        subscriber = feed.subscribe(asyncio.get_running_loop())
        assert subscriber is not None
        for number in range(feeds.DELTAS_QUEUED_MAX + 1):
            subscriber.put({"n": number})
        await settle()
        assert await subscriber.get() is None

    asyncio.run(go())


def test_viewers_are_bounded() -> None:
    async def go() -> None:
        feed = Feed(lambda: FakeClient(FakeRun()))
        loop = asyncio.get_running_loop()
        viewers = [feed.subscribe(loop) for _ in range(feeds.SUBSCRIBERS_MAX)]
        assert feed.subscribe(loop) is None
        assert viewers[0] is not None
        feed.unsubscribe(viewers[0])
        assert feed.subscribe(loop) is not None

    asyncio.run(go())


def test_rows_without_a_known_round_are_not_drawn() -> None:
    run = FakeRun(3)
    feed = Feed(lambda: FakeClient(run))
    feed.poll()
    assert {row["round"] for row in feed.snapshot()["timeline"]} == {0, 1, 2}
    rounds = run.all_rounds
    run.all_rounds = lambda: {"rounds": rounds()["rounds"][2:]}  # type: ignore[method-assign]
    feed.poll()
    assert {row["round"] for row in feed.snapshot()["timeline"]} == {2}
    assert all(row["decided_wall_s"] for row in feed.snapshot()["timeline"])


def test_the_thread_polls_until_it_is_stopped() -> None:
    run = FakeRun()
    asked = threading.Event()

    class Client(FakeClient):
        def call(
            self, name: str, args: dict[str, Any] | None = None, timeout_s: float = 30.0
        ) -> dict[str, Any]:
            if name == "metrics":
                asked.set()
            return super().call(name, args, timeout_s)

    client = Client(run)
    feed = Feed(lambda: client)
    feed.start()
    assert asked.wait(5)
    feed.stop()
    assert client.closed
    polls = feed.polls
    assert polls >= 1
    assert feed.connected
