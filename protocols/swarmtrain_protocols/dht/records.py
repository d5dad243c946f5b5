"""Signed values: how they are made, when they are believed, and how two of them merge.

A record belongs to (key, publisher): nobody can write under another's sub-key, or roll it back.
Of two records of one publisher the one with the greater (sequence, expiry, value) survives; that
rule is commutative and idempotent, so replicas agree whatever the order of arrival.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import msgspec
from blake3 import blake3

from swarmtrain_protocols import limits
from swarmtrain_protocols.dht.validators import breaks_its_rule
from swarmtrain_protocols.identity import Keyring
from swarmtrain_protocols.messages.dht import SignedRecord

_DOMAIN = b"dht record"
_RECORD_OVERHEAD_BYTES = 256
"""Counted per record besides its value: keys, signature, containers."""

_encoder = msgspec.msgpack.Encoder(order="deterministic")
_decoder = msgspec.msgpack.Decoder()

Slot = tuple[bytes, bytes]
"""(key id of 20 bytes, publisher of 32 bytes)."""


def encode_value(value: Any) -> bytes:
    """MessagePack bytes of what somebody wants to publish (plain data, at most 1 kB)."""
    return _encoder.encode(value)


def decode_value(data: bytes) -> Any:
    """The plain data of a record that was validated."""
    return _decoder.decode(data)


def is_messagepack(data: bytes) -> bool:
    """True if ``data`` is exactly one MessagePack value that every reader can decode.

    How deep a decoder gets depends on where it is called, so a bound of our own decides.
    """
    try:
        value = _decoder.decode(data)
    except (ValueError, TypeError, RecursionError, OverflowError):
        return False
    return not _deeper(value, limits.DHT_VALUE_DEPTH_MAX)


def _deeper(value: object, depth: int) -> bool:
    if isinstance(value, dict):
        items = (*value.keys(), *value.values())
        return depth == 0 or any(_deeper(item, depth - 1) for item in items)
    if isinstance(value, (list, tuple)):
        return depth == 0 or any(_deeper(item, depth - 1) for item in value)
    return False


def _payload(
    run: bytes, name: bytes, publisher: bytes, sequence: int, expires_s: int, value: bytes
) -> bytes:
    return _encoder.encode((run, name, publisher, sequence, expires_s, value))


def sign_record(
    keyring: Keyring, run: bytes, name: bytes, sequence: int, expires_s: int, value: bytes
) -> SignedRecord:
    """A record of this site. ``run`` keeps records of one run out of every other."""
    assert 0 < len(name) <= limits.DHT_KEY_BYTES_MAX and len(value) <= limits.DHT_VALUE_BYTES_MAX
    publisher = bytes(keyring.peer_id)
    payload = _payload(run, name, publisher, sequence, expires_s, value)
    signature = keyring.sign(_DOMAIN, payload)
    return SignedRecord(name, publisher, sequence, expires_s, value, signature)


def refusal(keyring: Keyring, run: bytes, record: SignedRecord, wall_s: float) -> str:
    """Why ``record`` is not believed at wall clock ``wall_s``, or "".

    ``oversize``, ``malformed``, ``forged`` and ``invalid`` are faults of whoever sent it;
    ``expired`` and ``far`` may come from a wrong clock. Cheap checks come before the signature.
    """
    if len(record.value) > limits.DHT_VALUE_BYTES_MAX:
        return "oversize"
    if record.expires_s <= wall_s:
        return "expired"
    if record.expires_s > wall_s + limits.DHT_TTL_S_MAX + limits.DHT_CLOCK_SKEW_S:
        return "far"
    payload = _payload(
        run, record.name, record.publisher, record.sequence, record.expires_s, record.value
    )
    if not keyring.verify(record.publisher, _DOMAIN, payload, record.signature):
        return "forged"
    if not is_messagepack(record.value):
        return "malformed"
    if breaks_its_rule(record.name, record.publisher, record.value):
        return "invalid"
    return ""


FAULTS = {
    "oversize": "oversize",
    "malformed": "malformed",
    "forged": "bad_signature",
    "invalid": "dht_invalid",
}
"""Refusals that an honest sender cannot cause, as it validates before it sends, and their codes."""


def rank(record: SignedRecord) -> tuple[int, int, bytes]:
    """Of two records in one slot the one with the greater rank survives."""
    return (record.sequence, record.expires_s, record.value)


def latest(records: Iterable[SignedRecord]) -> SignedRecord | None:
    """The record with the latest expiry; among equals that of the smallest publisher id."""
    return min(records, key=lambda record: (-record.expires_s, record.publisher), default=None)


def digest_of(records: Iterable[SignedRecord]) -> bytes:
    """8 bytes that are equal where the same records (in order of publisher) are held; "" of none.

    BLAKE3 over publisher, sequence and expiry (8 big-endian bytes each), signature of each record.
    """
    hasher = blake3()
    count = 0
    for record in records:
        count += 1
        hasher.update(record.publisher)
        hasher.update(record.sequence.to_bytes(8, "big"))
        hasher.update(record.expires_s.to_bytes(8, "big"))
        hasher.update(record.signature)
    return hasher.digest(limits.DHT_DIGEST_BYTES) if count else b""


class Marks:
    """The highest sequence seen per slot, so that it never goes backwards at one reader.

    A mark is kept until no older record of its slot can be valid any more. The table is bounded;
    when it is full the oldest mark goes.
    """

    def __init__(self) -> None:
        self._seen: OrderedDict[Slot, tuple[int, float]] = OrderedDict()

    def sequence(self, slot: Slot) -> int:
        """The highest sequence seen, -1 if none."""
        return self._seen.get(slot, (-1, 0.0))[0]

    def see(self, record: SignedRecord, wall_s: float) -> None:
        slot = (record.key, record.publisher)
        forget_s = wall_s + limits.DHT_TTL_S_MAX + 2 * limits.DHT_CLOCK_SKEW_S
        sequence = max(record.sequence, self.sequence(slot))
        self._seen[slot] = (sequence, forget_s)
        self._seen.move_to_end(slot)
        if len(self._seen) > limits.DHT_MARKS_MAX:
            self._seen.popitem(last=False)

    def purge(self, wall_s: float) -> None:
        # Marks are in the order in which they were last seen, so the oldest are in front.
        while self._seen and next(iter(self._seen.values()))[1] <= wall_s:
            self._seen.popitem(last=False)

    def __len__(self) -> int:
        return len(self._seen)


class RecordStore:
    """The records that a node keeps for others. Only validated records may be put in."""

    def __init__(self) -> None:
        self._records: dict[bytes, dict[bytes, SignedRecord]] = {}
        self._published: dict[bytes, int] = {}
        self._replicate_at: dict[Slot, float] = {}
        self._expiries: list[tuple[int, bytes, bytes]] = []
        self._replications: list[tuple[float, bytes, bytes]] = []
        self.nbytes = 0
        self.marks = Marks()

    def __len__(self) -> int:
        return len(self._replicate_at)

    def holds(self, record: SignedRecord) -> bool:
        """True if exactly this record is held, so that its signature need not be checked again."""
        return self._records.get(record.key, {}).get(record.publisher) == record

    def put(self, record: SignedRecord, wall_s: float, replicate_at: float) -> str:
        """``new``, ``same``, or why not: ``stale`` or ``full``. A refusal changes nothing."""
        slot = (record.key, record.publisher)
        under_key = self._records.get(record.key, {})
        held = under_key.get(record.publisher)
        if held == record:
            self._schedule(slot, replicate_at)
            return "same"
        if record.sequence < self.marks.sequence(slot):
            return "stale"
        if held is not None and rank(record) <= rank(held):
            return "stale"
        grows = len(record.value) - len(held.value) if held else self._cost(record)
        if self.nbytes + grows > limits.DHT_STORE_BYTES_MAX:
            return "full"
        if held is None:
            count = self._published.get(record.publisher, 0)
            if len(under_key) >= limits.DHT_RECORDS_PER_KEY_MAX:
                return "full"
            if count >= limits.DHT_RECORDS_PER_PUBLISHER_MAX:
                return "full"
            self._published[record.publisher] = count + 1
        self._records.setdefault(record.key, {})[record.publisher] = record
        self.nbytes += grows
        self.marks.see(record, wall_s)
        heapq.heappush(self._expiries, (record.expires_s, *slot))
        self._schedule(slot, replicate_at)
        return "new"

    def under(self, key: bytes, wall_s: float) -> list[SignedRecord]:
        """Records under ``key`` that have not expired, in order of publisher."""
        found = self._records.get(key)
        if not found:
            return []
        return [found[p] for p in sorted(found) if found[p].expires_s > wall_s]

    def keys(self) -> list[bytes]:
        """Keys in order of first arrival."""
        return list(self._records)

    def purge(self, wall_s: float) -> None:
        """Forget what has expired."""
        while self._expiries and self._expiries[0][0] <= wall_s:
            _, key, publisher = heapq.heappop(self._expiries)
            held = self._records.get(key, {}).get(publisher)
            if held is not None and held.expires_s <= wall_s:
                self._remove(held)
        self.marks.purge(wall_s)

    def next_expiry_s(self) -> int | None:
        """Wall clock at which ``purge`` has something to do."""
        return self._expiries[0][0] if self._expiries else None

    def due(self, now: float, count: int) -> list[SignedRecord]:
        """At most ``count`` records whose time to be replicated has come; each is given once."""
        found: list[SignedRecord] = []
        while self._replications and self._replications[0][0] <= now and len(found) < count:
            at, key, publisher = heapq.heappop(self._replications)
            if self._replicate_at.get((key, publisher)) == at:
                self._replicate_at[key, publisher] = math.inf
                found.append(self._records[key][publisher])
        return found

    def schedule(self, record: SignedRecord, replicate_at: float) -> None:
        """Set the next time at which ``due`` gives a held record."""
        self._schedule((record.key, record.publisher), replicate_at)

    def put_off(self, key: bytes, replicate_at: float) -> None:
        """Somebody else has looked after the copies of all records under ``key``."""
        for record in self._records.get(key, {}).values():
            self._schedule((key, record.publisher), replicate_at)

    def next_replication(self) -> float:
        """When ``due`` has something to give; ``math.inf``: not as things stand."""
        while self._replications:
            at, key, publisher = self._replications[0]
            if self._replicate_at.get((key, publisher)) == at:
                return at
            heapq.heappop(self._replications)
        return math.inf

    @staticmethod
    def _cost(record: SignedRecord) -> int:
        return len(record.value) + _RECORD_OVERHEAD_BYTES

    def _schedule(self, slot: Slot, at: float) -> None:
        self._replicate_at[slot] = at
        heapq.heappush(self._replications, (at, *slot))
        self._compact()

    def _remove(self, record: SignedRecord) -> None:
        slot = (record.key, record.publisher)
        del self._replicate_at[slot]
        del self._records[record.key][record.publisher]
        if not self._records[record.key]:
            del self._records[record.key]
        self._published[record.publisher] -= 1
        if not self._published[record.publisher]:
            del self._published[record.publisher]
        self.nbytes -= self._cost(record)
        assert self.nbytes >= 0

    def _compact(self) -> None:
        """Heaps hold entries of replaced records; rebuild before those are the majority."""
        bound = 64 + 2 * len(self._replicate_at)
        if len(self._expiries) > bound:
            self._expiries = [
                (record.expires_s, key, publisher)
                for key, found in self._records.items()
                for publisher, record in found.items()
            ]
            heapq.heapify(self._expiries)
        if len(self._replications) > bound:
            self._replications = [(at, *slot) for slot, at in self._replicate_at.items()]
            heapq.heapify(self._replications)
