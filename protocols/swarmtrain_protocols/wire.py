"""Frames: length prefix, MessagePack header, raw payload (protocols/spec/01-frame.md).

    u32 LE  bytes that follow
    u16 LE  bytes of the header
    header  one MessagePack message of the closed schema
    payload raw bytes, may be empty

Both lengths are checked before a byte is stored, so a hostile length costs nothing. The payload is
never copied into the header: bulk bytes stay outside of MessagePack.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from swarmtrain_protocols import messages
from swarmtrain_protocols.errors import LocalProtocolError, PeerFault
from swarmtrain_protocols.messages import Message

_PREFIX = struct.Struct("<IH")
PREFIX_BYTES = _PREFIX.size
HEADER_LENGTH_BYTES = 2
HEADER_BYTES_MAX = (1 << 16) - 1


@dataclass(frozen=True, slots=True)
class Frame:
    """One decoded frame. ``nbytes`` is its size on the wire, prefix included."""

    message: Message
    payload: bytes
    nbytes: int


def encode_frame(
    message: Message, payload: bytes | memoryview = b"", max_bytes: int | None = None
) -> list[bytes | memoryview]:
    """Buffers to write in order; the payload is passed through, not copied.

    ``max_bytes`` bounds the frame without its length field, as ``FrameParser`` does.

    Raises:
        LocalProtocolError: the frame would be refused by the other side.
    """
    header = messages.encode(message)
    nbytes = HEADER_LENGTH_BYTES + len(header) + len(payload)
    if len(header) > HEADER_BYTES_MAX or (max_bytes is not None and nbytes > max_bytes):
        raise LocalProtocolError(f"{type(message).__name__} of {nbytes} bytes is over the limit")
    head = _PREFIX.pack(nbytes, len(header)) + header
    return [head, payload] if len(payload) else [head]


class FrameParser:
    """Incremental parser: any split of the stream gives the same frames.

    ``max_bytes`` bounds the frame without its length field; it may be raised between frames.
    A frame outside of the schema is a PeerFault ``malformed`` in the list, and parsing goes on with
    the next frame; a length outside of the bound is a PeerFault ``oversize``, and nothing after it
    is parsed, for the stream can no longer be trusted.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._buffer = bytearray()
        self._at = 0
        self._dead = False
        self.taken = 0
        """Frames, whole ones, good and bad, that were returned so far."""

    @property
    def buffered_bytes(self) -> int:
        """Bytes held of a frame that is not complete (or not asked for yet)."""
        return len(self._buffer) - self._at

    def push(self, data: bytes | memoryview) -> None:
        """Add bytes without parsing; ``next_event`` takes them."""
        if not self._dead:
            self._buffer += data

    def next_event(self) -> Frame | PeerFault | None:
        """The next frame or fault, None if more bytes are needed."""
        if self._dead or self.buffered_bytes < PREFIX_BYTES:
            self._shrink()
            return None
        nbytes, header_bytes = _PREFIX.unpack_from(self._buffer, self._at)
        if nbytes > self.max_bytes or nbytes < HEADER_LENGTH_BYTES:
            return self._die("oversize", f"frame of {nbytes} bytes, limit {self.max_bytes}")
        if header_bytes + HEADER_LENGTH_BYTES > nbytes:
            return self._die("malformed", f"header of {header_bytes} in a frame of {nbytes} bytes")
        end = self._at + PREFIX_BYTES - HEADER_LENGTH_BYTES + nbytes
        if end > len(self._buffer):
            self._shrink()
            return None
        start = self._at + PREFIX_BYTES
        with memoryview(self._buffer) as view:
            header = bytes(view[start : start + header_bytes])
            payload = bytes(view[start + header_bytes : end])
        size = end - self._at
        self._at = end
        self.taken += 1
        try:
            return Frame(messages.decode(header), payload, size)
        except PeerFault as fault:
            return fault

    def feed(self, data: bytes | memoryview) -> list[Frame | PeerFault]:
        """Parse ``data`` and everything before it that was not complete."""
        self.push(data)
        events: list[Frame | PeerFault] = []
        while (event := self.next_event()) is not None:
            events.append(event)
        return events

    def _shrink(self) -> None:
        if self._at:
            del self._buffer[: self._at]
            self._at = 0

    def _die(self, code: str, why: str) -> PeerFault:
        self._dead = True
        self._buffer.clear()
        self._at = 0
        return PeerFault(code, why)
