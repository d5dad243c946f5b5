"""Sockets: tuning, listening on what people write, exact reads."""

from __future__ import annotations

import asyncio
import socket

import pytest

from swarmtrain_peer.loop import new_event_loop
from swarmtrain_peer.sockets import address_of, fill_host, listen, receive_exactly, tune
from tests.peer.test_transport import go


def test_no_delay_and_a_named_congestion_control() -> None:
    with socket.socket() as sock:
        control = tune(sock, bulk=True)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        name = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        assert name.rstrip(b"\0").decode() == control


def test_listen_and_exact_reads() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with await listen(loop, "127.0.0.1", 0) as server:
            assert address_of(server.getsockname()).startswith("127.0.0.1:")
            with pytest.raises(OSError):
                await listen(loop, "127.0.0.1", server.getsockname()[1])
            with socket.create_connection(server.getsockname()) as client:
                sock, _ = await loop.sock_accept(server)
                with sock:
                    sock.setblocking(False)
                    client.sendall(b"abcdef")
                    assert await receive_exactly(loop, sock, 4) == b"abcd"
                    client.close()
                    with pytest.raises(ConnectionError):
                        await receive_exactly(loop, sock, 3)

    go(main())


def test_a_wildcard_host_is_filled_in() -> None:
    assert fill_host("0.0.0.0:70", "10.0.0.9") == "10.0.0.9:70"
    assert fill_host("[::]:70", "fe80::1") == "[fe80::1]:70"
    assert fill_host("example.org:70", "10.0.0.9") == "example.org:70"
    assert fill_host("0.0.0.0:70", "") == "0.0.0.0:70"
    assert fill_host("0.0.0.0:x", "10.0.0.9") == "0.0.0.0:x"


def test_the_fast_loop_is_used_where_it_is_installed() -> None:
    loop = new_event_loop()
    try:
        assert type(loop).__module__.split(".")[0] == "uvloop"
    finally:
        loop.close()
