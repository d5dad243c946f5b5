"""The control socket: answers, typed errors, pushes, bounds."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swarmtrain_peer import control
from swarmtrain_peer.control import ControlClient, ControlClosed, ControlTimeout
from swarmtrain_peer.controlserver import ControlServer
from swarmtrain_protocols import errors, limits
from tests.loop_thread import LoopThread

ALL_ERRORS = [
    errors.ConfigError("a", "b", "c"),
    errors.NotAuthorised("ticket expired"),
    errors.RunMismatch("other model", "different schema", "use the run's model"),
    errors.RoundFailed("aborted", "owner lost", "try again", retry=False),
    errors.PeerFault("malformed", "too long"),
    errors.SwarmError("plain"),
]


class Backend:
    """Answers what the tests ask; keeps its connections."""

    def __init__(self) -> None:
        self.connections: list[control.ControlConnection] = []
        self.closed = 0
        self.release = asyncio.Event()

    async def call(
        self, name: str, args: dict[str, Any], connection: control.ControlConnection
    ) -> dict[str, Any]:
        if name == "echo":
            return args
        if name == "attach":
            self.connections.append(connection)
            connection.on_close(self._count)
            return {}
        if name == "fail":
            raise ALL_ERRORS[args["which"]]
        if name == "bug":
            raise ZeroDivisionError("by zero")
        if name == "stuck":
            await self.release.wait()
            return {"late": True}
        if name == "release":
            self.release.set()
            return {}
        if name == "count":
            for number in range(args["pushes"]):
                connection.push({"event": "number", "number": number})
            return {}
        raise errors.UsageError(f"no call {name}")

    def _count(self) -> None:
        self.closed += 1


class Rig:
    """A server on its own loop thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.thread = LoopThread()
        self.bugs: list[dict[str, Any]] = []
        self.thread.loop.set_exception_handler(lambda _loop, context: self.bugs.append(context))
        self.run = self.thread.do
        self.backend = Backend()
        self.server = ControlServer(path, self.backend)
        self.run(self.server.start())

    def close(self) -> None:
        self.run(self.server.close())
        self.thread.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path / "control.sock")
    yield rig
    rig.close()


def test_calls_are_answered(rig: Rig) -> None:
    with ControlClient(rig.path) as client:
        assert client.call("echo", {"a": [1, "é", None]}) == {"a": [1, "é", None]}
        assert client.call("echo", {"x": float("nan")}) == {"x": None}
        assert not client.closed
    assert client.closed


def test_only_the_owner_may_connect(rig: Rig) -> None:
    assert stat.S_IMODE(os.stat(rig.path).st_mode) == 0o600


@pytest.mark.parametrize("which", range(len(ALL_ERRORS)))
def test_errors_arrive_as_their_own_class(rig: Rig, which: int) -> None:
    sent = ALL_ERRORS[which]
    with ControlClient(rig.path) as client, pytest.raises(errors.SwarmError) as caught:
        client.call("fail", {"which": which})
    assert type(caught.value) is type(sent)
    assert caught.value.exit_code == sent.exit_code
    assert (caught.value.what, caught.value.why, caught.value.todo) == (
        sent.what,
        sent.why,
        sent.todo,
    )
    if isinstance(sent, errors.RoundFailed):
        assert isinstance(caught.value, errors.RoundFailed)
        assert caught.value.retry is sent.retry


def test_an_unknown_error_class_keeps_its_exit_code() -> None:
    error = control.error_from_dict({"code": "FromTheFuture", "exit_code": 42, "what": "w"})
    assert (type(error), error.exit_code, error.what) == (errors.SwarmError, 42, "w")


def test_a_bug_is_answered_and_reported_to_the_loop(rig: Rig) -> None:
    with ControlClient(rig.path) as client:
        with pytest.raises(errors.SwarmError, match="internal error in bug"):
            client.call("bug")
        assert client.call("echo", {"still": 1}) == {"still": 1}
    assert isinstance(rig.bugs[0]["exception"], ZeroDivisionError)


def test_many_threads_share_a_client_and_a_slow_call_blocks_nobody(rig: Rig) -> None:
    results: list[tuple[int, dict[str, Any]]] = []
    with ControlClient(rig.path) as client:
        slow: list[dict[str, Any]] = []
        waiting = threading.Thread(target=lambda: slow.append(client.call("stuck")))
        waiting.start()

        def work(number: int) -> None:
            results.extend((number, client.call("echo", {"n": number})) for _ in range(20))

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert slow == []
        client.call("release")
        waiting.join()
    assert slow == [{"late": True}]
    assert len(results) == 80
    assert all(answer == {"n": number} for number, answer in results)


def test_a_call_has_a_deadline(rig: Rig) -> None:
    with ControlClient(rig.path) as client, pytest.raises(ControlTimeout):
        client.call("stuck", timeout_s=0.05)


def test_pushes_arrive_in_order_and_a_callback_may_call(rig: Rig) -> None:
    seen: list[int] = []
    done = threading.Event()
    with ControlClient(rig.path) as client:

        def callback(document: dict[str, Any]) -> None:
            seen.append(client.call("echo", {"n": document["number"]})["n"])
            if len(seen) == 100:
                done.set()

        client.subscribe(callback)
        client.call("count", {"pushes": 100})
        assert done.wait(10)
    assert seen == list(range(100))


def test_who_does_not_read_is_disconnected(rig: Rig) -> None:
    lazy = socket.socket(socket.AF_UNIX)
    lazy.connect(str(rig.path))
    lazy.sendall(b'{"id":1,"call":"attach"}\n')
    assert lazy.recv(100) == b'{"id":1,"ok":true,"result":{}}\n'
    connection = rig.backend.connections[0]

    async def flood() -> int:
        for number in range(10 * limits.CONTROL_PUSHES_QUEUED_MAX):
            connection.push({"event": "x", "padding": "y" * 1000})
            if connection.closed:
                return number
            if number % 100 == 0:
                await asyncio.sleep(0)  # let the writer move what the socket takes
        return -1

    assert rig.run(flood()) >= limits.CONTROL_PUSHES_QUEUED_MAX
    assert rig.backend.closed == 1
    lazy.close()


@pytest.mark.parametrize(
    "line",
    [
        b"not json\n",
        b"[]\n",
        b'{"id":1}\n',
        b'{"id":1,"call":3}\n',
        b'{"id":1,"call":"a","args":2}\n',
    ],
)
def test_malformed_requests_end_the_connection_with_a_reason(rig: Rig, line: bytes) -> None:
    raw = socket.socket(socket.AF_UNIX)
    raw.settimeout(5)
    raw.connect(str(rig.path))
    raw.sendall(line)
    stream = raw.makefile("rb")
    assert b"malformed request" in stream.readline()
    assert stream.readline() == b""
    raw.close()
    assert rig.server.bad_lines == 1


def test_a_line_over_the_bound_is_refused(rig: Rig) -> None:
    raw = socket.socket(socket.AF_UNIX)
    raw.settimeout(5)
    raw.connect(str(rig.path))
    stream = raw.makefile("rb")
    try:
        raw.sendall(b"x" * (2 * limits.CONTROL_LINE_BYTES_MAX + 2))
    except ConnectionError:
        pass  # the server may hang up before it has read everything
    try:
        assert b"line too long" in stream.readline()
    except ConnectionError:
        pass  # a reset may overtake the answer
    raw.close()
    assert rig.server.bad_lines == 1


@pytest.mark.parametrize("turns", range(8))
def test_closing_leaves_nothing_of_a_client_that_just_came(tmp_path: Path, turns: int) -> None:
    """Every turn of the loop from a client's arrival to its first question waited for."""

    async def visit() -> None:
        server = ControlServer(tmp_path / "control.sock", Backend())
        await server.start()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "control.sock"))
            for _ in range(turns):
                await asyncio.sleep(0)
            await server.close()
            for _ in range(8):  # what the loop began itself
                await asyncio.sleep(0)
            assert asyncio.all_tasks() == {asyncio.current_task()}
            assert not server.connections

    asyncio.run(visit())


def test_no_server_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(ControlClosed) as caught:
        ControlClient(tmp_path / "nothing.sock")
    assert caught.value.exit_code == 75
    assert "swarmtrain join" in caught.value.todo


def test_a_server_that_goes_away_ends_waiting_calls(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "control.sock")
    client = ControlClient(rig.path)
    gone = threading.Event()
    client.on_close(gone.set)
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            client.call("stuck")
        except ControlClosed as error:
            caught.append(error)

    client.call("echo")
    thread = threading.Thread(target=wait)
    thread.start()
    rig.close()
    thread.join(10)
    assert len(caught) == 1
    assert gone.wait(5)
    assert client.closed
    assert not rig.path.exists()
    with pytest.raises(ControlClosed):
        client.call("echo")


def test_a_leftover_socket_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    old = socket.socket(socket.AF_UNIX)
    old.bind(str(path))
    old.close()
    rig = Rig(path)
    with ControlClient(path) as client:
        assert client.call("echo", {"a": 1}) == {"a": 1}
    rig.close()


def test_a_disk_that_fails_does_not_hide_why_a_site_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path / "control.sock")

    def broken(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", broken)
        rig.close()  # the error that ends the process is still to be told
    assert rig.path.exists()
    Rig(rig.path).close()
    assert not rig.path.exists()


def test_a_deep_folder_is_no_obstacle(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 80) / ("e" * 80)
    deep.mkdir(parents=True)
    rig = Rig(deep / "control.sock")
    with ControlClient(deep / "control.sock") as client:
        assert client.call("echo", {"a": 1}) == {"a": 1}
    rig.close()
