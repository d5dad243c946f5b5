"""A TCP proxy that hands every byte on after a delay, and remembers when it did."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from concurrent.futures import Future

PIECE_BYTES = 65536


class DelayLine:
    """Listens on ``address``; forwards to 127.0.0.1:``target_port``, which may be set later.

    ``delay_s`` is one way, in both directions, and may change: a piece is late by what it was when
    it arrived. ``moved`` lists (monotonic s, bytes) of every piece when it leaves.
    """

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.target_port = 0
        self.moved: list[tuple[float, int]] = []
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="delay-line", daemon=True)
        self._started: Future[int] = Future()
        self._thread.start()
        self.address = f"127.0.0.1:{self._started.result(10.0)}"

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self._started.set_result(server.sockets[0].getsockname()[1])
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10.0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            writer.close()
            return
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):  # the end of the test
            await asyncio.gather(self._carry(reader, inner[1]), self._carry(inner[0], writer))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        leaving = asyncio.create_task(self._leave(line, writer))
        try:
            while True:
                data = await reader.read(PIECE_BYTES)
                line.put_nowait((time.monotonic() + self.delay_s, data))
                if not data:
                    await leaving
                    return
        finally:
            leaving.cancel()
            writer.close()

    async def _leave(
        self, line: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        while True:
            due_s, data = await line.get()
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            if not data:
                return
            self.moved.append((time.monotonic(), len(data)))
            writer.write(data)
            await writer.drain()
