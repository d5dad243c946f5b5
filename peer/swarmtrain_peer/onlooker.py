"""A member that neither trains nor holds the model links to all others, to hear their figures."""

from __future__ import annotations

import asyncio

from swarmtrain_peer.runtime import PeerRuntime
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.node_events import LedgerChanged

LINKS_MAX = 64
AGAIN_S = 5.0


class Onlooker:
    """Members tell figures to those they have links to, so this one makes links.

    Members that only make outgoing links choose whom to, and may stay out of sight.
    """

    def __init__(self, runtime: PeerRuntime) -> None:
        self._runtime = runtime
        runtime.listeners.append(self._on_core_event)

    def _on_core_event(self, event: object) -> None:
        if isinstance(event, LedgerChanged):
            self.look()

    def look(self) -> None:
        """Want links to members that can be dialled and have none to this site."""
        node, transport = self._runtime.node, self._runtime.transport
        linked = node.linked()
        missing = [
            member
            for member in node.ledger.ordered_members()
            if member.id != node.me and member.addresses and PeerId(member.id) not in linked
        ]
        for member in missing[: max(0, LINKS_MAX - len(linked))]:
            transport.learn(PeerId(member.id), member.addresses)
            transport.connect(PeerId(member.id))

    async def watch(self) -> None:
        """Look again and again, for ever: links break, and dialling is given up after a while."""
        while True:
            await asyncio.sleep(AGAIN_S)
            self.look()
