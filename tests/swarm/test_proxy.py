"""The proxy does what a fault asks of it, and nothing else."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.swarm.harness import poll_until
from tests.swarm.proxy import Proxy

DATA = bytes(range(256)) * 64


class Echo:
    """Sends back what it gets, one connection after the other; ``pieces`` are what it read.

    ``ended``: connections that are over, of which all is in there.
    """

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.pieces: list[bytes] = []
        self.ended = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                try:
                    while data := connection.recv(65536):
                        self.pieces.append(data)
                        connection.sendall(data)
                except OSError:
                    pass  # reset: the same as its end
            self.ended += 1


@pytest.fixture
def echo() -> Iterator[Echo]:
    one = Echo()
    yield one
    one.listener.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    one = Proxy("b", lambda port: "a")
    one.target_port = echo.port
    yield one
    one.close()


def dial(proxy: Proxy) -> socket.socket:
    host, port = proxy.address.split(":")
    return socket.create_connection((host, int(port)), 5.0)


def ask(connection: socket.socket, data: bytes) -> bytes:
    """What comes back until as much has come as was sent, or the end."""
    connection.sendall(data)
    found = b""
    while len(found) < len(data):
        piece = connection.recv(65536)
        if not piece:
            break
        found += piece
    return found


def test_bytes_pass_as_they_are_also_one_by_one(proxy: Proxy, echo: Echo) -> None:
    with dial(proxy) as connection:
        assert ask(connection, DATA) == DATA
        proxy.piece_bytes = 1
        assert ask(connection, DATA[:200]) == DATA[:200]
    assert sum(nbytes for _, nbytes in proxy.moved) == 2 * (len(DATA) + 200)
    assert not proxy.struck


def test_one_bit_is_flipped_at_its_byte(proxy: Proxy) -> None:
    with dial(proxy) as connection:
        assert ask(connection, b"x") == b"x"
        proxy.strike("flip", 10)
        assert ask(connection, bytes(20)) == bytes(10) + b"\x10" + bytes(9)
    (one,) = proxy.struck
    poll_until(lambda: one.ended_s, "the end of the connection is noted")
    assert one.kind == "flip"


def test_a_connection_is_cut_at_its_byte(proxy: Proxy, echo: Echo) -> None:
    with dial(proxy) as connection:
        proxy.strike("close", 5)
        assert ask(connection, bytes(20)) == b""
    poll_until(lambda: echo.ended, "the other side has read up to the cut")
    assert b"".join(echo.pieces) == bytes(5)


def test_resets_reach_both_ends(proxy: Proxy) -> None:
    with dial(proxy) as connection:
        assert ask(connection, b"x") == b"x"
        proxy.reset_all()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    poll_until(lambda: [one.kind for one in proxy.struck] == ["reset"], "the reset is noted")


@pytest.mark.parametrize("how", ["silent", "inward", "outward"])
def test_what_is_held_comes_once_it_is_let_go(proxy: Proxy, echo: Echo, how: str) -> None:
    with dial(proxy) as connection:
        assert ask(connection, b"x") == b"x"
        proxy.silent = how == "silent"
        proxy.cut = {"silent": frozenset(), "inward": frozenset([("a", "b")])}.get(
            how, frozenset([("b", "a")])
        )
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            ask(connection, b"yz")
        assert (b"".join(echo.pieces) == b"xyz") == (how == "outward")
        proxy.silent, proxy.cut = False, frozenset()
        connection.settimeout(5.0)
        assert connection.recv(2) == b"yz"


def test_a_rate_holds_for_all_connections_together(proxy: Proxy) -> None:
    proxy.bytes_per_s = 40_000.0
    began = time.monotonic()
    with dial(proxy) as one, dial(proxy) as other:
        for connection in (one, other):
            connection.sendall(DATA[:8_000])
        assert len(ask(one, b"")) == 0
        poll_until(lambda: sum(n for _, n in proxy.moved) >= 16_000, "both are through")
        poll_until(lambda: proxy._free_s[True] - began >= 0.39, "the line is taken for so long")
