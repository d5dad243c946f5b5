"""What this site publishes: sign, find the k nearest, place a copy on each, renew in time.

Where the paths of the lookup disagree on who is nearest, each path's nearest get a copy.

Sequence numbers are wall-clock milliseconds (or one more than the last), so that a restarted site
goes on above what it published before without having kept anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.dht.events import DhtFailed, DhtStored
from swarmtrain_protocols.dht.ids import Contact, key_id
from swarmtrain_protocols.dht.records import sign_record
from swarmtrain_protocols.dht.search import Search
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.messages.dht import Reply, SignedRecord, StoreReply

if TYPE_CHECKING:
    from swarmtrain_protocols.dht.kademlia import DhtCore


@dataclass(slots=True)
class _Publication:
    """One key of this site. ``handle`` is 0 once the caller has its answer."""

    name: bytes
    target: int
    value: bytes
    ttl_s: float
    keep: bool
    handle: int
    record: SignedRecord
    again_at: float = math.inf
    resigned: bool = False


@dataclass(slots=True)
class _Placement:
    """One attempt to place the copies of one record."""

    publication: _Publication
    record: SignedRecord
    searching: bool = True
    """The k nearest are not known yet; who is certainly near gets its copy meanwhile."""
    given: dict[PeerId, None] = field(default_factory=dict)
    prompt: dict[PeerId, None] = field(default_factory=dict)
    """Who was given a copy, has not answered yet and is not late."""
    awaited: int = 0
    replicas: int = 0
    refused: str = "unreachable"
    overtaken: bool = False
    """A holder has a later record of ours than this one."""


class Publisher:
    """The publishing half of a ``DhtCore``."""

    def __init__(self, core: DhtCore) -> None:
        self._core = core
        self._all: dict[bytes, _Publication] = {}
        self._sequence = 0
        self.due_at = math.inf
        """When something is to be renewed or replicated."""

    def __len__(self) -> int:
        return len(self._all)

    def publish(
        self, now: float, handle: int, name: bytes, value: bytes, ttl_s: float, keep: bool
    ) -> None:
        before = self._all.get(name)
        if before is None and len(self._all) >= limits.DHT_RECORDS_PER_PUBLISHER_MAX:
            raise LocalProtocolError(
                "too many DHT keys", f"a site publishes {limits.DHT_RECORDS_PER_PUBLISHER_MAX}"
            )
        if before is not None and before.handle:
            # Its copies may still be under way, but they lose against the new ones everywhere.
            self._core.emit(DhtFailed(before.handle, name, "replaced"))
        target = key_id(name)
        record = self._sign(now, name, value, ttl_s)
        mine = _Publication(name, target, value, ttl_s, keep, handle, record)
        self._all[name] = mine
        self._place(now, mine)

    def withdraw(self, now: float, name: bytes) -> None:
        mine = self._all.get(name)
        if mine is not None:
            mine.keep = False
            self._look_again(mine, min(mine.again_at, now + limits.DHT_REPLICATE_S))

    def own(self, key: bytes) -> Iterator[SignedRecord]:
        """What this site itself publishes under key id ``key``."""
        for mine in self._all.values():
            if mine.record.key == key:
                yield mine.record

    def tick(self, now: float) -> None:
        """Renew what is to be kept, replicate the rest again, forget what has expired."""
        wall_s = self._core.wall(now)
        for mine in list(self._all.values()):
            if not mine.keep and not mine.handle and mine.record.expires_s <= wall_s:
                del self._all[mine.name]
            elif mine.again_at <= now:
                if mine.keep:
                    self._renew(now, mine)
                self._place(now, mine)
        self._find_due()

    def _look_again(self, mine: _Publication, at: float) -> None:
        mine.again_at = at
        self._find_due()

    def _find_due(self) -> None:
        self.due_at = min((item.again_at for item in self._all.values()), default=math.inf)

    def _renew(self, now: float, mine: _Publication) -> None:
        mine.record = self._sign(now, mine.name, mine.value, mine.ttl_s)
        mine.resigned = False

    def _sign(self, now: float, name: bytes, value: bytes, ttl_s: float) -> SignedRecord:
        core = self._core
        wall_s = core.wall(now)
        self._sequence = max(self._sequence + 1, int(wall_s * 1000))
        expires_s = max(int(wall_s) + 1, int(wall_s + ttl_s))
        return sign_record(core.keyring, core.run, name, self._sequence, expires_s, value)

    def _place(self, now: float, mine: _Publication) -> None:
        self._look_again(mine, math.inf)
        placement = _Placement(mine, mine.record)
        search = Search(
            mine.target,
            partial(self._spread, placement),
            guarded=True,
            heard=partial(self._heard, placement),
        )
        search.waits = partial(self._about_stored, placement, search)
        if not self._core.searches.start(now, search):
            self._finish(now, _Placement(mine, mine.record, refused="busy"))

    def _heard(self, placement: _Placement, now: float, search: Search, contact: Contact) -> None:
        """A node so near that it will be one of the k nearest has answered: no need to wait."""
        near = contact.id ^ search.target < self._core.density.radius()
        if near and len(placement.given) < limits.DHT_K:
            self._give(now, placement, search, contact)

    def _about_stored(self, placement: _Placement, search: Search) -> bool:
        """True while as many as the caller waits for have a copy, are given one, or will be."""
        enough, has = limits.DHT_STORED_ENOUGH, placement.replicas
        if not placement.publication.handle or has >= enough or search.lookup is None:
            return False
        radius = self._core.density.radius()
        will = sum(contact.id ^ search.target < radius for contact in search.lookup.awaited())
        return has + len(placement.prompt) + will >= enough

    def _give(self, now: float, placement: _Placement, search: Search, contact: Contact) -> None:
        mine = placement.publication
        if contact.peer in placement.given or self._all.get(mine.name) is not mine:
            return
        placement.given[contact.peer] = placement.prompt[contact.peer] = None
        placement.awaited += 1
        self._core.ask_to_store(
            now,
            contact,
            placement.record,
            search.tokens.get(contact.peer, b""),
            partial(self._answered, placement, search, contact),
            partial(self._slow, placement, search, contact),
        )

    def _slow(self, placement: _Placement, search: Search, contact: Contact, now: float) -> None:
        placement.prompt.pop(contact.peer, None)
        self._core.searches.go_on(now, search)

    def _spread(self, placement: _Placement, now: float, search: Search) -> None:
        """The k nearest are known: each of them, this node included, gets a copy."""
        mine = placement.publication
        if self._all.get(mine.name) is not mine:
            return
        assert search.lookup is not None
        core = self._core
        targets = search.lookup.spread()
        distance = core.me.id ^ mine.target
        nearer = sum(contact.id ^ mine.target < distance for contact in targets)
        stays = not targets or (bool(core.me.addresses) and nearer < limits.DHT_K)
        if stays and len(targets) == limits.DHT_K:
            targets.pop()
        if stays:
            code = core.accept(now, placement.record)
            placement.replicas += code == "ok"
            placement.refused = code
        for contact in targets:
            self._give(now, placement, search, contact)
        placement.searching = False
        if not placement.awaited:
            self._finish(now, placement)

    def _answered(
        self,
        placement: _Placement,
        search: Search,
        contact: Contact,
        now: float,
        reply: Reply | None,
    ) -> None:
        self._core.heard(now, reply, contact=contact)
        placement.prompt.pop(contact.peer, None)
        placement.awaited -= 1
        if isinstance(reply, StoreReply):
            if reply.code == "ok":
                placement.replicas += 1
            else:
                placement.refused = reply.code
                if reply.code == "stale":
                    self._climb(now, placement, reply.sequence)
        if placement.replicas >= limits.DHT_STORED_ENOUGH and not placement.overtaken:
            self._tell(placement)
        if placement.searching:
            self._core.searches.go_on(now, search)
        elif placement.awaited == 0:
            self._finish(now, placement)

    def _tell(self, placement: _Placement) -> None:
        """The caller need not wait for the last copies."""
        mine = placement.publication
        current = self._all.get(mine.name) is mine and placement.record is mine.record
        if current and mine.handle:
            self._core.emit(DhtStored(mine.handle, mine.name, placement.replicas))
            mine.handle = 0

    def _climb(self, now: float, placement: _Placement, sequence: int) -> None:
        """Somebody holds a later record of ours: our clock was ahead once. Sign above it, once.

        What is claimed must lie within the clock error that records are believed with; else one
        liar could drive the sequence to its end.
        """
        ahead_s = limits.DHT_TTL_S_MAX + limits.DHT_CLOCK_SKEW_S
        highest = int((self._core.wall(now) + ahead_s) * 1000)
        if placement.record.sequence <= sequence <= highest:
            self._sequence = max(self._sequence, sequence)
            placement.overtaken = True

    def _finish(self, now: float, placement: _Placement) -> None:
        mine = placement.publication
        if self._all.get(mine.name) is not mine or placement.record is not mine.record:
            return
        if placement.overtaken and not mine.resigned:
            self._renew(now, mine)
            mine.resigned = True
            self._place(now, mine)
            return
        core = self._core
        left_s = mine.record.expires_s - core.wall(now)
        if placement.replicas:
            self._tell(placement)
            wait_s = mine.ttl_s / 2 if mine.keep else limits.DHT_REPLICATE_S
            self._look_again(mine, now + min(wait_s, max(left_s, 0.0)))
            return
        if mine.handle:
            core.emit(DhtFailed(mine.handle, mine.name, placement.refused))
            mine.handle = 0
        if mine.keep:
            self._look_again(mine, now + min(limits.DHT_RETRY_S, mine.ttl_s / 2))
        else:
            del self._all[mine.name]
