"""Frames: round trip, any split, bounds before memory."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmtrain_protocols import messages
from swarmtrain_protocols.errors import LocalProtocolError, PeerFault
from swarmtrain_protocols.messages.fetch import FetchAccepted, FetchChunk, FetchRequest
from swarmtrain_protocols.messages.session import Goodbye, Hello, Ping
from swarmtrain_protocols.wire import Frame, FrameParser, encode_frame

LIMIT = 4096

_messages = st.one_of(
    st.builds(Ping, nonce=st.integers(0, 1 << 53)),
    st.builds(Goodbye, code=st.text(max_size=20), reason=st.text(max_size=60)),
    st.builds(FetchChunk, request=st.integers(0, 99), index=st.integers(0, 99)),
    st.builds(
        Hello,
        version=st.integers(0, 9),
        run=st.binary(min_size=32, max_size=32),
        name=st.text(max_size=20),
        listen=st.lists(st.text(max_size=20), max_size=8).map(tuple),
    ),
)


def _flat(events: list[Frame | PeerFault]) -> list[object]:
    return [(e.code, e.why) if isinstance(e, PeerFault) else e for e in events]


def test_layout_is_pinned_and_readable_by_another_messagepack() -> None:
    data = b"".join(encode_frame(Ping(nonce=7), b"tail"))
    length, header = struct.unpack_from("<IH", data)
    assert length == len(data) - 4
    assert msgpack.unpackb(data[6 : 6 + header]) == {"type": "ping", "nonce": 7}
    assert data[6 + header :] == b"tail"


def test_vectors() -> None:
    path = Path(__file__).parents[2] / "protocols" / "vectors" / "frame.json"
    for vector in json.loads(path.read_text())["vectors"]:
        raw, header = bytes.fromhex(vector["frame"]), bytes.fromhex(vector["header"])
        payload = bytes.fromhex(vector["payload"])
        assert raw == struct.pack("<IH", 2 + len(header) + len(payload), len(header)) + (
            header + payload
        )
        assert msgpack.unpackb(header)["type"] == vector["type"]
        (frame,) = FrameParser(LIMIT).feed(raw)
        assert isinstance(frame, Frame) and frame.payload == payload
        assert b"".join(encode_frame(frame.message, payload)) == raw


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(_messages, st.binary(max_size=300)), max_size=6), st.data())
def test_any_split_gives_the_same_frames(
    items: list[tuple[messages.Message, bytes]], data: st.DataObject
) -> None:
    stream = b"".join(bytes(p) for m, payload in items for p in encode_frame(m, payload))
    if data.draw(st.booleans()):  # also over garbage: faults must not depend on the split either
        where = data.draw(st.integers(0, len(stream)))
        stream = stream[:where] + data.draw(st.binary(max_size=20)) + stream[where:]
        whole = FrameParser(LIMIT).feed(stream)
    else:
        whole = FrameParser(LIMIT).feed(stream)
        assert [(f.message, f.payload) for f in whole if isinstance(f, Frame)] == items
        assert sum(f.nbytes for f in whole if isinstance(f, Frame)) == len(stream)
    parser = FrameParser(LIMIT)
    events: list[Frame | PeerFault] = []
    at = 0
    while at < len(stream):
        step = data.draw(st.integers(1, len(stream) - at))
        events += parser.feed(stream[at : at + step])
        at += step
    assert _flat(events) == _flat(whole)
    bytewise = FrameParser(LIMIT)
    assert _flat(
        [e for i in range(len(stream)) for e in bytewise.feed(stream[i : i + 1])]
    ) == _flat(whole)


@pytest.mark.parametrize("length", [0, 1, LIMIT + 1, 2**31, 2**32 - 1])
def test_a_length_outside_of_the_bound_kills_the_stream(length: int) -> None:
    parser = FrameParser(LIMIT)
    good = b"".join(encode_frame(Ping(nonce=1)))
    first, fault = parser.feed(good + struct.pack("<IH", length, 0))
    assert isinstance(first, Frame) and isinstance(fault, PeerFault)
    assert fault.code == "oversize"
    assert parser.feed(good) == [] and parser.buffered_bytes == 0


def test_a_hostile_length_takes_no_memory() -> None:
    parser = FrameParser(1 << 30)
    tracemalloc.start()
    parser.feed(struct.pack("<IH", 1 << 30, 10))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * 1024


def test_header_longer_than_the_frame() -> None:
    (fault,) = FrameParser(LIMIT).feed(struct.pack("<IH", 10, 9) + b"x" * 8)
    assert isinstance(fault, PeerFault) and fault.code == "malformed"


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xc1",
        msgpack.packb({"type": "no such"}),
        msgpack.packb({"type": "ping"}),
        msgpack.packb({"type": "ping", "nonce": -1}),
        msgpack.packb({"type": "ping", "nonce": "1"}),
        msgpack.packb({"type": "fetch?", "request": 1, "root": b"x", "first": 0, "count": 1}),
        b"\x91" * 3000,
        b"\x82\xa4type\xa4ping\xa5nonce\xff",
    ],
)
def test_outside_of_the_schema_is_a_fault_and_the_next_frame_still_arrives(header: bytes) -> None:
    frame = struct.pack("<IH", 2 + len(header), len(header)) + header
    fault, after = FrameParser(LIMIT).feed(frame + b"".join(encode_frame(Ping(nonce=5))))
    assert isinstance(fault, PeerFault) and fault.code == "malformed"
    assert isinstance(after, Frame) and after.message == Ping(nonce=5)


def test_the_limit_may_rise_between_frames() -> None:
    big = b"".join(encode_frame(Ping(nonce=2), b"x" * 5000))
    parser = FrameParser(LIMIT)
    parser.push(b"".join(encode_frame(Ping(nonce=1))) + big)
    first = parser.next_event()
    assert isinstance(first, Frame) and first.message == Ping(nonce=1)
    parser.max_bytes = 64 * 1024
    second = parser.next_event()
    assert isinstance(second, Frame) and second.payload == b"x" * 5000


def test_encoding_over_the_limit_is_our_own_mistake() -> None:
    with pytest.raises(LocalProtocolError):
        encode_frame(Ping(nonce=1), b"x" * LIMIT, LIMIT)
    many = tuple(bytes([1]) * 32 for _ in range(2000))
    with pytest.raises(LocalProtocolError):
        encode_frame(FetchAccepted(request=1, total=1, leaves=many, proof=()))


def test_payload_is_not_copied() -> None:
    payload = memoryview(bytearray(1000))
    parts = encode_frame(FetchRequest(request=1, root=b"r" * 32, first=0, count=1), payload)
    assert parts[1] is payload
