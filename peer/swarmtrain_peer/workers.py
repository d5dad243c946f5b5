"""Threads that do not end in silence.

An exception that nobody expects is a broken invariant. On the event loop it reaches whoever called;
on a thread of its own it would end that thread only, and the process would go on without it: no
fetch would ever finish. So it is handed to whoever can end the process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

Broken = Callable[[BaseException], object]
"""Hears, on the thread that broke, of what ended it."""


def start_thread(name: str, work: Callable[[], None], broken: Broken) -> threading.Thread:
    """Run ``work`` on a daemon thread; ``broken`` hears of any exception that escapes it."""

    def run() -> None:
        try:
            work()
        except BaseException as error:
            broken(error)
            raise  # with its traceback on standard error

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


def only_told(error: BaseException) -> None:
    """Nobody can be ended: the traceback on standard error has to do."""
