"""What a node does for others: answers, within a rate, to the asker only.

Nothing is sent to anybody who is named in a request, and an answer is as long as a bounded number
of contacts and one page of records; so nobody can aim this node's traffic at somebody else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.dht import records as rec
from swarmtrain_protocols.dht.events import DhtRefused
from swarmtrain_protocols.dht.ids import Contact, id_from_bytes
from swarmtrain_protocols.dht.requests import Meter
from swarmtrain_protocols.dht.tokens import Tokens
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.messages.dht import (
    FindNode,
    FindValue,
    NodeInfo,
    Nodes,
    Question,
    Reply,
    StoreRecord,
    StoreReply,
    Values,
)

if TYPE_CHECKING:
    from swarmtrain_protocols.dht.kademlia import DhtCore

_RECORD_FRAME_BYTES = 144
"""Bytes of a record on the wire besides its name and value, rounded up."""


class Serving:
    """The serving half of a ``DhtCore``."""

    def __init__(self, core: DhtCore) -> None:
        self._core = core
        self._meters: dict[PeerId, Meter] = {}
        self.tokens = Tokens(core.keyring, core.run)

    def __len__(self) -> int:
        """Askers that are remembered."""
        return len(self._meters)

    def forget(self, peer: PeerId) -> None:
        """The link is gone; the next one begins anew."""
        self._meters.pop(peer, None)

    def admit(self, now: float, peer: PeerId) -> bool:
        """False if ``peer`` asks too much: its request is dropped and counted."""
        meter = self._meters.get(peer)
        if meter is None:
            if len(self._meters) >= limits.DHT_METERS_MAX:
                del self._meters[next(iter(self._meters))]
            meter = Meter(limits.DHT_RATE_SERVED_PER_S, limits.DHT_BURST_SERVED)
            self._meters[peer] = meter
        if meter.take(now):
            meter.reported = meter.reported and meter.tokens < meter.burst / 2
            return True
        self._core.count("dht_rate")
        if not meter.reported:  # a flood is reported once, its messages are counted
            meter.reported = True
            self._core.emit(DhtRefused(peer, "rate"))
        return False

    def answer(self, now: float, peer: PeerId, message: Question) -> Reply:
        """The answer to a request that was admitted."""
        if isinstance(message, FindNode):
            token = self.tokens.make(self._core.wall(now), peer, message.target)
            return Nodes(message.request, self._near(message.target, peer), token)
        if isinstance(message, FindValue):
            return self._page(now, peer, message)
        return self._keep(now, peer, message)

    def _near(self, target: bytes, but: PeerId) -> tuple[NodeInfo, ...]:
        near = self._core.table.closest(id_from_bytes(target), limits.DHT_K, but)
        return _infos(near)

    def _page(self, now: float, peer: PeerId, message: FindValue) -> Values:
        core = self._core
        wall_s = core.wall(now)
        token = self.tokens.make(wall_s, peer, message.key)
        held = core.held.under(message.key, wall_s)
        if message.known and message.known == rec.digest_of(held):
            core.replication.compared(now, message.key)
            return Values(message.request, (), (), False, token, True)
        page = []
        nbytes = 0
        more = False
        for record in held:
            if record.publisher <= message.after:
                continue
            nbytes += len(record.value) + len(record.name) + _RECORD_FRAME_BYTES
            if nbytes > limits.DHT_PAGE_BYTES:
                more = True
                break
            page.append(record)
        near = () if message.after or message.known else self._near(message.key, peer)
        return Values(message.request, tuple(page), near, more, token)

    def _keep(self, now: float, peer: PeerId, message: StoreRecord) -> StoreReply:
        core, record = self._core, message.record
        if self.tokens.valid(core.wall(now), peer, record.key, message.token):
            code = core.accept(now, record)
        else:
            code = "token"
        if code in rec.FAULTS:
            core.blame(PeerFault(rec.FAULTS[code], "a DHT record that does not hold", peer))
        elif code != "ok":
            core.count(f"dht_{code}")
            core.emit(DhtRefused(peer, code))
        highest = core.held.marks.sequence((record.key, record.publisher))
        return StoreReply(message.request, code, max(0, highest))


def _infos(contacts: Iterable[Contact]) -> tuple[NodeInfo, ...]:
    return tuple(NodeInfo(contact.peer, contact.addresses) for contact in contacts)
