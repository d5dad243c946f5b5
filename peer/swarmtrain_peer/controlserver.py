"""The control socket of a site, from the side of its peer process; the form is that of ``control``.

Only the site's owner may open it. Trainers, the command line and the dashboard all come in here, so
that there is one door with one set of bounds.

Nothing is dropped in silence: a client that does not read its pushes is disconnected, reconnects
and asks for a fresh status.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from swarmtrain_peer.control import Document, error_to_dict, socket_address
from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import LocalProtocolError, SwarmError


class ControlConnection:
    """One client of the server, as its backend sees it. Use from the server's event loop only."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._queue: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._close_callbacks: list[Callable[[], None]] = []
        self.closed = False
        self.data: dict[str, object] = {}
        """Free for the backend: what it remembers about this client."""

    def push(self, document: Document) -> None:
        """Send ``document`` (it must have ``event``) without waiting.

        A client that left ``CONTROL_PUSHES_QUEUED_MAX`` messages unread is disconnected.
        """
        assert "event" in document, "a push names its event"
        self.send(document)

    def send(self, document: Document) -> None:
        if self.closed:
            return
        line = msgspec.json.encode(document) + b"\n"
        if len(line) > limits.CONTROL_LINE_BYTES_MAX:
            raise LocalProtocolError(
                "message too long for the control socket", f"{len(line)} bytes"
            )
        if len(self._queue) >= limits.CONTROL_PUSHES_QUEUED_MAX:
            self.close(backlog=False)
            return
        self._queue.append(line)
        self._wake.set()

    def on_close(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once when this client is gone; at once if it already is."""
        if self.closed:
            callback()
        else:
            self._close_callbacks.append(callback)

    def close(self, *, backlog: bool = True) -> None:
        """Disconnect and tell whoever asked to be told. Safe to call twice.

        ``backlog``: hand what is queued to the socket first; false for a client that does not read.
        """
        if self.closed:
            return
        self.closed = True
        self._wake.set()
        if backlog:
            while self._queue:
                self._writer.write(self._queue.popleft())
            self._writer.close()
        else:
            self._writer.transport.abort()
        for callback in self._close_callbacks:
            callback()
        self._close_callbacks.clear()

    async def write_loop(self) -> None:
        """Move the queue into the socket as fast as the client reads."""
        while not self.closed:
            await self._wake.wait()
            self._wake.clear()
            while self._queue and not self.closed:
                self._writer.write(self._queue.popleft())
                if not self._queue or self._writer.transport.get_write_buffer_size() > 65536:
                    await self._writer.drain()


class ControlBackend(Protocol):
    """What the peer process offers on its control socket."""

    async def call(self, name: str, args: Document, connection: ControlConnection) -> Document:
        """Answer one call.

        Raises:
            SwarmError: becomes the error of the answer.
        """


class ControlServer:
    """Serves one backend on a Unix socket with mode 0600."""

    def __init__(self, path: Path, backend: ControlBackend) -> None:
        self._path = path
        self._backend = backend
        self._server: asyncio.Server | None = None
        self._connections: list[ControlConnection] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False
        self.refused_connections = 0
        self.bad_lines = 0

    @property
    def connections(self) -> tuple[ControlConnection, ...]:
        """The clients of now, oldest first."""
        return tuple(self._connections)

    async def start(self) -> None:
        """Listen. The site's lock is held, so a socket file that is in the way is a leftover."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with socket_address(self._path) as address:
                sock.bind(address)
            os.chmod(self._path, 0o600)  # before listen: nobody can connect in between
            self._server = await asyncio.start_unix_server(
                self._accept, sock=sock, limit=limits.CONTROL_LINE_BYTES_MAX
            )
        except BaseException:
            sock.close()
            raise

    def push_all(self, document: Document) -> None:
        """Push to every client."""
        for connection in self.connections:
            connection.push(document)

    async def close(self) -> None:
        """Stop listening, disconnect everybody, remove the socket file."""
        self._closed = True  # one may be accepted already and not be among the connections yet
        if self._server is not None:
            self._server.close()
        for connection in self.connections:
            connection.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._connections.clear()  # of those cancelled before their first step
        # It may be gone, or the disk fails, which whoever ends because of it says better.
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._closed or len(self._connections) >= limits.CONTROL_CONNECTIONS_MAX:
            self.refused_connections += 1
            writer.close()
            return
        connection = ControlConnection(writer)
        self._connections.append(connection)
        task = asyncio.create_task(self._serve(reader, connection))
        self._tasks.append(task)
        task.add_done_callback(self._tasks.remove)

    async def _serve(self, reader: asyncio.StreamReader, connection: ControlConnection) -> None:
        writing = asyncio.create_task(connection.write_loop())
        calls: set[asyncio.Task[None]] = set()
        try:
            await self._read(reader, connection, calls)
        except (ConnectionError, asyncio.CancelledError):
            pass  # the client is gone or the server closes; both end here
        finally:
            self._connections.remove(connection)
            connection.close()
            for pending in (writing, *calls):
                pending.cancel()
            await asyncio.gather(writing, *calls, return_exceptions=True)

    async def _read(
        self,
        reader: asyncio.StreamReader,
        connection: ControlConnection,
        calls: set[asyncio.Task[None]],
    ) -> None:
        while not connection.closed:
            try:
                line = await reader.readline()
            except ValueError:  # longer than the limit: the stream cannot be followed any more
                self.bad_lines += 1
                connection.send(_failure(None, SwarmError("line too long")))
                return
            if not line:
                return
            try:
                request = msgspec.json.decode(line, type=Document)
                number, name, args = request["id"], request["call"], request.get("args", {})
                if not isinstance(name, str) or not isinstance(args, dict):
                    raise ValueError("call is text and args an object")
            except (ValueError, KeyError, RecursionError) as error:
                self.bad_lines += 1
                connection.send(_failure(None, SwarmError("malformed request", str(error))))
                return
            if len(calls) >= limits.CONTROL_CALLS_IN_FLIGHT_MAX:
                await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            task = asyncio.create_task(self._call(number, name, args, connection))
            calls.add(task)
            task.add_done_callback(calls.discard)

    async def _call(
        self, number: object, name: str, args: Document, connection: ControlConnection
    ) -> None:
        try:
            result = await self._backend.call(name, args, connection)
            connection.send({"id": number, "ok": True, "result": result})
        except SwarmError as error:
            connection.send(_failure(number, error))
        except Exception as error:  # noqa: BLE001
            # The client learns of a bug; what the process does about it is its handler's decision.
            what = SwarmError(f"internal error in {name}", f"{type(error).__name__}: {error}")
            connection.send(_failure(number, what))
            context = {"message": f"control call {name} failed", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)


def _failure(number: object, error: SwarmError) -> Document:
    return {"id": number, "ok": False, "error": error_to_dict(error)}
