"""Members' addresses in the DHT: each publishes its own, anybody can look one up. Spec 03.

The log already tells the addresses of members; this finds somebody of whom only the key is known,
for example the leader, seen from a machine that has just entered by another member.
"""

from __future__ import annotations

import msgspec

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Connect, Effect, Emit, PeerId
from swarmtrain_protocols.dht.events import DhtFailed, DhtFound
from swarmtrain_protocols.dht.kademlia import DhtCore, usable
from swarmtrain_protocols.rounds import effects as fx

ADDRESS_TTL_S = 600.0


def address_key(peer: bytes) -> bytes:
    """DHT key under which a member publishes its addresses."""
    return b"member/" + peer


class Finder:
    """Uses the DHT core of the node; ``out`` takes the effects that answers lead to."""

    def __init__(
        self, me: PeerId, addresses: tuple[str, ...], dht: DhtCore, out: list[Effect]
    ) -> None:
        self._me = me
        self._addresses = addresses
        self._dht = dht
        self._out = out
        self._published = False
        self._asked: dict[int, PeerId] = {}

    def publish(self, now: float) -> None:
        """Once a member, say where this site is; renewed until it leaves."""
        if self._published:
            return
        self._published = True
        self._dht.bootstrap(now)
        self._say(now)

    def moved(self, now: float, addresses: tuple[str, ...]) -> None:
        """This site is elsewhere; empty: nobody can dial it."""
        self._addresses = addresses
        if self._published and not addresses:
            self._dht.withdraw(now, address_key(self._me))
        elif self._published:
            self._say(now)

    def _say(self, now: float) -> None:
        if addresses := list(usable(self._addresses)):
            value = msgspec.msgpack.encode(addresses)
            self._dht.store(now, address_key(self._me), value, ADDRESS_TTL_S, keep=True)

    def look_up(self, now: float, peer: PeerId) -> None:
        """Search the addresses of ``peer``; a ``Connect`` follows if they are found."""
        if peer not in self._asked.values() and len(self._asked) < limits.MEMBERS_MAX:
            self._asked[self._dht.get(now, address_key(peer))] = peer

    def answered(self, event: DhtFound | DhtFailed) -> bool:
        """True if the answer was to a search of this finder."""
        peer = self._asked.pop(event.handle, None)
        if peer is None:
            return False
        for record in event.records if isinstance(event, DhtFound) else ():
            if record.publisher != peer:
                continue
            try:
                found = msgspec.msgpack.decode(record.value, type=tuple[str, ...])
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                fields: dict[str, object] = {"peer": peer.hex(), "fault": "malformed_address"}
                self._out.append(Emit(fx.Notice("peer_fault", fields)))
                continue
            self._out.append(Connect(peer, found[: limits.ADDRESSES_PER_PEER_MAX]))
        return True
