"""Small things about sockets: tuning, listening, reading an exact number of bytes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

from swarmtrain_protocols import limits
from swarmtrain_protocols.addresses import join_address

_BACKLOG = 128


def tune(sock: socket.socket, *, bulk: bool) -> str:
    """Set TCP_NODELAY; for bulk also ask for BBR. Returns the congestion control in use.

    Buffer sizes are left alone: setting them turns the kernel's autotuning off.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if bulk:  # control links have pings of their own
        _end_if_dead(sock)
    if not hasattr(socket, "TCP_CONGESTION"):
        return "unknown"
    if bulk:
        with contextlib.suppress(OSError):  # not every kernel has it; the answer below says so
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")
    name = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    return name.split(b"\0")[0].decode("ascii")


def _end_if_dead(sock: socket.socket) -> None:
    """Have the kernel end a connection whose other side is silent, as soon as the control link."""
    silence_s = int(limits.IDLE_TIMEOUT_S)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", silence_s // 2),
        ("TCP_KEEPINTVL", max(1, silence_s // 8)),
        ("TCP_KEEPCNT", 4),
        ("TCP_USER_TIMEOUT", 1000 * silence_s),
    ):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


async def receive_exactly(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, nbytes: int
) -> bytes:
    """Read ``nbytes`` and not one more. Raises ConnectionError if the stream ends before."""
    data = b""
    while len(data) < nbytes:
        piece = await loop.sock_recv(sock, nbytes - len(data))
        if not piece:
            raise ConnectionError("the connection ended early")
        data += piece
    return data


async def connect(
    loop: asyncio.AbstractEventLoop, address: tuple[Any, ...], *, bulk: bool = True
) -> socket.socket:
    """A connected, tuned, non-blocking socket to a socket address. Raises OSError."""
    family = socket.AF_INET6 if len(address) == 4 else socket.AF_INET
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        sock.setblocking(False)
        tune(sock, bulk=bulk)
        await loop.sock_connect(sock, address)
        stack.pop_all()
        return sock


async def attach(
    loop: asyncio.AbstractEventLoop, protocol: asyncio.BaseProtocol, sock: socket.socket
) -> None:
    """Have ``protocol`` served on a connected socket, which belongs to the loop from now on.

    A protocol may give its connection up the moment it is made. uvloop then closes the descriptor
    before it ties the socket object to it, and that object, when collected, would close whatever
    has got the same number meanwhile.
    """
    transport, _ = await loop.create_connection(lambda: protocol, sock=sock)
    if transport.is_closing() and type(loop).__module__.startswith("uvloop"):
        sock.detach()


async def listen(loop: asyncio.AbstractEventLoop, host: str, port: int) -> socket.socket:
    """A non-blocking listening socket; port 0 lets the kernel choose. Raises OSError."""
    found = await loop.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def address_of(sock_address: tuple[object, ...]) -> str:
    """``host:port`` of what ``getsockname`` and ``getpeername`` give."""
    return join_address(str(sock_address[0]), int(str(sock_address[1])))


def fill_host(address: str, seen: str) -> str:
    """``address`` with ``seen`` in place of a host that means "all interfaces"."""
    for wildcard in ("0.0.0.0:", "[::]:"):
        if seen and address.startswith(wildcard) and address[len(wildcard) :].isdigit():
            return join_address(seen, int(address[len(wildcard) :]))
    return address
