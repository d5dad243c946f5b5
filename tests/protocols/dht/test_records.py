"""Records: what is believed, what survives a merge, and what memory they may take."""

from __future__ import annotations

import itertools

import msgpack  # the independent implementation
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain_protocols import limits
from swarmtrain_protocols.dht.ids import id_bytes, key_id
from swarmtrain_protocols.dht.records import (
    Marks,
    RecordStore,
    decode_value,
    encode_value,
    is_messagepack,
    latest,
    rank,
    refusal,
    sign_record,
)
from swarmtrain_protocols.identity import Ed25519Keyring, signed_bytes
from swarmtrain_protocols.messages.dht import SignedRecord
from swarmtrain_protocols.testing.keyring import FakeKeyring

RUN = bytes(range(32))
WALL_S = 1_700_000_000
NAME = b"somewhere"
KEY = id_bytes(key_id(NAME))
ALICE = Ed25519Keyring(b"\x01" * 32)
BOB = Ed25519Keyring(b"\x02" * 32)
VALUE = encode_value({"at": "h:1"})
change = msgspec.structs.replace


def signed(
    sequence: int = 1, expires_s: int = WALL_S + 60, value: bytes = VALUE, name: bytes = NAME
) -> SignedRecord:
    return sign_record(ALICE, RUN, name, sequence, expires_s, value)


def cheap(who: str, sequence: int = 1, ttl_s: int = 60, value: bytes = VALUE, name: bytes = NAME):
    return sign_record(FakeKeyring(who), RUN, name, sequence, WALL_S + ttl_s, value)


def test_the_signature_covers_every_field_and_the_run() -> None:
    record = signed()
    assert refusal(BOB, RUN, record, WALL_S) == ""
    covered = msgpack.packb([RUN, NAME, ALICE.peer_id, 1, WALL_S + 60, VALUE], use_bin_type=True)
    assert record.signature == ALICE.sign(b"dht record", covered)
    assert signed_bytes(b"dht record", covered).startswith(b"swarmtrain/1 dht record\0")
    forged = [
        change(record, name=b"elsewhere"),
        change(record, publisher=bytes(BOB.peer_id)),
        change(record, sequence=2),
        change(record, expires_s=WALL_S + 61),
        change(record, value=encode_value("other")),
        change(record, signature=bytes(64)),
    ]
    for other in forged:
        assert refusal(BOB, RUN, other, WALL_S) == "forged"
    assert refusal(BOB, bytes(32), record, WALL_S) == "forged"


def test_expiry_is_believed_within_bounds_only() -> None:
    ahead = int(limits.DHT_TTL_S_MAX + limits.DHT_CLOCK_SKEW_S)
    assert refusal(BOB, RUN, signed(expires_s=WALL_S + ahead), WALL_S) == ""
    assert refusal(BOB, RUN, signed(expires_s=WALL_S + ahead + 1), WALL_S) == "far"
    assert refusal(BOB, RUN, signed(expires_s=WALL_S), WALL_S) == "expired"
    assert refusal(BOB, RUN, signed(expires_s=WALL_S + 1), WALL_S) == ""


def test_values_are_messagepack_of_at_most_a_kilobyte() -> None:
    big = encode_value(b"x" * (limits.DHT_VALUE_BYTES_MAX - 3))
    assert len(big) == limits.DHT_VALUE_BYTES_MAX
    assert refusal(BOB, RUN, signed(value=big), WALL_S) == ""
    assert refusal(BOB, RUN, change(signed(), value=big + b"x"), WALL_S) == "oversize"
    assert refusal(BOB, RUN, signed(value=b"\xc1"), WALL_S) == "malformed"
    assert refusal(BOB, RUN, signed(value=VALUE + b"\xc0"), WALL_S) == "malformed"
    assert refusal(BOB, RUN, signed(value=b""), WALL_S) == "malformed"
    with pytest.raises(AssertionError):
        signed(value=big + b"x")


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.binary()
    | st.text()
    | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(plain, st.binary(min_size=1, max_size=8))
def test_what_another_library_packs_is_read_and_nothing_may_follow(
    value: object, tail: bytes
) -> None:
    data = msgpack.packb(value)
    assert is_messagepack(data)
    assert decode_value(data) == value
    assert not is_messagepack(data + tail)
    assert not is_messagepack(data[:-1])


@given(st.binary(max_size=1024))
def test_any_bytes_are_judged_without_an_exception(data: bytes) -> None:
    if is_messagepack(data):
        assert repr(decode_value(data))


@pytest.mark.parametrize("head", [b"\x91", b"\x81\xa1a"])
def test_nesting_beyond_the_bound_is_refused_wherever_it_is_read(head: bytes) -> None:
    most = limits.DHT_VALUE_DEPTH_MAX
    assert is_messagepack(head * most + b"\xc0")
    assert not is_messagepack(head * (most + 1) + b"\xc0")
    assert not is_messagepack(head * 340 + b"\xc0")
    assert decode_value(encode_value([1, {"a": b"x"}, None])) == [1, {"a": b"x"}, None]


def test_the_merge_does_not_depend_on_the_order_of_arrival() -> None:
    versions = [
        signed(1, WALL_S + 90),
        signed(2, WALL_S + 30),
        signed(2, WALL_S + 60, encode_value("a")),
        signed(2, WALL_S + 60, encode_value("b")),
    ]
    best = max(versions, key=rank)
    assert best == versions[3]
    for order in itertools.permutations(versions):
        store = RecordStore()
        for record in order:
            store.put(record, WALL_S, 0.0)
        assert store.under(KEY, WALL_S) == [best]
        assert len(store) == 1


def test_a_record_is_never_rolled_back() -> None:
    store = RecordStore()
    assert store.put(signed(5), WALL_S, 10.0) == "new"
    assert store.put(signed(5), WALL_S, 20.0) == "same"
    before = (store.nbytes, store.under(KEY, WALL_S))
    assert store.put(signed(4, WALL_S + 600), WALL_S, 30.0) == "stale"
    assert (store.nbytes, store.under(KEY, WALL_S)) == before
    assert store.next_replication() == 20.0
    # Neither after the newer record has expired, while the older one would still be valid.
    store.purge(WALL_S + 61)
    assert len(store) == 0
    assert store.nbytes == 0
    assert store.put(signed(4, WALL_S + 600), WALL_S + 61, 40.0) == "stale"
    assert store.put(signed(6, WALL_S + 600), WALL_S + 61, 40.0) == "new"


def test_expired_records_are_neither_given_nor_kept() -> None:
    store = RecordStore()
    store.put(cheap("a", ttl_s=10), WALL_S, 0.0)
    store.put(cheap("b", ttl_s=20), WALL_S, 0.0)
    assert store.next_expiry_s() == WALL_S + 10
    assert len(store.under(KEY, WALL_S + 9.9)) == 2
    assert len(store.under(KEY, WALL_S + 10)) == 1
    store.purge(WALL_S + 15)
    assert len(store) == 1
    store.purge(WALL_S + 20)
    assert (len(store), store.nbytes, store.keys(), store.next_expiry_s()) == (0, 0, [], None)


def test_memory_per_key_and_per_publisher_is_bounded() -> None:
    store = RecordStore()
    codes = [store.put(cheap(f"p{n}"), WALL_S, 0.0) for n in range(70)]
    assert codes == ["new"] * limits.DHT_RECORDS_PER_KEY_MAX + ["full"] * 6
    assert store.put(cheap("p0", 2, value=encode_value("new")), WALL_S, 0.0) == "new"
    store = RecordStore()
    codes = [store.put(cheap("p", name=b"n%d" % n), WALL_S, 0.0) for n in range(260)]
    assert codes == ["new"] * limits.DHT_RECORDS_PER_PUBLISHER_MAX + ["full"] * 4
    store.purge(WALL_S + 60)
    assert store.put(cheap("p", 2, 90, name=b"n999"), WALL_S + 60, 0.0) == "new"


def test_memory_in_total_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DHT_STORE_BYTES_MAX", 10_000)
    store = RecordStore()
    value = encode_value(b"x" * 700)
    codes = [store.put(cheap(f"p{n}", value=value), WALL_S, 0.0) for n in range(20)]
    assert codes.count("new") == 10_000 // (703 + 256)
    assert set(codes) == {"new", "full"}
    assert store.nbytes <= 10_000


def test_bookkeeping_does_not_grow_with_updates() -> None:
    store = RecordStore()
    for number in range(2_000):
        assert store.put(cheap("a", number), WALL_S, float(number)) == "new"
        store.put(cheap("a", number), WALL_S, number + 0.5)
    assert len(store) == 1
    assert len(store._expiries) <= 100
    assert len(store._replications) <= 100
    assert len(store.marks) == 1


def test_marks_are_bounded_and_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DHT_MARKS_MAX", 100)
    marks = Marks()
    for number in range(150):
        marks.see(cheap(f"p{number}", 7), WALL_S + number)
    assert len(marks) == 100
    assert marks.sequence((KEY, bytes(FakeKeyring("p0").peer_id))) == -1
    newest = (KEY, bytes(FakeKeyring("p149").peer_id))
    marks.see(cheap("p149", 3), WALL_S + 149)
    assert marks.sequence(newest) == 7
    marks.purge(WALL_S + 149 + limits.DHT_TTL_S_MAX)
    assert marks.sequence(newest) == 7
    marks.purge(WALL_S + 150 + limits.DHT_TTL_S_MAX + 2 * limits.DHT_CLOCK_SKEW_S)
    assert len(marks) == 0


def test_replication_comes_due_once() -> None:
    store = RecordStore()
    for number in range(5):
        store.put(cheap(f"p{number}"), WALL_S, 10.0 + number)
    assert store.next_replication() == 10.0
    assert store.due(9.9, 10) == []
    assert len(store.due(12.0, 2)) == 2
    assert len(store.due(12.0, 2)) == 1
    assert store.due(12.0, 2) == []
    store.schedule(cheap("p4"), 99.0)
    assert len(store.due(50.0, 10)) == 1
    assert store.next_replication() == 99.0


def test_latest_expiry_wins_and_ties_go_to_the_smallest_publisher() -> None:
    early, late = cheap("a", ttl_s=10), cheap("b", ttl_s=20)
    assert latest([early, late]) == late
    tied = [cheap(name, ttl_s=20) for name in ("c", "d", "e")]
    assert latest([early, *tied]) == min(tied, key=lambda record: record.publisher)
    assert latest([]) is None
