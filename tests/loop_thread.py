"""An event loop on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for a test that does not run in a loop itself.

    ``close`` cancels what still runs, as ``asyncio.run`` does: a coroutine that is left in a closed
    loop ends in whichever test the garbage collector comes to it, and fails that one.
    """

    def __init__(self) -> None:
        ready = threading.Event()

        async def until_closed() -> None:
            self.loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
            ready.set()
            await self._closing.wait()

        self._thread = threading.Thread(target=lambda: asyncio.run(until_closed()))
        self._thread.start()
        assert ready.wait(10), "the thread did not start"

    def do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What ``coroutine`` returns, within ten seconds."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(10)
        assert not self._thread.is_alive(), "the loop did not end"
