"""Sockets of relayed streams: opened here, answered here, and spliced for others (spec 14)."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from swarmtrain_peer import host
from swarmtrain_peer.corepump import CorePump
from swarmtrain_peer.link import DialFailed
from swarmtrain_peer.sockets import connect, receive_exactly
from swarmtrain_peer.transport import Transport
from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Connect, Effect, Emit, PeerId, Send, short_id
from swarmtrain_protocols.relay import (
    PREFACE,
    TOKEN_BYTES,
    CloseStream,
    OpenStream,
    Relay,
    Splice,
    StreamFailed,
)


class Relaying:
    """Carries out what ``relay.Relay`` decides; ``tell(event)`` hears its events."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        transport: Transport,
        core: Relay,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        tell: Callable[[object], None],
    ) -> None:
        self.core = core
        self.pump = CorePump(loop, core, self._execute)
        self._loop = loop
        self._transport = transport
        self._spawn = spawn
        self._tell = tell
        self._ends: dict[int, list[socket.socket]] = {}
        self._carrying: dict[int, asyncio.Future[Any]] = {}
        self._wanted: dict[int, asyncio.Future[socket.socket]] = {}

    def close(self) -> None:
        """End all streams."""
        self.pump.close()
        for number in [*self._ends, *self._carrying]:
            self._hang_up(number)

    # -- effects ---------------------------------------------------------------------------------

    def _execute(self, effect: Effect) -> None:
        match effect:
            case Send():
                self._transport.send(effect.peer, effect.message)
            case Connect():
                self._transport.connect(effect.peer)
            case OpenStream(kind="link"):
                self._spawn(self._begin(effect))
            case OpenStream(kind="answer"):
                self._spawn(self._answer(effect))
            case OpenStream():
                self._spawn(self._give(effect))
            case StreamFailed(kind="bulk"):
                self._refuse(effect.request, effect.code)
            case Splice():
                work = self._carry_both(effect.stream, *self._ends.pop(effect.stream))
                self._carrying[effect.stream] = self._loop.create_task(work)
            case CloseStream():
                self._hang_up(effect.stream)
            case Emit():
                self._tell(effect.event)

    async def _open(self, effect: OpenStream) -> socket.socket:
        """A connection to the member between, with the token said. Raises OSError."""
        link = self._transport.route(effect.via)
        if link is None or link.via is not None:
            raise ConnectionError("the link to the relay is gone")
        async with asyncio.timeout(limits.RELAY_WAIT_S):
            if link.initiator:
                sock = await connect(self._loop, link.remote)
            else:
                sock = await self._transport.dial_socket(effect.via)
            try:
                await self._loop.sock_sendall(sock, PREFACE + effect.token)
            except BaseException:
                sock.close()
                raise
        return sock

    async def _begin(self, effect: OpenStream) -> None:
        try:
            sock = await self._open(effect)
            where = f"relay {short_id(effect.via)}"
            async with asyncio.timeout(limits.HANDSHAKE_TIMEOUT_S):
                await self._transport.greet(effect.peer, sock, where, effect.via)
        except (OSError, TimeoutError, DialFailed):
            self.pump.run(self.core.opened, effect.peer, False)

    async def _answer(self, effect: OpenStream) -> None:
        with contextlib.suppress(OSError, TimeoutError, DialFailed):  # whoever asked asks again
            await self._transport.doorway.classify(await self._open(effect), effect.via)

    async def _give(self, effect: OpenStream) -> None:
        try:
            sock = await self._open(effect)
        except (OSError, TimeoutError, DialFailed) as error:
            self._refuse(effect.request, str(error))
            return
        future = self._wanted.pop(effect.request, None)
        if future is None or future.done():
            sock.close()
        else:
            future.set_result(sock)

    def _refuse(self, request: int, code: str) -> None:
        future = self._wanted.pop(request, None)
        if future is not None and not future.done():
            future.set_exception(ConnectionError(f"no relayed stream: {code}"))

    async def bulk(self, peer: PeerId) -> socket.socket:
        """One more stream to a peer whose link is relayed. Raises OSError."""
        request = self.core.stream(host.mono_s(), peer)
        future: asyncio.Future[socket.socket] = self._loop.create_future()
        self._wanted[request] = future
        self.pump.pump()
        try:
            return await future
        finally:
            self._wanted.pop(request, None)

    # -- between -----------------------------------------------------------------------------------

    async def door(self, sock: socket.socket) -> None:
        """Somebody brings one end of a stream."""
        try:
            async with asyncio.timeout(limits.RELAY_WAIT_S):
                token = await receive_exactly(self._loop, sock, TOKEN_BYTES)
        except (OSError, TimeoutError):
            sock.close()
            return
        number = self.core.attached(host.mono_s(), token)
        if number is None:
            sock.close()
            return
        self._ends.setdefault(number, []).append(sock)
        self.pump.pump()

    async def _carry_both(self, number: int, a: socket.socket, b: socket.socket) -> None:
        ways = [asyncio.ensure_future(self._carry(number, *pair)) for pair in ((a, b), (b, a))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            a.close()
            b.close()
            self._carrying.pop(number, None)
        self.pump.run(self.core.closed, number)

    async def _carry(self, number: int, source: socket.socket, sink: socket.socket) -> None:
        """Until an end hangs up. The caps of this site hold for what it carries."""
        piece = memoryview(bytearray(limits.RELAY_PIECE_BYTES))
        up, down = self._transport.caps
        with contextlib.suppress(OSError):
            while nbytes := await self._loop.sock_recv_into(source, piece):
                down.charge(nbytes)
                up.charge(nbytes)
                if (wait_s := max(up.wait_s(), down.wait_s())) > 0:  # until it is paid for
                    await asyncio.sleep(wait_s)
                await self._loop.sock_sendall(sink, piece[:nbytes])
                self.pump.run(self.core.moved, number, nbytes)

    def _hang_up(self, number: int) -> None:
        for sock in self._ends.pop(number, ()):
            sock.close()
        task = self._carrying.pop(number, None)
        if task is not None:
            task.cancel()
