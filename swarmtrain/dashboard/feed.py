"""What the dashboard knows: one snapshot, kept fresh from a peer process's control socket.

A thread asks for the slow parts once a second while somebody watches (every ten seconds else) and
takes events as they are pushed. If the peer process goes away the last snapshot stays, marked as
not connected, and the thread tries again. Subscribers get only the sections that changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from swarmtrain_peer import host
from swarmtrain_peer.control import Client, ControlClient
from swarmtrain_protocols.errors import SwarmError

Document = dict[str, Any]

POLL_S = 1.0
IDLE_POLL_S = 10.0
CALL_TIMEOUT_S = 5.0
EVENTS_KEPT = 500
LOSSES_KEPT = 4096
FIGURES_KEPT = 2048
ROUNDS_KEPT = 200
SUBSCRIBERS_MAX = 100
DELTAS_QUEUED_MAX = 64
NOISY = (
    "peer_connected",
    "contribution_ready",
    "round_opened",
    "round_set",
    "part_reduced",
    "result_held",
    "round_figures",
    "state_applied",
    "step_closed",
    "handover",
)
"""Kinds of events that are asked for with ``/api/v1/events`` but not shown by default."""


class Subscriber:
    """One viewer's queue. Whoever does not read is dropped and starts again with a snapshot."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: asyncio.Queue[Document | None] = asyncio.Queue(DELTAS_QUEUED_MAX)

    def put(self, delta: Document | None) -> None:
        """From any thread; None ends the stream."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: so is the viewer
            self._loop.call_soon_threadsafe(self._put, delta)

    def _put(self, delta: Document | None) -> None:
        if self._queue.full():
            while not self._queue.empty():
                self._queue.get_nowait()
            delta = None
        self._queue.put_nowait(delta)

    async def get(self) -> Document | None:
        return await self._queue.get()


class Feed:
    """The snapshot and its viewers. Thread-safe. ``connect`` opens a control connection."""

    def __init__(self, connect: Callable[[], Client]) -> None:
        self._connect = connect
        self._lock = threading.Lock()
        self._subscribers: list[Subscriber] = []
        self._wake = threading.Event()
        self._stopped = False
        self._thread: threading.Thread | None = None
        self._client: Client | None = None
        self._last_seq = 0
        self._run: Document = {}
        self._peers: list[Document] = []
        self._rounds: list[Document] = []
        self._events: deque[Document] = deque(maxlen=EVENTS_KEPT)
        self._losses: dict[int, float] = {}
        self._figures: dict[tuple[str, str, int], Document] = {}
        self._source: Document = {"connected": False, "error": "not asked yet", "age_s": None}
        self._fresh_s = host.mono_s()
        self.polls = 0

    @staticmethod
    def of_site(connect: Callable[[], ControlClient]) -> Feed:
        """A feed of a real site."""
        return Feed(connect)

    def start(self) -> None:
        """Begin to poll in the background."""
        self._thread = threading.Thread(target=self._loop, name="dashboard-feed", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and every viewer's stream."""
        self._stopped = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=CALL_TIMEOUT_S + 1)
        with self._lock:
            subscribers, self._subscribers = self._subscribers, []
        for subscriber in subscribers:
            subscriber.put(None)

    @property
    def connected(self) -> bool:
        return bool(self._source["connected"])

    def snapshot(self) -> Document:
        """Everything, as the first message of a stream."""
        with self._lock:
            return {
                "source": dict(self._source),
                "run": dict(self._run),
                "peers": list(self._peers),
                "rounds": list(self._rounds),
                "events": [e for e in self._events if e.get("name") not in NOISY][-100:],
                "losses": [[number, self._losses[number]] for number in sorted(self._losses)],
                "timeline": self._timeline(),
            }

    def events(self, since_seq: int = 0, last: int = 100, code: str = "") -> list[Document]:
        """Records in memory, oldest first."""
        with self._lock:
            found = [
                record
                for record in self._events
                if record.get("seq", 0) > since_seq and str(record.get("code", "")).startswith(code)
            ]
        return found[-last:] if last else []

    def subscribe(self, loop: asyncio.AbstractEventLoop) -> Subscriber | None:
        """A new viewer, or None if there are too many."""
        with self._lock:
            if len(self._subscribers) >= SUBSCRIBERS_MAX:
                return None
            subscriber = Subscriber(loop)
            self._subscribers.append(subscriber)
        self._wake.set()
        return subscriber

    def unsubscribe(self, subscriber: Subscriber) -> None:
        with self._lock:
            if subscriber in self._subscribers:
                self._subscribers.remove(subscriber)

    def poll(self) -> None:
        """Ask once and tell viewers what changed. The thread calls it; so may a test."""
        self.polls += 1
        try:
            client = self._connected_client()
            run = client.call("status", timeout_s=CALL_TIMEOUT_S)
            peers = client.call("peers", timeout_s=CALL_TIMEOUT_S)
            rounds = client.call("rounds", {"last": ROUNDS_KEPT}, timeout_s=CALL_TIMEOUT_S)
            metrics = client.call("metrics", timeout_s=CALL_TIMEOUT_S)
        except SwarmError as error:
            self._drop_client()
            source = {"connected": False, "error": str(error)}
            self._publish(self._change({"source": source}))
            return
        self._fresh_s = host.mono_s()
        delta: Document = {
            "source": {"connected": True, "error": None},
            "run": run,
            "peers": peers.get("peers", []),
            "rounds": rounds.get("rounds", []),
        }
        self._publish(self._change(delta, metrics.get("members", [])))

    def _connected_client(self) -> Client:
        if self._client is None or self._client.closed:
            client = self._connect()
            client.subscribe(self._on_push)
            arguments = {"since_seq": self._last_seq, "last": LOSSES_KEPT, "follow": True}
            answer = client.call("events", arguments, timeout_s=CALL_TIMEOUT_S)
            self._client = client
            self._take_events(answer.get("events", []))
        return self._client

    def _drop_client(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _on_push(self, push: Document) -> None:
        if push.get("event") == "event":
            self._take_events([push["record"]])

    def _take_events(self, records: list[Document]) -> None:
        fresh: list[Document] = []
        delta: Document = {}
        with self._lock:
            for record in records:
                if record.get("seq", 0) <= self._last_seq:
                    continue  # both in the answer and pushed
                self._last_seq = record["seq"]
                self._events.append(record)
                if record.get("name") not in NOISY:
                    fresh.append(record)
                loss, number = record.get("loss"), record.get("round")
                if record.get("name") == "evaluated" and loss is not None and number is not None:
                    self._losses[int(number)] = float(loss)
                    delta.setdefault("losses", []).append([int(number), float(loss)])
                if record.get("name") == "run_ended":  # the peer process may be gone before a poll
                    self._run = {**self._run, "ended": record.get("reason")}
                    delta["run"] = self._run
            while len(self._losses) > LOSSES_KEPT:
                del self._losses[min(self._losses)]
        if fresh:
            delta["events"] = fresh[-100:]
        if delta:
            self._publish(delta)

    def _change(self, sections: Document, figures: list[Document] | None = None) -> Document:
        """Take new sections; return those that differ from before."""
        delta: Document = {}
        with self._lock:
            for name, value in sections.items():
                if getattr(self, f"_{name}") != value:
                    setattr(self, f"_{name}", value)
                    delta[name] = value
            if figures is not None and self._take_figures(figures):
                delta["timeline"] = self._timeline()
        return delta

    def _take_figures(self, figures: list[Document]) -> bool:
        changed = False
        for row in figures:
            if row.get("id") is None or row.get("round") is None:
                continue
            key = (str(row["id"]), str(row.get("channel") or ""), int(row["round"]))
            if self._figures.get(key) != row:
                self._figures[key] = row
                changed = True
        while len(self._figures) > FIGURES_KEPT:
            del self._figures[next(iter(self._figures))]
        return changed

    def _timeline(self) -> list[Document]:
        """Figures by member and round, newest rounds last, with when the round was opened.

        Offsets and spans in a row count from ROUND_OPENED as the member saw it: it handed over at
        ``t_open_offset_s``, computed for ``compute_s`` before and waited ``wait_s`` after it. A row
        without ``send_s`` and ``receive_s`` is drawn as one exchange until ``decided_wall_s``.
        """
        rounds: dict[tuple[str, int], Document] = {
            (str(one.get("channel") or ""), int(one["round"])): one
            for one in self._rounds  # of several attempts the last, which decided
            if one.get("round") is not None and one.get("opened_wall_s") is not None
        }
        rows = []
        for (_, channel, number), row in self._figures.items():
            one = rounds.get((channel, number))
            if one is not None:
                times = {key: one.get(key) for key in ("opened_wall_s", "decided_wall_s")}
                rows.append({**row, **times})
        rows.sort(key=lambda row: (row["opened_wall_s"], str(row["id"])))
        return rows[-FIGURES_KEPT // 4 :]

    def _publish(self, delta: Document) -> None:
        if not delta:
            return
        with self._lock:
            subscribers = list(self._subscribers)
        for subscriber in subscribers:
            subscriber.put(delta)

    def _loop(self) -> None:
        while not self._stopped:
            self.poll()
            with self._lock:
                watched = bool(self._subscribers)
            self._wake.wait(POLL_S if watched else IDLE_POLL_S)
            self._wake.clear()
        self._drop_client()
