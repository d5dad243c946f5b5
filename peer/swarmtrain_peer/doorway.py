"""Whoever dials this site: told apart by the first eight bytes, within bounds.

A control link, a bulk connection of such a link, or what somebody else has left a door open for
(``doors``): a knock of a reachability check, the end of a relayed stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from swarmtrain_peer.gate import Knocks, host_block
from swarmtrain_peer.link import Link
from swarmtrain_peer.linktable import LinkTable
from swarmtrain_peer.sockets import receive_exactly, tune
from swarmtrain_protocols import bulklink, limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.session import PREFACE_BYTES

Door = Callable[[socket.socket], Awaitable[None]]
"""Takes a connection behind its preface, and owns it from then on."""


class Doorway:
    """All connections that come in. Runs on the loop thread.

    ``make_link()`` makes the answering end of a control link, ``bulk`` takes bulk connections,
    ``spawn`` runs a task, ``count`` notes what was turned away.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        table: LinkTable,
        make_link: Callable[[], Link],
        bulk: Door,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        count: Callable[[str], None],
    ) -> None:
        self.doors: dict[bytes, Door] = {}
        self._loop = loop
        self._table = table
        self._make_link = make_link
        self._bulk = bulk
        self._spawn = spawn
        self._count = count
        self._knocks = Knocks()

    async def accept(self, listener: socket.socket) -> None:
        """Let them in, for ever."""
        while True:
            try:
                sock, address = await self._loop.sock_accept(listener)
            except OSError:  # out of descriptors: those in use will be freed
                self._count("accept_failed")
                await asyncio.sleep(limits.DIAL_BACKOFF_S_MIN)
                continue
            sock.setblocking(False)
            block = host_block(str(address[0]))
            half_open = sum(found == block for found in self._table.half_open.values())
            if self._table.inbound >= limits.CONNECTIONS_INBOUND_MAX:
                self._count("inbound_over_limit")
                sock.close()
            elif over := self._knocks.refusal(self._loop.time(), block, half_open):
                self._count(over)
                sock.close()
            else:
                self._spawn(self.classify(sock, block=block))

    async def classify(
        self, sock: socket.socket, via: PeerId | None = None, block: str = ""
    ) -> None:
        """Control, bulk or another door, by the first eight bytes.

        ``via``: a relayed stream; ``block``: where it comes from (``gate.host_block``).
        """
        if len(self._table.half_open) >= limits.CONNECTIONS_HALF_OPEN_MAX:
            self._count("half_open_over_limit")
            sock.close()
            return
        link = self._make_link()
        link.via = via
        self._table.half_open[link] = block
        with contextlib.ExitStack() as stack:
            stack.enter_context(sock)
            try:
                async with asyncio.timeout(limits.HANDSHAKE_TIMEOUT_S):
                    preface = await receive_exactly(self._loop, sock, PREFACE_BYTES)
                door = self._bulk if preface == bulklink.PREFACE else self.doors.get(preface)
                if door is None or (via is not None and door is not self._bulk):
                    tune(sock, bulk=False)
                    link.received_bytes += len(preface)
                    link.session.receive_bytes(self._loop.time(), preface)
                    self._table.inbound += 1
                    await self._loop.connect_accepted_socket(lambda: link, sock)
                    stack.pop_all()
                    return
            except (OSError, TimeoutError):
                self._count("no_preface")
                return
            finally:
                if link.remote == ():  # no control link came of it
                    self._table.half_open.pop(link, None)
            stack.pop_all()
        await door(sock)
