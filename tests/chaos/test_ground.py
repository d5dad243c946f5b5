"""Paths that are cut and made slow, in network namespaces and behind proxies; and a flood."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.chaos.attacker import Attack
from tests.chaos.ground import Namespaces, Plain, Proxied

RATE_BITS = 1_000_000
PAYLOAD = bytes(200_000)


def connected(listener: socket.socket, ground: Plain, wait_s: float) -> bool:
    """Whether ``b`` reaches the listener of ``a``; its answer as well."""
    host, port = listener.getsockname()[:2]
    if isinstance(ground, Proxied):
        host, text = ground.proxies["a"].address.split(":")
        port = int(text)
    with ground.launching("b"), socket.socket() as dialler:
        dialler.settimeout(wait_s)
        try:
            dialler.connect((host, port))
            dialler.sendall(b"x")
            return dialler.recv(1) == b"x"
        except TimeoutError:
            return False


def serve(listener: socket.socket, received: list[int]) -> None:
    """Echo the first byte of every connection, and count the rest."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_one, args=(connection, received), daemon=True).start()


def _one(connection: socket.socket, received: list[int]) -> None:
    with connection:
        try:
            connection.sendall(connection.recv(1))
            while data := connection.recv(65536):
                received.append(len(data))
        except OSError:
            return


def _pids() -> dict[str, int]:
    return {"b": os.getpid()}


@pytest.fixture(params=["proxies", pytest.param("namespaces", marks=pytest.mark.slow)])
def ground(request: pytest.FixtureRequest) -> Iterator[Plain]:
    """As root for namespaces."""
    one: Plain = Namespaces() if request.param == "namespaces" else Proxied(_pids)
    for site in ("a", "b"):
        one.config(site)
    yield one
    one.close()


def test_a_cut_has_a_direction_and_a_rate_holds(ground: Plain) -> None:
    received: list[int] = []
    address = "127.0.0.1" if isinstance(ground, Proxied) else "44.1.0.1"
    with ground.launching("a"):
        listener = socket.create_server((address, 0))
    with listener:
        threading.Thread(target=serve, args=(listener, received), daemon=True).start()
        ground.listens("a", listener.getsockname()[1])
        assert connected(listener, ground, 5.0)
        for pair in (("b", "a"), ("a", "b")):
            ground.cut(frozenset([pair]))
            assert not connected(listener, ground, 0.5)
        ground.cut(frozenset())
        assert connected(listener, ground, 5.0)
        ground.rate("a", RATE_BITS)
        with ground.launching("b"):
            where = listener.getsockname()
            if isinstance(ground, Proxied):
                host, _, port = ground.proxies["a"].address.rpartition(":")
                where = (host, int(port))
            dialler = socket.create_connection(where, 5.0)
        with dialler:
            began = time.monotonic()
            dialler.sendall(b"x" + PAYLOAD)
            while sum(received) < len(PAYLOAD):
                assert time.monotonic() < began + 30.0
                threading.Event().wait(0.01)
        assert time.monotonic() - began > 0.7 * 8 * len(PAYLOAD) / RATE_BITS


def test_a_flood_opens_sockets_of_every_kind() -> None:
    async def flood() -> Attack:
        async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            writer.close()

        server = await asyncio.start_server(refuse, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        attack = Attack([f"127.0.0.1:{port}"], seed=1)
        await attack.run(60.0, 0.5)
        server.close()
        return attack

    done = asyncio.run(flood()).done
    assert done["opened"] >= 20 and done["refused"] == 0
    assert {"silent", "drips", "huge", "noise", "closes"} <= set(done)
