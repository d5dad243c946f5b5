"""Who uses the bulk connections of a transport: what is fetched, and what is served to others."""

from __future__ import annotations

from collections.abc import Callable

from swarmtrain_peer.bulk import BulkConnection
from swarmtrain_peer.handler import TransportHandler
from swarmtrain_peer.linktable import LinkTable
from swarmtrain_peer.serving import Serving
from swarmtrain_peer.transfers import Fetches
from swarmtrain_protocols.bulklink import Header
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.messages import Message, fetch


class BulkUse:
    """Satisfies ``bulklinks.BulkUsers``. ``fetches`` and ``serving`` are set once they exist.

    ``say`` sends over an open control link; ``count`` counts a code.
    """

    def __init__(
        self,
        table: LinkTable,
        handler: TransportHandler,
        say: Callable[[PeerId, Message, bytes], bool],
        count: Callable[[str], None],
    ) -> None:
        self._table = table
        self._handler = handler
        self._say = say
        self._count = count
        self.fetches: Fetches
        self.serving: Serving

    def rtt_s(self, peer: PeerId) -> float | None:
        """Shortest measured round trip of the link, seconds."""
        link = self._table.links.get(peer)
        return link.session.rtt_s if link else None

    def wants_bulk(self, peer: PeerId) -> bool:
        return self.fetches.wants_bulk(peer) or self.serving.wants_bulk(peer)

    def bulk_up(self, conn: BulkConnection) -> None:
        self.serving.bulk_up(conn)

    def bulk_lost(self, conn: BulkConnection, fault: PeerFault | None) -> None:
        if fault is not None:
            self._count(f"fault_{fault.code}")
            self._handler.peer_fault(conn.peer, fault.code, fault.why)
        if conn.peer in self._table.links:
            self._say(conn.peer, fetch.BulkClosed(connection=conn.name), b"")
        self.fetches.bulk_lost(conn, fault is not None)
        self.serving.bulk_lost(conn)

    def bulk_missed(self, peer: PeerId) -> None:
        self.fetches.ask_again(peer)

    def no_bulk(self, peer: PeerId) -> None:
        self.fetches.no_bulk(peer)
        self.serving.no_bulk(peer)

    def begin(self, conn: BulkConnection, header: Header) -> memoryview | None:
        """On a thread of the pool; see ``bulk.Sink``."""
        return self.fetches.begin(conn, header)

    def end(self, conn: BulkConnection, header: Header, ok: bool) -> None:
        """On a thread of the pool; see ``bulk.Sink``."""
        self.fetches.end(conn, header, ok)
