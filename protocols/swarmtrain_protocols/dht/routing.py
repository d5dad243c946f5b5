"""The routing table: k-buckets, least recently seen first (Kademlia §2.2, §4.1).

Only peers that have proven their key and address come in. A full bucket keeps its old entries
while they answer, because a peer that has been up for long is the likeliest to stay up, and
because a flood of newcomers then cannot push out what is known (eclipse). Public addresses of one
/24 (IPv4) or /48 (IPv6) get few places; private ones are one operator's anyway and are not counted.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.dht.ids import ID_BITS, Contact, bucket_index, subnets


@dataclass(slots=True)
class _Bucket:
    contacts: dict[PeerId, Contact] = field(default_factory=dict)
    waiting: dict[PeerId, Contact] = field(default_factory=dict)
    """Replacement cache: seen while the bucket was full; the newest is the first to come in."""
    pinged: PeerId | None = None
    looked_up_at: float = -math.inf


def _by_distance(contacts: Iterable[Contact], target: int) -> list[Contact]:
    return sorted(contacts, key=lambda contact: contact.id ^ target)


class RoutingTable:
    """Contacts by distance from ``own``; bounded by 160 buckets of k and as many in waiting."""

    def __init__(self, own: int, k: int = limits.DHT_K) -> None:
        self._own = own
        self._k = k
        self._buckets = [_Bucket() for _ in range(ID_BITS)]
        self._occupied: list[int] = []
        """Which buckets have contacts, nearest first."""
        self._failures: dict[PeerId, int] = {}
        self._subnets: dict[str, int] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __contains__(self, contact: Contact) -> bool:
        return contact.id != self._own and contact.peer in self._bucket(contact).contacts

    def contacts(self) -> list[Contact]:
        """All contacts, nearest bucket first."""
        return self._inside(self._occupied)

    def _inside(self, indexes: Iterable[int]) -> list[Contact]:
        return [c for i in indexes for c in self._buckets[i].contacts.values()]

    def get(self, contact: Contact) -> Contact | None:
        """What the table knows about this peer."""
        return self._bucket(contact).contacts.get(contact.peer)

    def seen(self, contact: Contact) -> Contact | None:
        """A peer has shown that it is alive at these addresses.

        Returns:
            A contact to ping: the least recently seen of a full bucket. If it fails, ``failed``
            makes room; if it answers, ``seen`` keeps it and the newcomer waits.
        """
        if contact.id == self._own or not contact.addresses:
            return None
        bucket = self._bucket(contact)
        self._failures.pop(contact.peer, None)
        if bucket.pinged == contact.peer:
            bucket.pinged = None
        held = bucket.contacts.get(contact.peer)
        if held is not None:
            if held.addresses == contact.addresses:
                bucket.contacts[contact.peer] = bucket.contacts.pop(contact.peer)
                return None
            # Moved house: it must fit the subnet caps at its new address like anybody else.
            self._take_out(bucket, held)
        if len(bucket.contacts) < self._k:
            if self._fits(bucket, contact):
                self._put_in(bucket, contact)
            return None
        bucket.waiting.pop(contact.peer, None)
        bucket.waiting[contact.peer] = contact
        if len(bucket.waiting) > limits.DHT_REPLACEMENTS_MAX:
            del bucket.waiting[next(iter(bucket.waiting))]
        if bucket.pinged is not None:
            return None
        oldest = next(iter(bucket.contacts.values()))
        bucket.pinged = oldest.peer
        return oldest

    def failed(self, contact: Contact) -> bool:
        """A request to ``contact`` was not answered.

        Returns:
            True if it was thrown out: after two failures in a row, or at once if it was being
            pinged to make room.
        """
        if contact.id == self._own:
            return False
        bucket = self._bucket(contact)
        bucket.waiting.pop(contact.peer, None)
        pinged = bucket.pinged == contact.peer
        if pinged:
            bucket.pinged = None
        held = bucket.contacts.get(contact.peer)
        if held is None:
            return False
        count = self._failures.get(contact.peer, 0) + 1
        if count < limits.DHT_FAILURES_MAX and not pinged:
            self._failures[contact.peer] = count
            return False
        self.remove(contact)
        return True

    def remove(self, contact: Contact) -> None:
        """Throw a peer out; the newest one in waiting that fits takes its place."""
        if contact.id == self._own:
            return
        bucket = self._bucket(contact)
        self._failures.pop(contact.peer, None)
        bucket.waiting.pop(contact.peer, None)
        if bucket.pinged == contact.peer:
            bucket.pinged = None
        held = bucket.contacts.get(contact.peer)
        if held is None:
            return
        self._take_out(bucket, held)
        for candidate in reversed(bucket.waiting.values()):
            if self._fits(bucket, candidate):
                del bucket.waiting[candidate.peer]
                self._put_in(bucket, candidate)
                break

    def closest(self, target: int, count: int, but: bytes = b"") -> list[Contact]:
        """The ``count`` contacts nearest to ``target``, nearest first, without peer ``but``."""
        index = bucket_index(self._own, target) if target != self._own else 0
        # Bucket ``index`` shares the differing bit with the target. Those below it do not, and all
        # lie in one range of distance; above, distance is decided by the bucket alone.
        own = self._buckets[index].contacts
        found = _by_distance(own.values(), target)
        if len(found) < count + (but in own):
            below = [i for i in self._occupied if i < index]
            found += _by_distance(self._inside(below), target)
            for i in self._occupied[len(below) :]:
                if len(found) > count:  # one more than asked for: ``but`` may be among them
                    break
                if i > index:
                    found += _by_distance(self._buckets[i].contacts.values(), target)
        return [contact for contact in found[: count + 1] if contact.peer != but][:count]

    def looked_up(self, now: float, target: int) -> None:
        """A lookup for ``target`` has refreshed that bucket."""
        if target != self._own:
            self._buckets[bucket_index(self._own, target)].looked_up_at = now

    def stalest(self, now: float, rng: Random, age_s: float) -> int | None:
        """A random target in the bucket that has gone longest (at least ``age_s``) unrefreshed.

        Buckets nearer than the nearest contact are empty in any swarm of honest size; of those
        only the first is looked at.
        """
        if not self._occupied:
            return None
        lowest = max(0, self._occupied[0] - 1)
        index = min(range(lowest, ID_BITS), key=lambda i: (self._buckets[i].looked_up_at, -i))
        bucket = self._buckets[index]
        if bucket.looked_up_at > now - age_s:
            return None
        bucket.looked_up_at = now
        return self._own ^ (1 << index | rng.getrandbits(index) if index else 1)

    def _bucket(self, contact: Contact) -> _Bucket:
        return self._buckets[bucket_index(self._own, contact.id)]

    def _fits(self, bucket: _Bucket, contact: Contact) -> bool:
        for block in subnets(contact.addresses):
            if self._subnets.get(block, 0) >= limits.DHT_PER_SUBNET_IN_TABLE_MAX:
                return False
            inside = sum(block in subnets(other.addresses) for other in bucket.contacts.values())
            if inside >= limits.DHT_PER_SUBNET_IN_BUCKET_MAX:
                return False
        return True

    def _put_in(self, bucket: _Bucket, contact: Contact) -> None:
        if not bucket.contacts:
            insort(self._occupied, bucket_index(self._own, contact.id))
        bucket.contacts[contact.peer] = contact
        bucket.waiting.pop(contact.peer, None)
        for block in subnets(contact.addresses):
            self._subnets[block] = self._subnets.get(block, 0) + 1
        self._size += 1

    def _take_out(self, bucket: _Bucket, contact: Contact) -> None:
        del bucket.contacts[contact.peer]
        if not bucket.contacts:
            self._occupied.remove(bucket_index(self._own, contact.id))
        for block in subnets(contact.addresses):
            self._subnets[block] -= 1
            if not self._subnets[block]:
                del self._subnets[block]
        self._size -= 1
