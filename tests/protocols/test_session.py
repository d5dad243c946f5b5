"""Control links in memory: handshake, hello, credit, keepalive, tampering, any split."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmtrain_protocols import limits
from swarmtrain_protocols.bulklink import PREFACE, BulkKeys, link_tag, parse_header
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.identity import Ed25519Keyring
from swarmtrain_protocols.messages.fetch import FetchChunk, FetchRequest
from swarmtrain_protocols.messages.session import Credit, Hello, Ping, Refused
from swarmtrain_protocols.noise import SUITES, Suite
from swarmtrain_protocols.session import SessionCore, control_preface
from swarmtrain_protocols.session_events import (
    Closed,
    Faulted,
    Held,
    Identified,
    Opened,
    Ponged,
    Received,
    SessionEvent,
)
from swarmtrain_protocols.wire import encode_frame

HELLO = Hello(version=1, run=b"r" * 32, name="ann", listen=("127.0.0.1:1",))
KEYS = (Ed25519Keyring(b"a" * 32), Ed25519Keyring(b"b" * 32))
ASK = FetchRequest(request=1, root=b"x" * 32, first=0, count=1)


def make(side: int, **change: Any) -> SessionCore:
    settings_: dict[str, Any] = {
        "now": 0.0,
        "initiator": side == 0,
        "keyring": KEYS[side],
        "static_key": bytes([side + 1]) * 32,
        "ephemeral_key": bytes([side + 11]) * 32,
        "hello": HELLO,
        "admit": lambda peer, hello: None,
    }
    return SessionCore(**{**settings_, **change})


class Pair:
    """Two cores and the bytes between them; ``alter`` may change what is on its way."""

    def __init__(
        self,
        a: SessionCore | None = None,
        b: SessionCore | None = None,
        alter: Callable[[int, bytes], bytes] = lambda side, data: data,
        split: Callable[[bytes], list[bytes]] = lambda data: [data],
    ) -> None:
        self.cores = (a or make(0), b or make(1))
        self.events: tuple[list[SessionEvent], list[SessionEvent]] = ([], [])
        self.alter, self.split = alter, split
        self.now = 0.0

    def run(self) -> Pair:
        """Exchange until both are silent."""
        moved = True
        while moved:
            moved = False
            for side in (0, 1):
                self.events[side].extend(self.cores[side].events())
                if data := self.cores[side].data_to_send():
                    moved = True
                    for piece in self.split(self.alter(side, data)):
                        self.cores[1 - side].receive_bytes(self.now, piece)
        return self

    def of(self, side: int, kind: type[SessionEvent]) -> list[Any]:
        return [event for event in self.events[side] if isinstance(event, kind)]

    def codes(self, side: int) -> list[tuple[str, bool]]:
        return [(event.code, event.by_peer) for event in self.of(side, Closed)]


@pytest.mark.parametrize("suite", SUITES)
def test_both_sides_open_and_share_the_bulk_secret(suite: Suite) -> None:
    pair = Pair(make(0, suite=suite)).run()
    a, b = pair.cores
    assert a.is_open and b.is_open
    assert a.peer == KEYS[1].peer_id and b.peer == KEYS[0].peer_id
    assert pair.events[0] == [Identified(KEYS[1].peer_id), Opened(KEYS[1].peer_id, HELLO)]
    assert pair.events[1] == [Identified(KEYS[0].peer_id), Opened(KEYS[0].peer_id, HELLO)]
    assert a.bulk_secret == b.bulk_secret is not None
    other = Pair(make(0, suite=suite, ephemeral_key=b"9" * 32)).run()
    assert other.cores[0].bulk_secret != a.bulk_secret


def test_vectors() -> None:
    path = Path(__file__).parents[2] / "protocols" / "vectors" / "session.json"
    for vector in json.loads(path.read_text())["vectors"]:
        cores = [
            make(
                side,
                keyring=Ed25519Keyring(bytes.fromhex(vector["identity_seeds"][side])),
                static_key=bytes.fromhex(vector["static_keys"][side]),
                ephemeral_key=bytes.fromhex(vector["ephemeral_keys"][side]),
                suite=vector["suite"],
            )
            for side in (0, 1)
        ]
        for i, flight in enumerate(vector["flights"]):
            if i == 4:
                cores[0].send(ASK)
            assert cores[i % 2].data_to_send().hex() == flight
            cores[1 - i % 2].receive_bytes(0.0, bytes.fromhex(flight))
        assert cores[1].events()[-1] == Received(ASK, b"")
        secret = cores[0].bulk_secret
        assert secret is not None and secret.hex() == vector["bulk_secret"]
        i_nonce, r_nonce = (bytes.fromhex(nonce) for nonce in vector["bulk_nonces"])
        assert vector["bulk_opening"] == (PREFACE + link_tag(secret) + i_nonce).hex()
        initiator = BulkKeys(secret, i_nonce, r_nonce, True)
        initiator.check(bytes.fromhex(vector["bulk_answer"])[16:])
        assert initiator.prove().hex() == vector["bulk_proof"]
        frame, plain = bytes.fromhex(vector["bulk_frame"]), bytearray(5)
        initiator.receiver.open(memoryview(frame)[32:], frame[:32], memoryview(plain))
        assert parse_header(frame[:32]) == (5, 0, 5, 1, 0, False) and plain == b"chunk"


def test_two_round_trips_open_a_link() -> None:
    a, b = make(0), make(1)
    flights = 0
    while not (a.is_open and b.is_open):
        for from_, to in ((a, b), (b, a)):
            if data := from_.data_to_send():
                flights += 1
                to.receive_bytes(0.0, data)
    assert flights == 4


def test_messages_arrive_in_order_with_payload() -> None:
    pair = Pair().run()
    a, _ = pair.cores
    assert a.send(ASK) and a.send(FetchChunk(request=1, index=2), b"z" * 9)
    pair.run()
    assert pair.of(1, Received) == [
        Received(ASK, b""),
        Received(FetchChunk(request=1, index=2), b"z" * 9),
    ]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 97))
def test_any_split_of_the_bytes_gives_the_same_events(step: int) -> None:
    def conversation(pair: Pair) -> tuple[list[SessionEvent], list[SessionEvent]]:
        pair.run()
        for i in range(3):
            pair.cores[0].send(msgspec.structs.replace(ASK, request=i))
            pair.cores[1].send(FetchChunk(request=i, index=i), b"c" * 70 * i)
            pair.run()
        pair.cores[0].close(0.0, "left")
        return pair.run().events

    cut = Pair(split=lambda d: [d[i : i + step] for i in range(0, len(d), step)])
    assert conversation(cut) == conversation(Pair())


def test_a_message_overtakes_chunks_that_wait() -> None:
    pair = Pair().run()
    a, b = pair.cores
    for i in range(50):
        assert a.send(FetchChunk(request=1, index=i), b"c" * 16000)
    a.data_to_send(1)  # one chunk is sealed
    a.send(ASK)
    pair.alter = lambda side, data: data
    a2 = a.data_to_send(1)
    assert len(a2) < 200 and a.queued_bytes > 40 * 16000
    del b


@pytest.mark.parametrize(
    ("change", "admit", "code"),
    [
        ({"version": 2}, None, "version"),
        ({"run": b"q" * 32}, None, "wrong_run"),
        ({}, "expired", "expired"),
        ({}, "not_authorised", "not_authorised"),
        ({}, "banned", "banned"),
    ],
)
@pytest.mark.parametrize("refuser", [0, 1])
def test_refusals_are_typed_on_both_sides(
    change: dict[str, Any], admit: str | None, code: str, refuser: int
) -> None:
    def policy(peer: PeerId, hello: Hello) -> Refused | None:
        assert peer == KEYS[1 - refuser].peer_id
        return Refused(code=admit, reason="because") if admit else None

    theirs = make(1 - refuser, hello=msgspec.structs.replace(HELLO, **change))
    ours = make(refuser, admit=policy)
    pair = Pair(ours, theirs) if refuser == 0 else Pair(theirs, ours)
    if change and refuser == 0:  # the responder sees the difference first
        refuser = 1
    pair.run()
    assert pair.codes(refuser) == [(code, False)]
    assert pair.codes(1 - refuser) == [(code, True)]
    if refuser == 1:
        assert not pair.of(0, Opened) and not pair.of(1, Opened)
        assert pair.cores[0].remote_hello is None  # a refused initiator learns nothing of us


def test_hold_waits_for_the_shell() -> None:
    pair = Pair(None, make(1, hold=True)).run()
    assert pair.of(1, Held) == [Held(KEYS[0].peer_id, HELLO)]
    assert not pair.of(1, Opened)
    pair.cores[1].accept(0.0)
    pair.run()
    assert pair.of(1, Opened) and pair.of(0, Opened)
    pair = Pair(None, make(1, hold=True)).run()
    pair.cores[1].refuse(0.0, "duplicate", "a live one is here")
    pair.run()
    assert pair.codes(0) == [("duplicate", True)]
    with pytest.raises(LocalProtocolError):
        pair.cores[1].accept(0.0)


def test_wrong_identity_answers() -> None:
    pair = Pair(make(0, expect=PeerId(b"e" * 32))).run()
    assert pair.codes(0) == [("wrong_peer", False)]
    assert pair.cores[0].peer is None and not pair.of(1, Opened)


def test_our_own_identity_answers() -> None:
    pair = Pair(None, make(1, keyring=KEYS[0])).run()
    assert pair.codes(0) == [("duplicate", False)]


def test_an_identity_that_did_not_sign_the_static_key() -> None:
    class Liar(Ed25519Keyring):
        def sign(self, domain: bytes, payload: bytes) -> bytes:
            return super().sign(domain, payload[:-1] + b"\0")

    pair = Pair(None, make(1, keyring=Liar(b"b" * 32))).run()
    assert [f.code for f in pair.of(0, Faulted)] == ["wrong_key"]
    assert not pair.of(0, Identified)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_flipped_bit_never_opens_nor_delivers(data: st.DataObject) -> None:
    """Flip one bit anywhere of one flight: its receiver ends the link and delivers nothing."""
    flight = data.draw(st.integers(0, 4))
    side = flight % 2
    count = [0]

    def alter(from_: int, raw: bytes) -> bytes:
        count[0] += 1
        if count[0] - 1 != flight:
            return raw
        bit = data.draw(st.integers(0, len(raw) * 8 - 1))
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed)

    pair = Pair(alter=alter).run()
    for core in pair.cores:
        if core.is_open:
            core.send(ASK)
    pair.run()
    assert count[0] > flight
    # A longer length only makes the receiver wait; its deadline ends that.
    for now in range(1, 120):
        for core in pair.cores:
            core.tick(now)
    pair.run()
    assert not pair.of(1 - side, Received)
    assert all(core.closed for core in pair.cores)


def test_replayed_and_dropped_messages_end_the_link() -> None:
    for what in ("replay", "drop"):
        pair = Pair().run()
        a, b = pair.cores
        a.send(ASK)
        first = a.data_to_send()
        a.send(ASK)
        second = a.data_to_send()
        for raw in (first, first) if what == "replay" else (second,):
            b.receive_bytes(0.0, raw)
        assert [e.code for e in b.events() if isinstance(e, Faulted)] == ["tampered"]
        assert b.closed


def test_replay_of_a_whole_connection_does_not_open() -> None:
    record: list[bytes] = []

    def alter(side: int, data: bytes) -> bytes:
        if side == 0:
            record.append(data)
        return data

    Pair(alter=alter).run()
    fresh = make(1, ephemeral_key=b"7" * 32)
    for raw in record:
        fresh.receive_bytes(0.0, raw)
    assert not any(isinstance(e, Opened | Identified) for e in fresh.events()) and fresh.closed


def test_preface_tells_control_from_others() -> None:
    b = make(1)
    b.receive_bytes(0.0, b"GET / HTTP/1.1\r\n")
    assert b.closed and b.data_to_send() == b""
    a = make(0)
    assert a.data_to_send().startswith(control_preface("AESGCM"))


def test_oversize_before_the_handshake_is_refused_without_waiting() -> None:
    b = make(1)
    b.receive_bytes(0.0, control_preface("AESGCM") + b"\xff\xff")
    assert [e.code for e in b.events() if isinstance(e, Faulted)] == ["oversize"]


def test_timeouts() -> None:
    lonely = make(0)
    assert lonely.deadline() == limits.HANDSHAKE_TIMEOUT_S
    lonely.tick(limits.HANDSHAKE_TIMEOUT_S - 0.01)
    assert not lonely.closed
    lonely.tick(limits.HANDSHAKE_TIMEOUT_S)
    assert [e.code for e in lonely.events() if isinstance(e, Closed)] == ["timeout"]
    assert lonely.deadline() == math.inf

    held = Pair(None, make(1, hold=True)).run().cores[1]
    held.tick(limits.HANDSHAKE_TIMEOUT_S)
    assert held.closed


def test_keepalive_keeps_a_quiet_link_and_measures_the_round_trip() -> None:
    pair = Pair().run()
    while pair.now < 3 * limits.IDLE_TIMEOUT_S:
        pair.now = min(core.deadline() for core in pair.cores)
        for core in pair.cores:
            core.tick(pair.now)
        pair.run()
    assert all(core.is_open for core in pair.cores)
    a, b = pair.cores
    nonce = a.probe(pair.now)
    raw = a.data_to_send()
    b.receive_bytes(pair.now, raw)
    pair.now += 0.25
    pair.run()
    assert Ponged(nonce, 0.25) in pair.events[0] and a.rtt_s == 0.0  # the shortest


def test_a_silent_link_ends() -> None:
    a = Pair().run().cores[0]
    now = 0.0
    while not a.closed:
        now = a.deadline()
        a.tick(now)
        a.data_to_send()
    assert now == limits.IDLE_TIMEOUT_S
    assert [(e.code, e.opened) for e in a.events() if isinstance(e, Closed)] == [("idle", True)]


def test_the_bound_on_silence_follows_the_measured_round_trips() -> None:
    pair = Pair().run()
    for _ in range(5):
        pair.cores[0].probe(pair.now)
        pair.run()
    a, now = pair.cores[0], pair.now
    while not a.closed:
        now = a.deadline()
        a.tick(now)
        a.data_to_send()
    assert now == pair.now + limits.SILENCE_S_MIN


def test_who_stood_still_gives_the_other_side_its_time() -> None:
    """A laptop wakes up: its links are not over because of what it slept through."""
    pair = Pair().run()
    pair.now = 3600.0
    for core in pair.cores:
        core.tick(pair.now)
    assert all(core.is_open for core in pair.cores)
    pair.run()  # they ask, and are answered
    assert all(core.deadline() > 3600.0 for core in pair.cores)
    a = pair.cores[0]
    while not a.closed:
        now = a.deadline()
        a.tick(now)
        a.data_to_send()
    assert now <= 3600.0 + limits.IDLE_TIMEOUT_S


def test_credit_bounds_what_is_on_its_way_and_comes_back() -> None:
    pair = Pair().run()
    a, b = pair.cores
    chunk, sent = b"c" * 16000, 0
    while a.send(FetchChunk(request=0, index=sent), chunk):
        sent += 1
    assert a.queued_bytes <= limits.SEND_QUEUE_BYTES_MAX
    assert sent > 900
    flying = 0
    while data := a.data_to_send():
        flying += len(data)
        b.receive_bytes(0.0, data)  # b's shell takes no events: no credit
    assert flying <= limits.CREDIT_WINDOW_BYTES
    assert flying > limits.CREDIT_WINDOW_BYTES // 2
    assert a.send(ASK)
    data = a.data_to_send()
    assert 0 < len(data) < 200  # messages have credit of their own
    b.receive_bytes(0.0, data)
    pair.run()
    assert len(pair.of(1, Received)) == sent + 1 and a.queued_bytes == 0


def test_a_link_that_cannot_send_ends() -> None:
    pair = Pair().run()
    a, b = pair.cores
    while a.send(FetchChunk(request=0, index=0), b"c" * 16000):
        pass
    now = 0.0
    while data := a.data_to_send():
        b.receive_bytes(0.0, data)
    while not a.closed and now < 100:
        now += 1.0
        a.tick(now)
        b.tick(now)  # keeps pinging, but its shell takes no events
        a.receive_bytes(now, b.data_to_send())
    assert [e.code for e in a.events() if isinstance(e, Closed)] == ["stalled"]


def _raw_send(core: SessionCore, frame: bytes) -> bytes:
    """Send a frame past all checks, as a hostile peer would."""
    core._outbox.put_first(frame)
    return core.data_to_send(10**9)


def test_whoever_ignores_credit_is_cut_off() -> None:
    pair = Pair().run()
    a, b = pair.cores
    frame = b"".join(encode_frame(FetchChunk(request=0, index=0), b"c" * 60000))
    for _ in range(limits.CREDIT_WINDOW_BYTES // len(frame)):
        b.receive_bytes(0.0, _raw_send(a, frame))
    assert not b.closed
    b.receive_bytes(0.0, _raw_send(a, frame))
    assert [e.code for e in b.events() if isinstance(e, Faulted)] == ["credit"]


@pytest.mark.parametrize("message", [Credit(nbytes=1), HELLO])
def test_session_messages_out_of_place(message: msgspec.Struct) -> None:
    pair = Pair().run()
    pair.cores[1].receive_bytes(0.0, _raw_send(pair.cores[0], b"".join(encode_frame(message))))
    pair.run()
    assert len(pair.of(1, Faulted)) == 1 and pair.cores[1].closed
    assert pair.codes(0) == [(pair.of(1, Faulted)[0].code, True)]  # told why


def test_malformed_messages_are_strikes() -> None:
    pair = Pair().run()
    a, b = pair.cores
    bad = b"\x04\0\0\0\x02\0\xff\xff"
    for strike in range(1, limits.STRIKES_MAX + 1):
        assert not b.closed
        b.receive_bytes(0.0, _raw_send(a, bad))
        pair.run()
        assert [f.code for f in pair.of(1, Faulted)] == ["malformed"] * strike
    assert b.closed


def test_ping_flood_is_bounded() -> None:
    pair = Pair().run()
    a, b = pair.cores
    b.receive_bytes(0.0, _raw_send(a, b"".join(encode_frame(Ping(nonce=1))) * 1000))
    assert b.closed and b.queued_bytes < 4096


def test_goodbye_comes_after_messages_and_drops_chunks() -> None:
    pair = Pair().run()
    a, _ = pair.cores
    a.send(FetchChunk(request=1, index=1), b"c" * 100)
    a.send(ASK)
    a.close(0.0, "left", "bye")
    assert not a.send(ASK)
    pair.run()
    assert pair.events[1][-2:] == [Received(ASK, b""), Closed("left", "bye", True, True)]
    assert pair.codes(0) == [("left", False)]


def test_misuse() -> None:
    core = make(0)
    with pytest.raises(LocalProtocolError):
        core.send(ASK)
    a = Pair().run().cores[0]
    with pytest.raises(LocalProtocolError):
        a.send(FetchChunk(request=1, index=1), b"c" * limits.FRAME_BYTES_CONTROL_MAX)
