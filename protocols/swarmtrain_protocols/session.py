"""One control link, sans I/O: Noise XX, hello both ways, frames with credit (spec 02-session.md).

``SessionCore`` takes bytes and time and gives bytes and events. It draws no entropy: the X25519
static key and a fresh ephemeral key are injected. The Ed25519 identity signs the static key inside
the handshake, so the link proves both.

The initiator speaks first at every step and the responder answers only what it has checked, so a
refused initiator learns a code and nothing else.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Literal

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId, short_id
from swarmtrain_protocols.errors import LocalProtocolError, PeerFault
from swarmtrain_protocols.identity import Keyring
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.messages.session import Credit, Goodbye, Hello, Ping, Pong, Refused
from swarmtrain_protocols.noise import (
    MESSAGE_BYTES_MAX,
    SUITES,
    TAG_BYTES,
    CipherState,
    NoiseXX,
    Suite,
)
from swarmtrain_protocols.outbox import Outbox, SendBudget
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
from swarmtrain_protocols.silence import ASLEEP_S, FrameClock, Silence
from swarmtrain_protocols.wire import Frame, FrameParser, encode_frame

PREFACE_BYTES = 8
_PREFACE_CONTROL = b"swarm/c"
STATIC_DOMAIN = b"noise-static"
BULK_LABEL = b"swarmtrain/1 bulk"
_IDENTITY_BYTES = 32 + 64
_LENGTH = struct.Struct("<H")
_PLAIN_BYTES_MAX = MESSAGE_BYTES_MAX - TAG_BYTES
_SESSION_MESSAGES = (Hello, Refused, Ping, Pong, Credit, Goodbye)
_GRANT_BYTES = limits.CREDIT_WINDOW_BYTES // 4


def control_preface(suite: Suite) -> bytes:
    """First 8 bytes of a control connection; also the Noise prologue, so nobody alters it."""
    return _PREFACE_CONTROL + bytes([SUITES.index(suite)])


_Phase = Literal["preface", "handshake", "hello", "held", "open", "closed"]


def _frame(message: Message) -> bytes:
    return b"".join(encode_frame(message))


class SessionCore:
    """One side of one control link.

    Args:
        now: monotonic seconds at which the connection was made.
        initiator: this side dialled.
        keyring: signs as this site and verifies the other.
        static_key, ephemeral_key: X25519 private keys, 32 bytes; the ephemeral one used only here.
        hello: what this side says.
        admit: policy for an authenticated peer; a ``Refused`` is sent and the link closed.
        expect: identity that must answer (initiator only); another one is refused ``wrong_peer``.
        hold: the responder waits for ``accept`` or ``refuse`` after ``admit``.
        budget: what may wait on all links of this process.
    """

    def __init__(
        self,
        *,
        now: float,
        initiator: bool,
        keyring: Keyring,
        static_key: bytes,
        ephemeral_key: bytes,
        hello: Hello,
        admit: Callable[[PeerId, Hello], Refused | None],
        expect: PeerId | None = None,
        suite: Suite = "AESGCM",
        hold: bool = False,
        budget: SendBudget | None = None,
    ) -> None:
        self.initiator = initiator
        self.peer: PeerId | None = None
        self.remote_hello: Hello | None = None
        self.bulk_secret: bytes | None = None
        self.rtt_s: float | None = None  # the shortest so far: of the path, not of our load
        self.recent_rtt_s: float | None = None
        self._keyring = keyring
        self._keys = (static_key, ephemeral_key)
        self._hello = hello
        self._admit = admit
        self._expect = expect
        self._hold = hold
        self._suite: Suite = suite
        self._noise: NoiseXX | None = None
        self._tx: CipherState | None = None
        self._rx: CipherState | None = None
        self._parser = FrameParser(limits.FRAME_BYTES_BEFORE_HANDSHAKE_MAX)
        self._in = bytearray()
        self._out = bytearray()
        self._events: list[SessionEvent] = []
        self._phase: _Phase = "preface"
        self._strikes = 0
        self._outbox = Outbox(budget)
        self._allowed = limits.CREDIT_WINDOW_BYTES
        self._consumed = 0
        self._now = self._begun_at = self._received_at = self._pinged_at = self._progress_at = now
        self._progress = self._nonce = 0
        self._pings: dict[int, float] = {}
        self._silence, self._frames = Silence(), FrameClock()
        if initiator:
            self._start_noise(control_preface(suite))
            self._out += control_preface(suite)
            self._write_handshake(b"")

    # What the shell calls ---------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """``send`` works."""
        return self._phase == "open"

    @property
    def closed(self) -> bool:
        """The link is over; what ``data_to_send`` still gives should be flushed, then hung up."""
        return self._phase == "closed"

    @property
    def queued_bytes(self) -> int:
        """Bytes of frames that wait to be sent."""
        return self._outbox.nbytes

    def receive_bytes(self, now: float, data: bytes | memoryview) -> None:
        """Take bytes from the connection in any split; bytes after the end are ignored."""
        self._now = now
        if self.closed:
            return
        self._in += data
        try:
            while self._step():
                pass
        except PeerFault as fault:
            self._fault(fault.code, fault.why)

    def send(self, message: Message, payload: bytes | memoryview = b"") -> bool:
        """Queue a message; one with a payload waits behind all without.

        Returns False, and queues nothing, if the queue is full or the link closed.

        Raises:
            LocalProtocolError: the link is not open yet, or the frame is over the limit.
        """
        if self.closed:
            return False
        if not self.is_open:
            raise LocalProtocolError("send before the link is open")
        frame = b"".join(encode_frame(message, payload, limits.FRAME_BYTES_CONTROL_MAX))
        return self._outbox.put(frame, chunk=bool(len(payload)))

    def accept(self, now: float) -> None:
        """Let a held initiator in."""
        self._now = now
        if self._phase != "held":
            raise LocalProtocolError("there is nothing to accept")
        self._outbox.put_first(_frame(self._hello))
        self._open()

    def refuse(self, now: float, code: str, reason: str) -> None:
        """Turn the other side away, telling it why; the identity must be known."""
        self._now = now
        if self._tx is None or self.closed:
            self._close(code, reason, by_peer=False)
            return
        self._outbox.put_first(_frame(Refused(code=code, reason=reason[:256])))
        self._close(code, reason, by_peer=False)

    def close(self, now: float, code: str, reason: str = "") -> None:
        """Say goodbye after the messages that are queued; chunks are dropped."""
        self._now = now
        if self.is_open:
            self._outbox.put_last(_frame(Goodbye(code=code, reason=reason[:256])))
        self._close(code, reason, by_peer=False)

    def lost(self, now: float, reason: str) -> None:
        """The connection is gone, and what waited to be sent with it."""
        self._now = now
        self._close("disconnected", reason, by_peer=False)
        self._outbox.discard()

    def probe(self, now: float) -> int:
        """Ping at once; ``Ponged`` with the returned number is the answer."""
        self._now = now
        self._nonce += 1
        self._pings[self._nonce] = now
        while len(self._pings) > limits.PINGS_OUTSTANDING_MAX:
            del self._pings[next(iter(self._pings))]
        self._pinged_at = now
        self._outbox.put_first(_frame(Ping(nonce=self._nonce)))
        return self._nonce

    def tick(self, now: float) -> None:
        """Let time pass: handshake deadline, keepalive, idle and stalled links."""
        late_s, self._now = now - self.deadline(), now
        if self.closed:
            return
        if not self.is_open:
            if now >= self._begun_at + limits.HANDSHAKE_TIMEOUT_S:
                self._close("timeout", f"no handshake in {limits.HANDSHAKE_TIMEOUT_S:g} s", False)
            return
        if late_s > ASLEEP_S:  # this side stood still, not the other
            self._received_at, self._progress_at = self._received_at + late_s, now
            self._frames.began_at += late_s
        if self._outbox.sent_frames != self._progress or not self._outbox.nbytes:
            self._progress, self._progress_at = self._outbox.sent_frames, now
        if now >= self._received_at + self._silence.bound_s:
            self._close("idle", f"nothing heard for {now - self._received_at:.0f} s", False)
        elif now >= self._frames.deadline():
            self._close("stalled", f"a frame takes over {limits.FRAME_TIMEOUT_S:g} s", False)
        elif now >= self._progress_at + limits.IDLE_TIMEOUT_S:
            self._close("stalled", f"nothing sent for {limits.IDLE_TIMEOUT_S:g} s", by_peer=False)
        elif now >= self._keepalive_at():
            self.probe(now)

    def deadline(self) -> float:
        """When ``tick`` is wanted; ``math.inf`` once closed."""
        if self.closed:
            return math.inf
        if not self.is_open:
            return self._begun_at + limits.HANDSHAKE_TIMEOUT_S
        silent_at = self._received_at + self._silence.bound_s
        return min(self._keepalive_at(), silent_at, self._frames.deadline())

    def data_to_send(self, max_bytes: int = limits.SEND_BATCH_BYTES) -> bytes:
        """Bytes for the connection, about ``max_bytes`` at most; empty: nothing may be sent now.

        Frames are sealed here and not before, so a message overtakes the chunks in the queue.
        """
        if self._tx is not None:
            frames = self._outbox.take(max_bytes, everything=self.closed)
            for at in range(0, len(frames), _PLAIN_BYTES_MAX):
                sealed = self._tx.encrypt(frames[at : at + _PLAIN_BYTES_MAX])
                self._out += _LENGTH.pack(len(sealed)) + sealed
        data = bytes(self._out)
        self._out.clear()
        return data

    def events(self) -> list[SessionEvent]:
        """Return and forget the events so far; taking them grants the other side new credit."""
        if self._consumed >= _GRANT_BYTES and self.is_open:
            self._outbox.put_first(_frame(Credit(nbytes=self._consumed)))
            self._allowed += self._consumed
            self._consumed = 0
        events, self._events = self._events, []
        return events

    # Handshake --------------------------------------------------------------------------------

    def _start_noise(self, prologue: bytes) -> None:
        static_key, ephemeral_key = self._keys
        self._keys = (b"", b"")
        self._noise = NoiseXX(
            initiator=self.initiator,
            static_key=static_key,
            ephemeral_key=ephemeral_key,
            prologue=prologue,
            suite=self._suite,
        )
        self._static_public = self._noise.static_public
        self._phase = "handshake"

    def _identity(self) -> bytes:
        return self._keyring.peer_id + self._keyring.sign(STATIC_DOMAIN, self._static_public)

    def _write_handshake(self, payload: bytes) -> None:
        assert self._noise is not None
        message = self._noise.write(payload)
        self._out += _LENGTH.pack(len(message)) + message

    def _read_handshake(self, message: bytes) -> None:
        noise = self._noise
        assert noise is not None
        payload = noise.read(message)
        if noise.remote_static is None:
            if payload:
                raise PeerFault("malformed", "payload in the first handshake message")
            self._write_handshake(self._identity())
            return
        self._identify(payload, noise.remote_static)
        if self.closed:
            return
        if self.initiator:
            self._write_handshake(self._identity())
        self._tx, self._rx = noise.split()
        self.bulk_secret = noise.export(BULK_LABEL)
        self._noise = None
        self._phase = "hello"
        if self.initiator:
            self._outbox.put_first(_frame(self._hello))

    def _identify(self, payload: bytes, remote_static: bytes) -> None:
        if len(payload) != _IDENTITY_BYTES:
            raise PeerFault("malformed", f"identity of {len(payload)} bytes")
        peer = PeerId(payload[:32])
        if not self._keyring.verify(peer, STATIC_DOMAIN, remote_static, payload[32:]):
            raise PeerFault("wrong_key", "the identity has not signed the static key")
        if peer == self._keyring.peer_id:
            self._close("duplicate", "the other side has our own identity", by_peer=False)
            return
        if self._expect is not None and peer != self._expect:
            why = f"{short_id(peer)} answered, not {short_id(self._expect)}"
            self._close("wrong_peer", why, by_peer=False)
            return
        self.peer = peer
        self._events.append(Identified(peer))

    def _on_hello(self, message: Message) -> None:
        assert self.peer is not None
        if isinstance(message, Refused):
            self._close(message.code, message.reason, by_peer=True)
            return
        if not isinstance(message, Hello):
            raise PeerFault("unexpected", f"{type(message).__name__} before hello")
        self.remote_hello = message
        if message.version != self._hello.version:
            why = f"we speak {self._hello.version}, you {message.version}"
            self.refuse(self._now, "version", why)
        elif message.run != self._hello.run:
            self.refuse(self._now, "wrong_run", f"we serve run {short_id(self._hello.run)}")
        elif (refused := self._admit(self.peer, message)) is not None:
            self.refuse(self._now, refused.code, refused.reason)
        elif self.initiator:
            self._open()
        else:
            self._phase = "held"
            if self._hold:
                self._events.append(Held(self.peer, message))
            else:
                self.accept(self._now)

    def _open(self) -> None:
        assert self.peer is not None and self.remote_hello is not None
        self._phase = "open"
        self._received_at = self._pinged_at = self._progress_at = self._now
        self._parser.max_bytes = limits.FRAME_BYTES_CONTROL_MAX
        self._events.append(Opened(self.peer, self.remote_hello))

    # Receiving --------------------------------------------------------------------------------

    def _step(self) -> bool:
        """Parse one unit of input; False if more bytes are needed or the link is over."""
        if self.closed:
            return False
        if self._phase == "preface":
            if len(self._in) < PREFACE_BYTES:
                return False
            preface = bytes(self._in[:PREFACE_BYTES])
            del self._in[:PREFACE_BYTES]
            if preface[:-1] != _PREFACE_CONTROL or preface[-1] >= len(SUITES):
                raise PeerFault("malformed", "not a control connection")
            self._suite = SUITES[preface[-1]]
            self._start_noise(preface)
            return True
        if len(self._in) < _LENGTH.size:
            return False
        (nbytes,) = _LENGTH.unpack_from(self._in)
        if self._rx is None and nbytes > limits.FRAME_BYTES_BEFORE_HANDSHAKE_MAX:
            raise PeerFault("oversize", f"handshake message of {nbytes} bytes")
        if len(self._in) < _LENGTH.size + nbytes:
            return False
        message = bytes(self._in[_LENGTH.size : _LENGTH.size + nbytes])
        del self._in[: _LENGTH.size + nbytes]
        if self._rx is None:
            self._read_handshake(message)
            return True
        if nbytes <= TAG_BYTES:
            raise PeerFault("malformed", "empty transport message")
        self._parser.push(self._rx.decrypt(message))
        self._received_at = self._now
        while (event := self._parser.next_event()) is not None:
            self._on_event(event)
            if self._phase == "closed":
                break
        self._frames.received(self._now, self._parser.taken, self._parser.buffered_bytes)
        return True

    def _on_event(self, event: Frame | PeerFault) -> None:
        if isinstance(event, PeerFault):
            if event.code == "oversize" or not self.is_open:
                raise event
            self._strikes += 1
            if self._strikes >= limits.STRIKES_MAX:
                raise event
            self._events.append(Faulted(event.code, event.why))
        elif self._phase == "hello":
            self._on_hello(event.message)
        elif not self.is_open:
            raise PeerFault("unexpected", f"{type(event.message).__name__} before our hello")
        elif isinstance(event.message, _SESSION_MESSAGES):
            self._on_session(event.message)
        else:
            self._allowed -= event.nbytes
            if self._allowed < 0:
                raise PeerFault("credit", "sent more than was granted")
            self._consumed += event.nbytes
            self._events.append(Received(event.message, event.payload))

    def _on_session(self, message: Message) -> None:
        match message:
            case Ping(nonce=nonce):
                if self._outbox.urgent_frames >= limits.PINGS_OUTSTANDING_MAX:
                    raise PeerFault("flood", "pings faster than they can be answered")
                self._outbox.put_first(_frame(Pong(nonce=nonce)))
            case Pong(nonce=nonce):
                sent_at = self._pings.pop(nonce, None)
                if sent_at is not None:  # else older than those we remember
                    self.recent_rtt_s = rtt_s = self._now - sent_at
                    self._silence.measured(rtt_s)
                    self.rtt_s = rtt_s if self.rtt_s is None else min(rtt_s, self.rtt_s)
                    self._events.append(Ponged(nonce, rtt_s))
            case Credit(nbytes=nbytes):
                if not self._outbox.granted(nbytes):
                    raise PeerFault("credit", "granted more than was used")
            case Goodbye(code=code, reason=reason) | Refused(code=code, reason=reason):
                self._close(code, reason, by_peer=True)
            case _:
                raise PeerFault("unexpected", "hello twice")

    # Ending -----------------------------------------------------------------------------------

    def _keepalive_at(self) -> float:
        return max(self._received_at, self._pinged_at) + limits.KEEPALIVE_INTERVAL_S

    def _fault(self, code: str, why: str) -> None:
        self._events.append(Faulted(code, why))
        if self.is_open:
            self._outbox.put_first(_frame(Goodbye(code=code[:64], reason=why[:256])))
        self._close(code, why, by_peer=False)

    def _close(self, code: str, reason: str, by_peer: bool) -> None:
        if self.closed:
            return
        opened = self.is_open
        self._phase = "closed"
        self._outbox.drop_chunks()
        self._in.clear()
        self._events.append(Closed(code, reason, by_peer, opened))

    def __repr__(self) -> str:
        peer = short_id(self.peer) if self.peer else "?"
        return f"SessionCore({'to' if self.initiator else 'from'} {peer}, {self._phase})"
