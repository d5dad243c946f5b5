"""What escapes a thread is handed on, with its traceback still told."""

from __future__ import annotations

import threading

import pytest

from swarmtrain_peer.workers import start_thread


def test_what_escapes_is_handed_on_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[BaseException | None] = []
    heard: list[BaseException] = []
    monkeypatch.setattr(threading, "excepthook", lambda what: told.append(what.exc_value))
    error = ZeroDivisionError("a broken invariant")

    def work() -> None:
        raise error

    start_thread("t", work, heard.append).join(10)
    assert heard == [error]
    assert told == [error]


def test_work_that_ends_by_itself_is_no_news() -> None:
    heard: list[BaseException] = []
    done = threading.Event()
    thread = start_thread("t", done.set, heard.append)
    thread.join(10)
    assert (thread.name, thread.daemon, done.is_set(), heard) == ("t", True, True, [])
