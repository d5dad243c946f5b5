"""The control socket of a site: JSON lines on a Unix socket that only its owner may open.

A request is ``{"id", "call", "args"}``; the answer ``{"id", "ok": true, "result"}`` or
``{"id", "ok": false, "error": {code, exit_code, what, why, todo}}``. The peer process may push
``{"event": name, ...}`` at any time. Trainers, the command line and the dashboard all come in
here, so that there is one door with one set of bounds. Bytes values are hex text, put there by
the caller; NaN and infinities travel as null.

Nothing is dropped in silence: a client that does not read its pushes is disconnected, reconnects
and asks for a fresh status.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import queue
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec

from swarmtrain_protocols import errors, limits
from swarmtrain_protocols.errors import LocalProtocolError, PeerFault, SwarmError

Document = dict[str, Any]
"""One JSON object."""

SUN_PATH_BYTES_MAX = 100
"""A Unix socket address holds 108 bytes on Linux and 104 on macOS, the final NUL included."""


class ControlClosed(SwarmError):
    """The peer process went away, or was never there. Restarting it helps."""

    exit_code = 75


class ControlTimeout(SwarmError):
    """The peer process did not answer in time."""

    exit_code = 75


def error_to_dict(error: SwarmError) -> Document:
    """``error`` as the ``error`` field of an answer."""
    out: Document = {
        "code": type(error).__name__,
        "exit_code": error.exit_code,
        "what": error.what,
        "why": error.why,
        "todo": error.todo,
    }
    if isinstance(error, errors.RoundFailed):
        out["retry"] = error.retry
    return out


def _error_classes() -> dict[str, type[SwarmError]]:
    found: dict[str, type[SwarmError]] = {"SwarmError": SwarmError}
    pending: list[type[SwarmError]] = [SwarmError]
    while pending:
        for child in pending.pop().__subclasses__():
            found[child.__name__] = child
            pending.append(child)
    return found


def error_from_dict(data: Document) -> SwarmError:
    """The error that ``error_to_dict`` was given, of the same class where this side knows it."""
    what, why, todo = (str(data.get(key, "")) for key in ("what", "why", "todo"))
    code = str(data.get("code", ""))
    if code == "PeerFault":
        return PeerFault(what, why)
    if code == "RoundFailed":
        return errors.RoundFailed(what, why, todo, retry=bool(data.get("retry", True)))
    error = _error_classes().get(code, SwarmError)(what, why, todo)
    exit_code = data.get("exit_code")
    if type(exit_code) is int and 0 < exit_code < 256:
        error.exit_code = exit_code
    return error


@contextlib.contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """An address for ``path`` that fits a Unix socket, however deep the site's folder lies.

    Long paths go through an open descriptor of the folder, which Linux offers as a short path.
    """
    if len(os.fsencode(path)) <= SUN_PATH_BYTES_MAX:
        yield str(path)
        return
    if not Path("/proc/self/fd").is_dir():
        raise errors.ConfigError(
            "the control socket's path is too long",
            f"{path} has more than {SUN_PATH_BYTES_MAX} bytes",
            "set SWARMTRAIN_HOME to a shorter folder",
        )
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{path.name}"
    finally:
        os.close(descriptor)


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
                self._serve, sock=sock, limit=limits.CONTROL_LINE_BYTES_MAX
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
        if self._server is not None:
            self._server.close()
        for connection in self.connections:
            connection.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= limits.CONTROL_CONNECTIONS_MAX:
            self.refused_connections += 1
            writer.close()
            return
        connection = ControlConnection(writer)
        self._connections.append(connection)
        self._tasks.append(task)
        writing = asyncio.create_task(connection.write_loop())
        calls: list[asyncio.Task[None]] = []
        try:
            await self._read(reader, connection, calls)
        except (ConnectionError, asyncio.CancelledError):
            pass  # the client is gone or the server closes; both end here
        finally:
            self._connections.remove(connection)
            self._tasks.remove(task)
            connection.close()
            for pending in (writing, *calls):
                pending.cancel()
            await asyncio.gather(writing, *calls, return_exceptions=True)

    async def _read(
        self,
        reader: asyncio.StreamReader,
        connection: ControlConnection,
        calls: list[asyncio.Task[None]],
    ) -> None:
        slots = asyncio.Semaphore(limits.CONTROL_CALLS_IN_FLIGHT_MAX)

        def done(task: asyncio.Task[None]) -> None:
            calls.remove(task)
            slots.release()

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
            await slots.acquire()
            task = asyncio.create_task(self._call(number, name, args, connection))
            calls.append(task)
            task.add_done_callback(done)

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


class _Pending:
    """A call that waits for its answer."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.answer: Document | None = None


class ControlClient:
    """A blocking, thread-safe client.

    One background thread reads; pushes are handed to callbacks on a second one, so that a callback
    may itself ``call``. ``closed`` turns true when the peer process is gone.

    Raises:
        ControlClosed: nobody listens at ``path``.
    """

    def __init__(self, path: Path, *, connect_timeout_s: float = 5.0) -> None:
        self._path = path
        self._ids = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._callbacks: list[Callable[[Document], None]] = []
        self._close_callbacks: list[Callable[[], None]] = []
        self._pushes: queue.Queue[Document | None] = queue.Queue(limits.CONTROL_PUSHES_QUEUED_MAX)
        self._closed = threading.Event()
        self._told_closed = False
        self._dispatcher: threading.Thread | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(connect_timeout_s)
        try:
            with socket_address(path) as address:
                self._socket.connect(address)
        except OSError as error:
            self._socket.close()
            raise ControlClosed(
                "no peer process answers",
                f"{path}: {error.strerror or error}",
                "start one with `swarmtrain join TICKET` or `swarmtrain up`",
            ) from None
        self._socket.settimeout(None)
        self._reader = threading.Thread(target=self._read, name="control-reader", daemon=True)
        self._reader.start()

    @property
    def closed(self) -> bool:
        """True once no call can succeed any more."""
        return self._closed.is_set()

    def call(self, name: str, args: Document | None = None, timeout_s: float = 30.0) -> Document:
        """Make one call and wait for its result.

        Raises:
            SwarmError: the typed error that the peer process answered with.
            ControlClosed: the peer process went away before it answered.
            ControlTimeout: no answer within ``timeout_s``; the call may still take effect.
        """
        number = next(self._ids)
        line = msgspec.json.encode({"id": number, "call": name, "args": args or {}}) + b"\n"
        if len(line) > limits.CONTROL_LINE_BYTES_MAX:
            raise LocalProtocolError("call too long", f"{name}: {len(line)} bytes")
        pending = _Pending()
        with self._lock:
            if self.closed:
                raise self._gone(name)
            self._pending[number] = pending
        try:
            with self._send_lock:
                self._socket.sendall(line)
            if not pending.done.wait(timeout_s):
                raise ControlTimeout(f"no answer to {name}", f"waited {timeout_s:g} s")
        except OSError:
            raise self._gone(name) from None
        finally:
            with self._lock:
                self._pending.pop(number, None)
        if pending.answer is None:
            raise self._gone(name)
        if not pending.answer.get("ok"):
            raise error_from_dict(pending.answer.get("error") or {})
        result: Document = pending.answer.get("result") or {}
        return result

    def subscribe(self, callback: Callable[[Document], None]) -> None:
        """Call ``callback`` with every push from now on, in order, on one background thread."""
        with self._lock:
            self._callbacks.append(callback)
            if self._dispatcher is None:
                self._dispatcher = threading.Thread(
                    target=self._dispatch, name="control-pushes", daemon=True
                )
                self._dispatcher.start()

    def on_close(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once when the connection has ended and every push was handed on; at
        once if that is so already."""
        with self._lock:
            if not self._told_closed:
                self._close_callbacks.append(callback)
                return
        callback()

    def close(self) -> None:
        """Disconnect. Safe to call twice and from any thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._reader:
            self._reader.join(timeout=5.0)

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _gone(self, name: str) -> ControlClosed:
        return ControlClosed(
            "the peer process went away",
            f"during {name} on {self._path}",
            "look at its log file in the site folder",
        )

    def _read(self) -> None:
        stream = self._socket.makefile("rb")
        try:
            while line := stream.readline(limits.CONTROL_LINE_BYTES_MAX + 1):
                self._feed(msgspec.json.decode(line, type=Document))
        except (OSError, ValueError, RecursionError):
            pass  # any of them ends the connection, and every waiting call says so
        finally:
            self._end()

    def _feed(self, document: Document) -> None:
        if "event" in document:
            with self._lock:
                wanted = bool(self._callbacks)
            if wanted:
                # A full queue blocks this thread, the server sees it and disconnects: never silent.
                self._pushes.put(document)
            return
        with self._lock:
            pending = self._pending.get(document.get("id") or 0)
        if pending is not None:
            pending.answer = document
            pending.done.set()

    def _end(self) -> None:
        with self._lock:
            self._closed.set()
            waiting = list(self._pending.values())
            dispatching = self._dispatcher is not None
        for pending in waiting:
            pending.done.set()
        self._socket.close()
        if dispatching:
            self._pushes.put(None)  # the last push is heard before the end is
        else:
            self._tell_closed()

    def _tell_closed(self) -> None:
        with self._lock:
            callbacks, self._close_callbacks = self._close_callbacks, []
            self._told_closed = True
        for callback in callbacks:
            callback()

    def _dispatch(self) -> None:
        while (document := self._pushes.get()) is not None:
            for callback in list(self._callbacks):
                with contextlib.suppress(ControlClosed):  # told by ``closed`` and ``on_close``
                    callback(document)
        self._tell_closed()
