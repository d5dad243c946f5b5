"""How a site that has only a ticket gets the run's manifest: from the addresses in the ticket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from swarmtrain_peer.transport import Transport
from swarmtrain_protocols.errors import NoPeerReachable, SwarmError
from swarmtrain_protocols.manifest import Manifest, parse_manifest
from swarmtrain_protocols.messages import member as mm
from swarmtrain_protocols.tickets import Ticket

CONNECT_TIMEOUT_S = 45.0
"""Connecting takes one round trip, the handshake two: enough for a link of five seconds one way."""
MANIFEST_TIMEOUT_S = 25.0
MANIFEST_TRIES = 3
PAUSE_S = 0.5


class Enquiry:
    """Asks for the manifest of ``run``; whoever hears messages passes replies to ``heard``."""

    def __init__(self, transport: Transport, run: bytes) -> None:
        self._transport = transport
        self._run = run
        self._reply: asyncio.Future[bytes] | None = None

    def heard(self, message: mm.ManifestReply) -> None:
        """An answer; one that nobody waits for is dropped."""
        if self._reply is not None and not self._reply.done():
            self._reply.set_result(message.manifest)

    async def manifest(
        self, ticket: Ticket | None, save: Callable[[bytes], object] | None
    ) -> Manifest:
        """The manifest, after ``save`` was called with its bytes.

        Raises:
            NoPeerReachable, NotAuthorised, RunMismatch, VersionMismatch: as named.
        """
        if ticket is None:
            raise NoPeerReachable("no address is known", "no ticket was given", "pass a ticket")
        last: SwarmError = NoPeerReachable("no address answers", "", "ask for a new ticket")
        for number in range(MANIFEST_TRIES):
            if number:
                await asyncio.sleep(PAUSE_S)  # they may be busy, or just restarting
            for address in ticket.addresses:
                try:
                    data = await self._ask(address)
                except SwarmError as error:
                    last = error
                    continue
                if save is not None:
                    save(data)
                return parse_manifest(data, self._run)
            if not isinstance(last, NoPeerReachable):
                break  # a refusal: asking again changes nothing
        raise last

    async def _ask(self, address: str) -> bytes:
        self._reply = asyncio.get_running_loop().create_future()
        peer = await self._transport.connect_address(address, CONNECT_TIMEOUT_S)
        self._transport.send(peer, mm.ManifestRequest(self._run))
        try:
            async with asyncio.timeout(MANIFEST_TIMEOUT_S):
                return await self._reply
        except TimeoutError:
            raise NoPeerReachable(f"{address} does not answer", "no manifest came", "") from None
