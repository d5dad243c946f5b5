"""A TCP proxy in front of one listener: hands every byte on, late, slowly, or not as it was.

Delays, rates, resets, half-open connections, single bytes, cuts and flipped bits at a given byte,
and directions that carry nothing for a while. What it did is in ``struck``.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

PIECE_BYTES = 65536
HELD_BYTES_MAX = 64 * 1024 * 1024
"""What a direction holds at most before the proxy stops reading, as a full socket would."""
POLL_S = 0.02
MOVED_MAX = 200_000


@dataclass
class Struck:
    """A fault that has hit a connection. ``ended_s``: when one of its ends closed it."""

    kind: str
    at_s: float
    ended_s: float | None = None


@dataclass
class _Pipe:
    """One connection through the proxy. ``dialler``: who dialled, if anybody knows."""

    dialler: str
    near: asyncio.StreamWriter
    far: asyncio.StreamWriter | None = None
    struck: list[Struck] = field(default_factory=list)

    def reset(self) -> None:
        """Close both ends with RST: what was under way is lost."""
        for writer in (self.near, self.far):
            if writer is not None:
                sock = writer.get_extra_info("socket")
                with contextlib.suppress(OSError):
                    linger = struct.pack("ii", 1, 0)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()

    def ended(self) -> None:
        for one in self.struck:
            one.ended_s = one.ended_s or time.monotonic()


@dataclass
class _Held:
    """Bytes of one direction that are in the proxy now."""

    nbytes: int = 0


async def _until(free: Callable[[], bool]) -> None:
    while not free():  # noqa: ASYNC110, faults are set from other threads
        await asyncio.sleep(POLL_S)


class Proxy:
    """Listens on ``address``; forwards to 127.0.0.1:``target_port``, which may be set later.

    ``delay_s`` is one way, in both directions, and may change: a piece is late by what it was when
    it arrived. ``moved`` lists (monotonic s, bytes) of every piece when it leaves. ``name`` is
    whose listener it is; ``who`` tells from a source port who dialled; ``cut`` has pairs of names
    between which, in that direction, nothing moves.
    """

    def __init__(self, name: str = "", who: Callable[[int], str] | None = None) -> None:
        self.delay_s = 0.0
        self.target_port = 0
        self.piece_bytes = PIECE_BYTES
        self.bytes_per_s = 0.0
        self.silent = False
        """Connections stay open and carry nothing."""
        self.cut: frozenset[tuple[str, str]] = frozenset()
        self.moved: deque[tuple[float, int]] = deque(maxlen=MOVED_MAX)
        self.struck: list[Struck] = []
        self._name = name
        self._who = who
        self._strikes: list[tuple[str, int]] = []
        self._pipes: list[_Pipe] = []
        self._free_s = {True: 0.0, False: 0.0}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
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

    # Faults

    def strike(self, kind: str, after_bytes: int) -> None:
        """``reset``, ``close`` or ``flip`` the connection that carries the nth byte from now on."""
        self._loop.call_soon_threadsafe(self._strikes.append, (kind, after_bytes))

    def reset_all(self) -> None:
        """Reset every connection there is now."""
        self._loop.call_soon_threadsafe(self._reset_all)

    def _reset_all(self) -> None:
        for pipe in list(self._pipes):
            self._hit("reset", pipe)
            pipe.reset()

    def _hit(self, kind: str, pipe: _Pipe) -> None:
        one = Struck(kind, time.monotonic())
        self.struck.append(one)
        pipe.struck.append(one)

    # Connections

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        port = writer.get_extra_info("peername")[1]
        pipe = _Pipe(self._who(port) if self._who is not None else "", writer)
        try:
            await _until(lambda: not (self._held(pipe, True) or self._held(pipe, False)))
            inner, pipe.far = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            writer.close()
            return
        self._pipes.append(pipe)
        try:
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):  # the end of it all
                await asyncio.gather(
                    self._carry(pipe, reader, pipe.far, True),
                    self._carry(pipe, inner, writer, False),
                )
        finally:
            self._pipes.remove(pipe)
            pipe.ended()

    async def _carry(
        self,
        pipe: _Pipe,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        inward: bool,
    ) -> None:
        line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        held = _Held()
        leaving = asyncio.create_task(self._leave(pipe, line, held, writer, inward))
        try:
            while True:
                await _until(lambda: held.nbytes <= HELD_BYTES_MAX)
                try:
                    data = await reader.read(PIECE_BYTES)
                except ConnectionError:
                    pipe.ended()
                    raise
                held.nbytes += len(data)
                line.put_nowait((time.monotonic() + self.delay_s, data))
                if not data:
                    pipe.ended()
                    await leaving
                    return
        finally:
            leaving.cancel()
            writer.close()

    async def _leave(
        self,
        pipe: _Pipe,
        line: asyncio.Queue[tuple[float, bytes]],
        held: _Held,
        writer: asyncio.StreamWriter,
        inward: bool,
    ) -> None:
        while True:
            due_s, data = await line.get()
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            await _until(lambda: not self._held(pipe, inward))
            held.nbytes -= len(data)
            if not data:
                return
            self.moved.append((time.monotonic(), len(data)))
            data = self._altered(pipe, data)
            size = self.piece_bytes
            for first in range(0, len(data), size):
                writer.write(data[first : first + size])
                await writer.drain()
                if size == 1:
                    await asyncio.sleep(0)
            if self.bytes_per_s:  # all connections together, each direction for itself
                now = time.monotonic()
                self._free_s[inward] = max(now, self._free_s[inward]) + len(data) / self.bytes_per_s
                await asyncio.sleep(self._free_s[inward] - now)

    def _held(self, pipe: _Pipe, inward: bool) -> bool:
        ends = (pipe.dialler, self._name) if inward else (self._name, pipe.dialler)
        return self.silent or ends in self.cut

    def _altered(self, pipe: _Pipe, data: bytes) -> bytes:
        """The strikes that fall into this piece; a cut leaves only what is before it."""
        left: list[tuple[str, int]] = []
        strikes, self._strikes = self._strikes, left
        for kind, after in strikes:
            if after >= len(data):
                left.append((kind, after - len(data)))
                continue
            self._hit(kind, pipe)
            if kind == "flip":
                data = data[:after] + bytes([data[after] ^ 0x10]) + data[after + 1 :]
                continue
            data = data[:after]
            if kind == "reset":
                pipe.reset()
            else:
                for writer in (pipe.near, pipe.far):
                    if writer is not None:
                        self._loop.call_soon(writer.close)
        return data
