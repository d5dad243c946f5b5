"""Links on loopback: typed refusals, messages, dialling, hostile connections, statistics."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from swarmtrain_peer.link import Link
from swarmtrain_peer.loop import run
from swarmtrain_peer.sockets import receive_exactly
from swarmtrain_protocols import bulklink, limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.errors import (
    NoPeerReachable,
    NotAuthorised,
    RunMismatch,
    SwarmError,
    VersionMismatch,
)
from swarmtrain_protocols.messages.member import LeaveRequest
from swarmtrain_protocols.messages.session import Hello, Refused
from tests.peer.transport_kit import WAIT_S, Node

LEAVE = LeaveRequest(reason="test")


def go(main: Coroutine[Any, Any, None]) -> None:
    """Run with a limit: a test that hangs is a failure with a stack, not a stuck run."""

    async def limited() -> None:
        async with asyncio.timeout(3 * WAIT_S):
            await main

    run(limited())


def test_connect_send_and_leave() -> None:
    async def main() -> None:
        async with Node(1, name="one") as a, Node(2, listen=("127.0.0.1:7",)) as b:
            await a.join(b)
            _, _, outgoing, hello = await a.until("connected", b.id)
            assert outgoing and hello.listen == ("127.0.0.1:7",)
            assert a.transport.connected_peers() == [b.id]
            assert a.transport.send(b.id, LEAVE)
            assert await b.until("message", a.id, LEAVE)
            assert b.transport.send(a.id, LEAVE)
            assert await a.until("message", b.id, LEAVE)
            a.transport.disconnect(b.id, "left", "enough")
            assert (await b.until("disconnected", a.id))[2:] == ("left", "enough")
            assert (await a.until("disconnected", b.id))[2:] == ("left", "enough")
            stats = a.transport.stats
            assert stats["peers"][b.id]["control_sent_bytes"] > 300
            assert stats["control_sent_bytes"] == b.transport.stats["control_received_bytes"]
            assert stats["control_received_bytes"] == b.transport.stats["control_sent_bytes"]

    go(main())


def _says(code: str) -> Any:
    return lambda peer, hello: Refused(code=code, reason="because")


@pytest.mark.parametrize(
    ("ours", "theirs", "error", "code"),
    [
        ({"run": b"q" * 32}, {}, RunMismatch, "wrong_run"),
        ({"version": 2}, {}, VersionMismatch, "version"),
        ({}, {"admit": _says("expired")}, NotAuthorised, "expired"),
        ({}, {"admit": _says("not_authorised")}, NotAuthorised, "not_authorised"),
        ({"admit": _says("banned")}, {}, NotAuthorised, "banned"),
    ],
)
def test_refusals_are_typed_errors(
    ours: dict[str, Any], theirs: dict[str, Any], error: type[SwarmError], code: str
) -> None:
    async def main() -> None:
        async with Node(1, **ours) as a, Node(2, **theirs) as b:
            with pytest.raises(error, match=code):
                await a.transport.connect_address(b.address, WAIT_S)
            await a.until("refused", code)
            if "admit" not in ours:
                await b.until("refused", code, a.id)
                assert not b.saw("connected")
            assert not a.saw("connected")

    go(main())


def test_admit_sees_the_peer_and_its_hello() -> None:
    seen: list[tuple[PeerId, str]] = []

    def admit(peer: PeerId, hello: Hello) -> None:
        seen.append((peer, hello.name))

    async def main() -> None:
        async with Node(1, name="ann") as a, Node(2, admit=admit) as b:
            await a.join(b)
            assert seen == [(a.id, "ann")]

    go(main())


def test_nobody_answers() -> None:
    async def main() -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{unused.getsockname()[1]}"
            async with Node(1) as a:
                with pytest.raises(NoPeerReachable, match="unreachable"):
                    await a.transport.connect_address(address, WAIT_S)
                for bad in ("nonsense", "127.0.0.1:0", "x y:1"):
                    with pytest.raises(NoPeerReachable, match="unreachable"):
                        await a.transport.connect_address(bad, WAIT_S)
                unused.listen()  # accepts in the kernel, never answers
                with pytest.raises(NoPeerReachable, match="timeout"):
                    await a.transport.connect_address(address, 0.1)

    go(main())


def test_send_dials_and_keeps_messages_meanwhile() -> None:
    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            assert not a.transport.send(b.id, LEAVE)  # no address
            assert a.transport.stats["counts"]["send_dropped"] == 1
            a.transport.learn(b.id, ["nonsense", b.address])
            results = [a.transport.send(b.id, LeaveRequest(reason=str(i))) for i in range(300)]
            assert results == [True] * 256 + [False] * 44
            for i in range(256):
                await b.until("message", a.id, LeaveRequest(reason=str(i)))
            assert a.transport.stats["counts"]["send_dropped"] == 45

    go(main())


def test_connect_retries_until_the_peer_is_up() -> None:
    async def main() -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        async with Node(1) as a:
            b = Node(2)
            a.transport.learn(b.id, [f"127.0.0.1:{port}"])
            a.transport.connect(b.id)
            assert (await a.until("refused", "unreachable"))[2] == b.id
            await b.transport.start(f"127.0.0.1:{port}")
            await a.until("connected", b.id)  # by itself
            await b.transport.close()

    go(main())


def test_somebody_else_at_the_address() -> None:
    async def main() -> None:
        async with Node(1) as a, Node(2) as b, Node(3) as c:
            a.transport.learn(c.id, [b.address])
            a.transport.connect(c.id)
            assert (await a.until("refused", "wrong_peer"))[2] == c.id
            assert not b.saw("connected")

    go(main())


def test_our_own_address() -> None:
    async def main() -> None:
        async with Node(1) as a:
            with pytest.raises(NotAuthorised, match="own identity"):
                await a.transport.connect_address(a.address, WAIT_S)

    go(main())


@pytest.mark.parametrize(
    "hostile",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"swarm/c\x00" + b"\xff\xff" * 100,
        b"swarm/c\x00" + b"\x20\x00" + b"\x00" * 32,
        b"swarm/c\x09" + b"x" * 100,
        bulklink.PREFACE + b"x" * 200,
        b"",
    ],
)
def test_hostile_connections_are_closed_and_harm_nobody(hostile: bytes) -> None:
    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            loop = asyncio.get_running_loop()
            host, port = b.address.split(":")
            with socket.socket() as sock:
                sock.setblocking(False)
                await loop.sock_connect(sock, (host, int(port)))
                await loop.sock_sendall(sock, hostile)
                sock.shutdown(socket.SHUT_WR)
                with pytest.raises(ConnectionError):  # it says nothing before it knows us
                    await receive_exactly(loop, sock, 200)
            await a.join(b)

    go(main())


def test_half_open_connections_are_bounded() -> None:
    async def main() -> None:
        async with Node(1) as b:
            loop = asyncio.get_running_loop()
            host, port = b.address.split(":")
            socks = [socket.socket() for _ in range(limits.CONNECTIONS_HALF_OPEN_MAX + 5)]
            for sock in socks:
                sock.setblocking(False)
                await loop.sock_connect(sock, (host, int(port)))
            with pytest.raises(ConnectionError):
                await receive_exactly(loop, socks[-1], 1)
            assert b.transport.stats["counts"]["half_open_over_limit"] >= 1
            for sock in socks:
                sock.close()
            async with Node(2) as a:  # room again
                await a.join(b)

    go(main())


def test_flipping_proxy_is_noticed() -> None:
    """Somebody in the middle changes one byte after the link is open."""

    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            host, port = b.address.split(":")
            flip = asyncio.Event()

            async def pipe(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tamper: bool
            ) -> None:
                while data := await reader.read(65536):
                    if tamper and flip.is_set():
                        data = bytes([*data[:-1], data[-1] ^ 1])
                    writer.write(data)
                writer.close()

            async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                on_reader, on_writer = await asyncio.open_connection(host, int(port))
                await asyncio.gather(pipe(reader, on_writer, True), pipe(on_reader, writer, False))

            server = await asyncio.start_server(relay, "127.0.0.1", 0)
            where = server.sockets[0].getsockname()
            assert await a.transport.connect_address(f"127.0.0.1:{where[1]}", WAIT_S) == b.id
            await b.until("connected", a.id)
            flip.set()
            a.transport.send(b.id, LEAVE)
            assert (await b.until("fault", a.id))[2] == "tampered"
            assert (await a.until("disconnected", b.id))[2] == "tampered"
            assert not b.saw("message")
            server.close()

    go(main())


def test_close_tells_the_others() -> None:
    async def main() -> None:
        async with Node(1) as a:
            b = Node(2)
            await b.__aenter__()
            await a.join(b)
            await b.transport.close()
            assert (await a.until("disconnected", b.id))[2] == "closing"
            assert not b.transport.send(a.id, LEAVE)

    go(main())


def test_entropy_is_used_for_every_connection() -> None:
    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            await a.join(b)
            first = a.transport._table.links[b.id].session.bulk_secret
            a.transport.disconnect(b.id, "left", "")
            await b.until("disconnected", a.id)
            await a.until("disconnected", b.id)
            await a.join(b)
            assert a.transport._table.links[b.id].session.bulk_secret != first

    assert os.urandom(8) != os.urandom(8)
    go(main())


def test_a_dial_that_is_given_up_at_once_closes_its_descriptor_only_once() -> None:
    """Both sides dial and one gives way before it is connected. Its number is used again soon: a
    socket object that still held it would close somebody else's file when it is collected."""

    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            make_link, open_socket = a.transport._make_link, a.transport._dialler.open
            opened: list[socket.socket] = []

            def given_up(*arguments: Any) -> Link:
                link = make_link(*arguments)
                link.session.close(0.0, "superseded", "test")
                return link

            async def remembered(address: str) -> socket.socket:
                opened.append(await open_socket(address))
                return opened[-1]

            a.transport._make_link = given_up  # type: ignore[method-assign]
            a.transport._dialler.open = remembered  # type: ignore[method-assign]
            with pytest.raises(SwarmError):
                await a.transport.connect_address(b.address, WAIT_S)
            assert [sock.fileno() for sock in opened] == [-1]

    go(main())


def test_a_thread_that_breaks_is_told_to_whoever_can_end_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody would be served any more, and no fetch would ever end."""
    monkeypatch.setattr(threading, "excepthook", lambda what: None)
    error = ZeroDivisionError("a broken invariant")

    def work() -> None:
        raise error

    async def main() -> None:
        async with Node(1) as a:
            a.transport._pool.submit(work)
            assert await a.until("broken") == ("broken", error)

    go(main())
