"""The DHT's messages: bounds before memory, and every message fits its frame."""

from __future__ import annotations

import msgpack
import pytest

from swarmtrain_protocols import limits, messages
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.messages.dht import (
    FindNode,
    FindValue,
    NodeInfo,
    Nodes,
    SignedRecord,
    StoreRecord,
    StoreReply,
    Values,
)

RECORD = SignedRecord(b"k" * 256, b"p" * 32, 7, 1_700_000_000, b"\x01", b"s" * 64)
INFO = NodeInfo(b"p" * 32, ("h:1",))
ALL = [
    FindNode(1, b"t" * 20),
    Nodes(1, (INFO,), b"t" * 16),
    FindValue(1, b"k" * 20, b"a" * 32, b"d" * 8),
    Values(1, (RECORD,), (INFO,), True, b"t" * 8),
    Values(1, (), (), False, b"t" * 8, True),
    StoreRecord(1, RECORD, b"t" * 16),
    StoreReply(1, "stale", 9),
]


@pytest.mark.parametrize("message", ALL, ids=lambda m: type(m).__name__)
def test_there_and_back(message: messages.Message) -> None:
    data = messages.encode(message)
    assert messages.decode(data) == message
    assert isinstance(msgpack.unpackb(data), dict)


def raw(**changes: object) -> bytes:
    record = [b"k", b"p" * 32, 7, 1, b"\x01", b"s" * 64]
    for index, value in changes.items():
        record[int(index[1:])] = value  # type: ignore[call-overload]
    return msgpack.packb({"type": "dht-store?", "request": 1, "record": record})


def test_the_raw_form_is_understood() -> None:
    assert isinstance(messages.decode(raw()), StoreRecord)


@pytest.mark.parametrize(
    "data",
    [
        raw(_0=b""),
        raw(_0=b"k" * 257),
        raw(_1=b"p" * 33),
        raw(_2=-1),
        raw(_2=1 << 60),
        raw(_3=1.5),
        raw(_4=b"v" * (limits.DHT_VALUE_BYTES_MAX + 1)),
        raw(_4="text"),
        raw(_5=b"s" * 63),
        msgpack.packb({"type": "dht-nodes", "request": 1, "contacts": [[b"p" * 32, []]] * 21}),
        msgpack.packb({"type": "dht-nodes", "request": 1, "contacts": [[b"p" * 32, ["a"] * 9]]}),
        msgpack.packb({"type": "dht-nodes", "request": 1, "contacts": [[b"p" * 32, ["a" * 129]]]}),
        msgpack.packb({"type": "dht-value?", "request": 1, "key": b"k" * 20, "after": b"a" * 33}),
        msgpack.packb({"type": "dht-node?", "request": 1}),
    ],
)
def test_what_is_out_of_bounds_is_malformed(data: bytes) -> None:
    with pytest.raises(PeerFault) as caught:
        messages.decode(data)
    assert caught.value.code == "malformed"


def test_the_longest_answer_fits_a_frame() -> None:
    address = "a" * limits.ADDRESS_CHARS_MAX
    contacts = (NodeInfo(b"p" * 32, (address,) * limits.ADDRESSES_PER_PEER_MAX),) * limits.DHT_K
    record = SignedRecord(
        b"k" * 256, b"p" * 32, 1 << 53, 1 << 53, b"v" * limits.DHT_VALUE_BYTES_MAX, b"s" * 64
    )
    count = limits.DHT_PAGE_BYTES // (limits.DHT_VALUE_BYTES_MAX + limits.DHT_KEY_BYTES_MAX)
    data = messages.encode(Values(1 << 53, (record,) * count, contacts, True))
    assert len(data) < limits.FRAME_BYTES_CONTROL_MAX
