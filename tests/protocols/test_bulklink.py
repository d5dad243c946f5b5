"""Keys and frame headers of bulk connections."""

from __future__ import annotations

import struct

import pytest
from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain_protocols import limits
from swarmtrain_protocols.bulklink import (
    HEADER_BYTES,
    PREFACE,
    BulkKeys,
    Header,
    link_tag,
    pack_header,
    parse_header,
)
from swarmtrain_protocols.errors import PeerFault


def _hmac(key: bytes, data: bytes) -> bytes:
    mac = hmac.HMAC(key, hashes.SHA256())
    mac.update(data)
    return mac.finalize()


def _pair(nonces: tuple[bytes, bytes] = (b"i" * 16, b"r" * 16)) -> tuple[BulkKeys, BulkKeys]:
    return BulkKeys(b"s" * 32, *nonces, True), BulkKeys(b"s" * 32, *nonces, False)


def test_keys_are_pinned() -> None:
    """Against HMAC and AES-GCM used directly, as the spec page says it."""
    temp = _hmac(b"s" * 32, b"keys" + b"i" * 16 + b"r" * 16)
    first = _hmac(temp, b"\x01")
    assert link_tag(b"s" * 32) == _hmac(_hmac(b"s" * 32, b"tag"), b"\x01")
    a, _ = _pair()
    assert a.prove() == AESGCM(first).encrypt(bytes(12), b"", PREFACE)
    out = bytearray(5 + 16)
    a.sender.seal(b"chunk", b"head", memoryview(out))
    assert out == AESGCM(first).encrypt(bytes(11) + b"\x01", b"chunk", b"head")


def test_both_directions() -> None:
    a, b = _pair()
    b.check(a.prove())
    a.check(b.prove())
    for from_, to in ((a, b), (b, a)):
        sealed, plain = bytearray(3 + 16), bytearray(3)
        from_.sender.seal(b"abc", b"h", memoryview(sealed))
        to.receiver.open(memoryview(sealed), b"h", memoryview(plain))
        assert plain == b"abc"


def test_replay_reflection_and_other_links_are_refused() -> None:
    a, b = _pair()
    proof = a.prove()
    with pytest.raises(PeerFault, match="tampered"):
        a.check(proof)  # reflected
    b.check(proof)
    with pytest.raises(PeerFault, match="tampered"):
        b.check(proof)  # replayed on the same connection
    _, fresh = _pair((b"i" * 16, b"q" * 16))
    with pytest.raises(PeerFault, match="tampered"):
        fresh.check(proof)  # replayed on a new connection: the responder's nonce differs


def test_a_changed_header_does_not_authenticate() -> None:
    a, b = _pair()
    sealed = bytearray(3 + 16)
    a.sender.seal(b"abc", pack_header(Header(3, 0, 3, 1, 0)), memoryview(sealed))
    with pytest.raises(PeerFault, match="tampered"):
        b.receiver.open(
            memoryview(sealed), pack_header(Header(3, 0, 3, 2, 0)), memoryview(bytearray(3))
        )


def test_header_layout_and_round_trip() -> None:
    header = Header(7, 1, 8, 1 << 40, 3)
    assert pack_header(header) == struct.pack("<IIIIQQ", 7, 1, 8, 0, 1 << 40, 3)
    assert parse_header(pack_header(header)) == header
    packed = Header(7, 1, 8, 1 << 40, 3, True)
    assert pack_header(packed) == struct.pack("<IIIIQQ", 7, 1, 8, 1, 1 << 40, 3)
    assert parse_header(pack_header(packed)) == packed


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_hostile_headers_are_bounded_or_refused(data: bytes) -> None:
    try:
        header = parse_header(data)
    except PeerFault as fault:
        assert fault.code in ("oversize", "malformed")
    else:
        assert 0 < header.nbytes <= limits.FRAME_BYTES_BULK_MAX
        assert header.offset + header.nbytes <= header.chunk_bytes


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ((limits.FRAME_BYTES_BULK_MAX + 1, 0, 1 << 31, 0, 0, 0), "oversize"),
        ((0, 0, 1, 0, 0, 0), "malformed"),
        ((2, 7, 8, 0, 0, 0), "malformed"),
        ((2, 0, 8, 2, 0, 0), "malformed"),
    ],
)
def test_refused_headers(header: tuple[int, ...], code: str) -> None:
    with pytest.raises(PeerFault, match=code):
        parse_header(struct.pack("<IIIIQQ", *header))
