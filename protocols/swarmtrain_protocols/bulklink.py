"""The bulk connection's bytes: who it belongs to, its keys, its frame header (spec 09-fetch.md).

    initiator -> preface (8) tag (32) nonce (16)
    responder <- nonce (16) seal (16)
    initiator -> seal (16)

A bulk connection belongs to the control link whose bulk secret it proves to know; both sides add a
fresh nonce, so a recorded connection cannot be replayed. Then frames, in both directions:

    u32 LE bytes   u32 LE offset   u32 LE chunk bytes   u32 LE form   u64 LE request   u64 LE chunk
    bytes + 16 of AES-256-GCM; the header is the associated data, the nonce counts frames
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.noise import TAG_BYTES, hkdf

PREFACE = b"swarm/b\x00"
LINK_TAG_BYTES = 32
NONCE_BYTES = 16
OPENING_BYTES = len(PREFACE) + LINK_TAG_BYTES + NONCE_BYTES
ANSWER_BYTES = NONCE_BYTES + TAG_BYTES
_HEADER = struct.Struct("<IIIIQQ")
HEADER_BYTES = _HEADER.size
_CAN_WRITE_INTO = hasattr(AESGCM, "encrypt_into") and hasattr(AESGCM, "decrypt_into")


class Header(NamedTuple):
    """``nbytes`` of chunk number ``chunk`` from ``offset``; the whole chunk has ``chunk_bytes``.

    If it is ``packed`` (form 1, ``packing.py``), all three count packed bytes.
    """

    nbytes: int
    offset: int
    chunk_bytes: int
    request: int
    chunk: int
    packed: bool = False


def pack_header(header: Header) -> bytes:
    """32 bytes."""
    return _HEADER.pack(
        header.nbytes,
        header.offset,
        header.chunk_bytes,
        header.packed,
        header.request,
        header.chunk,
    )


def parse_header(data: bytes | bytearray | memoryview) -> Header:
    """Check and decode 32 bytes that are not authenticated yet.

    Raises:
        PeerFault: ``oversize`` or ``malformed``.
    """
    nbytes, offset, chunk_bytes, form, request, chunk = _HEADER.unpack(data)
    if nbytes > limits.FRAME_BYTES_BULK_MAX:
        raise PeerFault("oversize", f"bulk frame of {nbytes} bytes")
    if nbytes == 0 or form > 1 or offset + nbytes > chunk_bytes:
        raise PeerFault("malformed", "bulk frame outside of its chunk")
    return Header(nbytes, offset, chunk_bytes, request, chunk, form == 1)


def link_tag(bulk_secret: bytes) -> bytes:
    """Public name of a control link, 32 bytes; tells nothing about the secret."""
    return hkdf(bulk_secret, b"tag", 2)[0]


class BulkSeal:
    """One direction: AES-256-GCM with a frame counter. Not shared between threads at a time."""

    def __init__(self, key: bytes) -> None:
        self._aead = AESGCM(key)
        self._count = 0

    def _nonce(self) -> bytes:
        return b"\0\0\0\0" + self._count.to_bytes(8, "big")

    def seal(self, plain: bytes | memoryview, associated: bytes, out: memoryview) -> None:
        """Write ciphertext and tag into ``out``, which is 16 bytes longer than ``plain``."""
        if _CAN_WRITE_INTO:
            self._aead.encrypt_into(self._nonce(), plain, associated, out)
        else:
            out[:] = self._aead.encrypt(self._nonce(), plain, associated)
        self._count += 1

    def open(self, sealed: memoryview, associated: bytes, out: memoryview) -> None:
        """Write the plaintext into ``out``, which is 16 bytes shorter than ``sealed``.

        On failure ``out`` may hold anything.

        Raises:
            PeerFault: ``tampered``.
        """
        try:
            if _CAN_WRITE_INTO:
                self._aead.decrypt_into(self._nonce(), sealed, associated, out)
            else:
                out[:] = self._aead.decrypt(self._nonce(), sealed, associated)
        except InvalidTag:
            raise PeerFault("tampered", "a bulk frame does not authenticate") from None
        self._count += 1


class BulkKeys:
    """The two seals of one bulk connection, each with its first (empty) frame for the opening."""

    def __init__(
        self, bulk_secret: bytes, initiator_nonce: bytes, responder_nonce: bytes, initiator: bool
    ) -> None:
        both = initiator_nonce + responder_nonce
        first, second = hkdf(bulk_secret, b"keys" + both, 2)
        self.sender = BulkSeal(first if initiator else second)
        self.receiver = BulkSeal(second if initiator else first)

    def prove(self) -> bytes:
        """16 bytes that only somebody with the keys can make; send it first."""
        proof = bytearray(TAG_BYTES)
        self.sender.seal(b"", PREFACE, memoryview(proof))
        return bytes(proof)

    def check(self, proof: bytes) -> None:
        """Raises PeerFault ``tampered`` if the other side does not have the keys."""
        self.receiver.open(memoryview(proof), PREFACE, memoryview(bytearray()))
