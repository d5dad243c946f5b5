"""Feeds trackers from a live site, on a thread of its own.

It has its own connection to the site's control socket, so that a slow tracker holds up nobody. A
tracker that raises is closed and said to be, the others go on.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial

from swarmtrain.trackers.base import (
    Document,
    Scalars,
    Tracker,
    scalars_of_event,
    scalars_of_status,
)
from swarmtrain_peer import host
from swarmtrain_peer.control import Client
from swarmtrain_protocols.errors import ConfigError, SwarmError

POLL_S = 5.0
CALL_TIMEOUT_S = 5.0
INBOX_MAX = 4096
CLOSE_S = 20.0
TOLD_FIRST = ("run", "name", "site", "site_name")


class Follower:
    """Use ``start`` and ``close``, or as a context manager.

    Args:
        connect: opens a control connection to the site.
        note: told in a sentence when a tracker fails.
    """

    def __init__(
        self,
        connect: Callable[[], Client],
        trackers: Sequence[Tracker],
        note: Callable[[str], None],
    ) -> None:
        self._connect = connect
        self._trackers = list(trackers)
        self._note = note
        self._inbox: queue.Queue[Document | None] = queue.Queue(INBOX_MAX)
        self._client: Client | None = None
        self._last_seq = 0
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self.dropped = 0
        """Events that came while a tracker was busy for too long."""

    def start(self) -> Follower:
        """Begin all trackers and follow the site.

        Raises:
            ConfigError: a tracker cannot begin.
            ControlClosed: the site is not live.
        """
        if not self._trackers:
            return self
        status = self._connected().call("status", timeout_s=CALL_TIMEOUT_S)
        begun: list[Tracker] = []
        try:
            for tracker in self._trackers:
                tracker.begin({key: status.get(key) for key in TOLD_FIRST})
                begun.append(tracker)
        except ConfigError:
            for tracker in begun:
                tracker.close()
            raise
        self._thread = threading.Thread(target=self._run, name="trackers", daemon=True)
        self._thread.start()
        return self

    def _connected(self) -> Client:
        if self._client is None or self._client.closed:
            client = self._connect()
            client.subscribe(self._pushed)
            arguments = {"since_seq": self._last_seq, "last": 500, "follow": True}
            for record in client.call("events", arguments, CALL_TIMEOUT_S).get("events", []):
                self._put(record)
            self._client = client
        return self._client

    def _pushed(self, document: Document) -> None:
        if document.get("event") == "event":
            self._put(document["record"])

    def _put(self, record: Document) -> None:
        try:
            self._inbox.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def _run(self) -> None:
        next_poll_s = host.mono_s()
        while self._trackers and not (self._ending.is_set() and self._inbox.empty()):
            left_s = max(0.0, next_poll_s - host.mono_s())
            with contextlib.suppress(queue.Empty):
                record = self._inbox.get(timeout=left_s) if left_s else self._inbox.get_nowait()
                if record is not None and int(record.get("seq", 0)) > self._last_seq:
                    self._last_seq = int(record["seq"])
                    self._tell(scalars_of_event(record), float(record["wall_s"]))
            if host.mono_s() >= next_poll_s:
                next_poll_s = host.mono_s() + POLL_S
                with contextlib.suppress(SwarmError):  # away, and maybe back by the next time
                    status = self._connected().call("status", timeout_s=CALL_TIMEOUT_S)
                    self._tell(scalars_of_status(status), host.wall_s())
        for tracker in list(self._trackers):
            self._guarded(tracker, tracker.close)

    def _tell(self, found: tuple[int, Scalars] | None, wall_s: float) -> None:
        if found is None:
            return
        step, values = found
        for tracker in list(self._trackers):
            self._guarded(tracker, partial(tracker.scalars, step, wall_s, values))

    def _guarded(self, tracker: Tracker, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001, a tracker is somebody else's code
            self._trackers.remove(tracker)
            what = f"{type(tracker).__name__} has failed and gets no more figures"
            self._note(f"{what}: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Pass on what has come, close the trackers. Safe to call twice."""
        self._ending.set()
        with contextlib.suppress(queue.Full):
            self._inbox.put_nowait(None)
        if self._thread is not None:
            self._thread.join(CLOSE_S)
        if self._client is not None:
            self._client.close()

    def __enter__(self) -> Follower:
        return self.start()

    def __exit__(self, *unused: object) -> None:
        self.close()
