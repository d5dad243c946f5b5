"""Targets of the wire: frames, messages, entries, the handshake, an open link, bulk headers."""

from __future__ import annotations

import math
import zlib
from random import Random
from typing import Any

import msgspec

from swarmtrain_protocols import bulklink, entries, limits, messages
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.identity import Ed25519Keyring
from swarmtrain_protocols.messages.session import Hello
from swarmtrain_protocols.session import SessionCore
from swarmtrain_protocols.session_events import Closed, Faulted, Opened
from swarmtrain_protocols.wire import FrameParser, encode_frame
from tests.fuzz.engine import Target
from tests.fuzz.mutate import splice_msgpack
from tests.fuzz.schema import SchemaSplice
from tests.samples import instance

SAMPLES = [instance(cls, large=large) for cls in messages.MESSAGES for large in (False, True)]
ENCODED = [messages.encode(message) for message in SAMPLES]
BODIES = [
    msgspec.msgpack.encode(instance(cls, large=large))
    for cls in entries.EntryBody.__args__  # type: ignore[attr-defined]
    for large in (False, True)
]


def _frames(data: bytes) -> object:
    whole = FrameParser(limits.FRAME_BYTES_CONTROL_MAX).feed(data)
    rng = Random(zlib.crc32(data))
    parser, found, at = FrameParser(limits.FRAME_BYTES_CONTROL_MAX), [], 0
    while at < len(data):
        step = rng.choice((1, 2, 5, 1 + rng.randrange(len(data))))
        found += parser.feed(data[at : at + step])
        at += step
    flat = [[(e.code, e.why) if isinstance(e, PeerFault) else e for e in x] for x in (whole, found)]
    # The text of an accepted NaN differs from itself, so compare what would be sent on.
    assert repr(flat[0]) == repr(flat[1]), "the split of the stream matters"
    assert parser.buffered_bytes <= len(data)
    kinds = [e.code if isinstance(e, PeerFault) else type(e.message).__name__ for e in whole]
    return kinds[:3]


def frames() -> Target:
    pairs = zip(SAMPLES, SAMPLES[7:] + SAMPLES[:7], strict=True)
    seeds = [
        b"".join(bytes(part) for m in pair for part in encode_frame(m, b"payload"[:number]))
        for number, pair in enumerate(pairs)
    ]
    # Three parsers' worth: the whole, the pieces, the events of both for the comparison.
    return Target("frames", _frames, (), seeds, memory_bytes=1 << 20, share=0.6)


def _floats(value: Any) -> list[float]:
    if isinstance(value, float):
        return [value]
    if isinstance(value, msgspec.Struct):
        value = [getattr(value, name) for name in value.__struct_fields__]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in _floats(item)]
    return []


def _same(one: Any, two: Any) -> bool:
    """Equal after the round trip; a NaN equals itself."""
    return bool(one == two) or messages.encode(one) == messages.encode(two)


def _message(data: bytes) -> object:
    message = messages.decode(data)
    again = messages.encode(message)
    assert _same(messages.decode(again), message), "not what was said"
    assert len(again) <= 9 * len(data) + 4096
    strange = sum(not math.isfinite(number) for number in _floats(message))
    return type(message).__name__, bool(strange)


def message() -> Target:
    splice = SchemaSplice(messages.decode, messages.encode, SAMPLES, splice_msgpack)
    return Target("message", _message, (PeerFault,), ENCODED, splice, 1 << 20)


def _entry(data: bytes) -> object:
    body = entries.decode_body(data)
    assert entries.encode_body(entries.decode_body(entries.encode_body(body))) == (
        entries.encode_body(body)
    )
    return type(body).__name__


def entry() -> Target:
    corpus = [entries.decode_body(data) for data in BODIES]
    splice = SchemaSplice(entries.decode_body, entries.encode_body, corpus, splice_msgpack)
    return Target("entry", _entry, (PeerFault,), BODIES, splice, 1 << 20)


# -- sessions ---------------------------------------------------------------------------------

HELLO = Hello(version=1, run=b"r" * 32, name="ann", listen=("127.0.0.1:1",))
KEYS = (Ed25519Keyring(b"a" * 32), Ed25519Keyring(b"b" * 32))
_CLOSES = frozenset(
    "malformed tampered oversize flood credit unexpected wrong_key non_finite wrong_run version "
    "duplicate timeout disconnected".split()
)


def _core(side: int) -> SessionCore:
    return SessionCore(
        now=0.0,
        initiator=side == 0,
        keyring=KEYS[side],
        static_key=bytes([side + 1]) * 32,
        ephemeral_key=bytes([side + 11]) * 32,
        hello=HELLO,
        admit=lambda peer, hello: None,
    )


def _recorded() -> list[tuple[int, bytes]]:
    """(side, bytes) of every flight of an undisturbed opening; keys and so bytes are fixed."""
    cores, flights = (_core(0), _core(1)), []
    for number in range(6):
        side = number % 2
        if data := cores[side].data_to_send():
            flights.append((side, data))
            cores[1 - side].receive_bytes(0.0, data)
    assert all(core.is_open for core in cores)
    return flights


FLIGHTS = _recorded()


def _handshake(data: bytes) -> object:
    """Byte 0 names a flight, the rest takes its place; the other side goes on as it would."""
    if not data:
        return "empty"
    number = data[0] % len(FLIGHTS)
    side, honest = FLIGHTS[number]
    core, hostile = _core(1 - side), data[1:]
    for before in range(number):
        sender, flight = FLIGHTS[before]
        if sender == side:
            core.receive_bytes(0.0, flight)
        core.data_to_send()
    core.receive_bytes(0.0, hostile)
    opened = [event for event in core.events() if isinstance(event, Opened)]
    assert not opened or hostile.startswith(honest[: len(honest)]), "opened by other bytes"
    # Before there is a key nothing but bounded handshake messages is kept.
    held = len(core._in) + core._parser.buffered_bytes
    assert held <= len(hostile) and (core.closed or held <= limits.FRAME_BYTES_CONTROL_MAX + 2)
    if not opened:  # silence ends it
        core.tick(limits.HANDSHAKE_TIMEOUT_S)
        assert core.closed
    closes = [event for event in core.events() if isinstance(event, Closed)]
    assert all(event.code in _CLOSES for event in closes), closes
    return number, [event.code for event in closes]


def handshake() -> Target:
    seeds = [bytes([number]) + data for number, (_, data) in enumerate(FLIGHTS)]
    return Target("handshake", _handshake, (), seeds, memory_bytes=1 << 19, share=0.15)


class _Pair:
    """An open link; side 0 is hostile: it has the keys, and seals whatever it likes."""

    def __init__(self) -> None:
        self.cores = (_core(0), _core(1))
        for side, data in FLIGHTS:
            self.cores[side].data_to_send()
            self.cores[1 - side].receive_bytes(0.0, data)
        self.cores[1].events()
        self.faults = 0

    def say(self, plain: bytes) -> object:
        cipher, core = self.cores[0]._tx, self.cores[1]
        assert cipher is not None and core.is_open
        said = []
        for at in range(0, len(plain), 60_000):
            sealed = cipher.encrypt(plain[at : at + 60_000])
            core.receive_bytes(1.0, len(sealed).to_bytes(2, "little") + sealed)
        for event in core.events():
            self.faults += isinstance(event, Faulted)
            said.append(event.code if isinstance(event, (Faulted, Closed)) else type(event))
        assert core.closed or self.faults < limits.STRIKES_MAX, "strikes end the link"
        assert core.closed or core.queued_bytes <= limits.SEND_QUEUE_BYTES_MAX
        core.data_to_send()
        return said[:3]


class _Session:
    pair = _Pair()

    def __call__(self, data: bytes) -> object:
        # What a stream begins with, a frame of its own each time: what went before is another's.
        if self.pair.cores[1].closed or self.pair.cores[1]._parser.buffered_bytes:
            self.pair = _Pair()
        return self.pair.say(data)


def session() -> Target:
    seeds = [b"".join(bytes(part) for part in encode_frame(item, b"x")) for item in SAMPLES]
    return Target("session", _Session(), (), seeds, memory_bytes=1 << 20, share=0.6)


def _bulk(data: bytes) -> object:
    header = bulklink.parse_header(data[: bulklink.HEADER_BYTES].ljust(bulklink.HEADER_BYTES))
    assert 0 < header.nbytes <= limits.FRAME_BYTES_BULK_MAX
    assert header.offset + header.nbytes <= header.chunk_bytes
    assert bulklink.parse_header(bulklink.pack_header(header)) == header
    return header.packed


def bulk() -> Target:
    header = bulklink.Header(1000, 24, 4096, 7, 3)
    seeds = [bulklink.pack_header(header), bulklink.pack_header(header._replace(packed=True))]
    return Target("bulk_header", _bulk, (PeerFault,), seeds)


MAKERS = (frames, message, entry, handshake, session, bulk)
