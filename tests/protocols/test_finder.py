"""Members' addresses in the DHT: what is published, who is looked up, what is believed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec
import pytest

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Connect, Effect
from swarmtrain_protocols.dht.events import DhtFailed, DhtFound
from swarmtrain_protocols.finder import ADDRESS_TTL_S, Finder, address_key
from tests.protocols.rounds_kit import A, B, C, faults, of_kind, take


@dataclass
class Record:
    publisher: bytes
    value: bytes


class FakeDht:
    def __init__(self) -> None:
        self.stored: list[tuple[bytes, bytes, float, bool]] = []
        self.asked: list[bytes] = []
        self.bootstraps = 0

    def bootstrap(self, now: float) -> None:
        self.bootstraps += 1

    def store(self, now: float, key: bytes, value: bytes, ttl_s: float, *, keep: bool) -> int:
        self.stored.append((key, value, ttl_s, keep))
        return 0

    def withdraw(self, now: float, key: bytes) -> None:
        self.stored.clear()

    def get(self, now: float, key: bytes) -> int:
        self.asked.append(key)
        return len(self.asked)


class Desk:
    def __init__(self, addresses: tuple[str, ...] = ("127.0.0.1:1",)) -> None:
        self.dht = FakeDht()
        self.out: list[Effect] = []
        self.finder = Finder(A, addresses, self.dht, self.out)  # type: ignore[arg-type]

    def found(self, handle: int, *records: Record) -> bool:
        event = DhtFound(handle, address_key(B), tuple(records))  # type: ignore[arg-type]
        return self.finder.answered(event)


def pack(*addresses: object) -> bytes:
    return msgspec.msgpack.encode(list(addresses))


def test_a_member_publishes_its_addresses_once() -> None:
    desk = Desk()
    desk.finder.publish(1.0)
    desk.finder.publish(2.0)
    assert desk.dht.stored == [(b"member/" + A, pack("127.0.0.1:1"), ADDRESS_TTL_S, True)]
    assert desk.dht.bootstraps == 1
    assert ADDRESS_TTL_S <= limits.DHT_TTL_S_MAX < math.inf
    assert len(address_key(A)) <= limits.DHT_KEY_BYTES_MAX


def test_who_cannot_be_dialled_publishes_nothing() -> None:
    desk = Desk(())
    desk.finder.publish(1.0)
    assert desk.dht.stored == [] and desk.dht.bootstraps == 1


def test_who_moves_says_so_and_who_cannot_be_dialled_any_more_takes_it_back() -> None:
    desk = Desk()
    desk.finder.moved(0.5, ("127.0.0.1:2",))
    assert desk.dht.stored == [], "it is no member yet"
    desk.finder.publish(1.0)
    desk.finder.moved(2.0, ("127.0.0.1:3",))
    assert [value for _, value, _, _ in desk.dht.stored] == [
        pack("127.0.0.1:2"),
        pack("127.0.0.1:3"),
    ]
    desk.finder.moved(3.0, ())
    assert desk.dht.stored == []


def test_a_search_ends_in_a_connection() -> None:
    desk = Desk()
    desk.finder.look_up(1.0, B)
    desk.finder.look_up(1.1, B)
    assert desk.dht.asked == [address_key(B)]
    assert desk.found(1, Record(B, pack("10.0.0.1:5", "10.0.0.2:5")))
    assert take(desk.out) == [Connect(B, ("10.0.0.1:5", "10.0.0.2:5"))]
    assert not desk.found(1, Record(B, pack("10.0.0.9:5")))  # answered already
    assert take(desk.out) == []


def test_a_failed_search_may_be_repeated() -> None:
    desk = Desk()
    desk.finder.look_up(1.0, B)
    assert desk.finder.answered(DhtFailed(1, address_key(B), "timeout"))
    assert not desk.finder.answered(DhtFailed(7, address_key(B), "timeout"))
    desk.finder.look_up(2.0, B)
    assert len(desk.dht.asked) == 2 and desk.out == []


def test_only_the_peer_itself_says_where_it_is() -> None:
    """Bad input: somebody else's record under the key of a member."""
    desk = Desk()
    desk.finder.look_up(1.0, B)
    assert desk.found(1, Record(C, pack("6.6.6.6:6")))
    assert of_kind(take(desk.out), Connect) == []


@pytest.mark.parametrize(
    "value", [b"", b"\xc1", pack(1), b"\x91\xa2\xff\xfe", msgspec.msgpack.encode({"a": 1})]
)
def test_a_record_that_is_no_list_of_addresses_names_its_publisher(value: bytes) -> None:
    desk = Desk()
    desk.finder.look_up(1.0, B)
    assert desk.found(1, Record(B, value), Record(B, pack("10.0.0.1:5")))
    effects = take(desk.out)
    assert faults(effects) == [("malformed_address", B)]
    assert of_kind(effects, Connect) == [Connect(B, ("10.0.0.1:5",))]


def test_addresses_and_searches_are_bounded() -> None:
    desk = Desk()
    for number in range(2 * limits.MEMBERS_MAX):
        desk.finder.look_up(1.0, number.to_bytes(32, "big"))  # type: ignore[arg-type]
    assert len(desk.dht.asked) == limits.MEMBERS_MAX
    desk = Desk()
    desk.finder.look_up(1.0, B)
    desk.found(1, Record(B, pack(*[f"10.0.0.{n}:1" for n in range(100)])))
    (connect,) = take(desk.out)
    assert len(connect.addresses) == limits.ADDRESSES_PER_PEER_MAX
