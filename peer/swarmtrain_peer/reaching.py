"""Sockets of the reachability check: knocks elsewhere, and answers at this door (spec 14)."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from swarmtrain_peer import host
from swarmtrain_peer.corepump import CorePump
from swarmtrain_peer.sockets import connect, receive_exactly
from swarmtrain_peer.transport import Transport
from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Effect, Emit, PeerId, Send
from swarmtrain_protocols.reach import PREFACE, SECRET_BYTES, KnockAt, Reach, Verdict


class Reaching:
    """Carries out what ``reach.Reach`` decides; ``changed(verdict)`` hears what it finds."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        transport: Transport,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        changed: Callable[[Verdict], None],
    ) -> None:
        self.core = Reach(host.entropy)
        self.pump = CorePump(loop, self.core, self._execute)
        self._loop = loop
        self._transport = transport
        self._spawn = spawn
        self._changed = changed

    def _execute(self, effect: Effect) -> None:
        if isinstance(effect, Send):
            self._transport.send(effect.peer, effect.message)
        elif isinstance(effect, KnockAt):
            self._spawn(self._knock(effect))
        elif isinstance(effect, Emit):
            self._changed(self.core.verdict)

    async def _knock(self, effect: KnockAt) -> None:
        """Dial the host that the asker's link comes from: no message can name another."""
        found = [port for port in effect.ports if await self._answers(effect, port)]
        self.pump.run(self.core.dialled, effect.ticket, tuple(found))

    async def _answers(self, effect: KnockAt, port: int) -> bool:
        link = self._transport.route(effect.peer)
        if link is None or link.via is not None or not link.remote:
            return False
        where = (link.remote[0], port, *link.remote[2:])
        try:
            async with asyncio.timeout(limits.DIAL_BACK_TIMEOUT_S):
                with await connect(self._loop, where, bulk=False) as sock:
                    await self._loop.sock_sendall(sock, PREFACE + effect.knock)
                    return await receive_exactly(self._loop, sock, SECRET_BYTES) == effect.answer
        except (OSError, TimeoutError):
            return False

    async def door(self, sock: socket.socket) -> None:
        """Somebody knocks: answer if it was sent for."""
        with sock:
            try:
                async with asyncio.timeout(limits.DIAL_BACK_TIMEOUT_S):
                    knock = await receive_exactly(self._loop, sock, SECRET_BYTES)
                    answer = self.core.knocked(knock)
                    if answer is not None:
                        await self._loop.sock_sendall(sock, answer)
                        await self._loop.sock_recv(sock, 1)  # until the other side has read it
            except (OSError, TimeoutError):
                return

    def connected(self, peer: PeerId) -> None:
        """A link is up; one that is relayed says nothing about this site."""
        link = self._transport.route(peer)
        if link is not None and link.via is None and link.remote:
            self.pump.run(self.core.connected, peer, link.address_now, link.initiator)
