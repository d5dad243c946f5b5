"""The control socket of a site, from the side of whoever asks: JSON lines on a Unix socket.

A request is ``{"id", "call", "args"}``; the answer ``{"id", "ok": true, "result"}`` or
``{"id", "ok": false, "error": {code, exit_code, what, why, todo}}``. The peer process may push
``{"event": name, ...}`` at any time. Bytes values are hex text, put there by the caller; NaN and
infinities travel as null. The other side is ``controlserver``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import socket
import threading
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


class Client(Protocol):
    """What those who ask a peer process need of a ``ControlClient``."""

    @property
    def closed(self) -> bool: ...

    def call(self, name: str, args: Document | None = None, timeout_s: float = 30.0) -> Document:
        """Make one call."""

    def subscribe(self, callback: Callable[[Document], None]) -> None:
        """Hear pushes."""

    def close(self) -> None:
        """Disconnect."""


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
