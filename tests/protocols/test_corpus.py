"""The form of a corpus: descriptor, chunks and hash, pinned by vectors."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from swarmtrain_protocols import limits
from swarmtrain_protocols.corpus import DESCRIPTOR_BYTES, MAGIC, Descriptor, parse_descriptor
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.merkle import verify_range

ROOT = Path(__file__).resolve().parents[2]
VECTORS: dict[str, Any] = json.loads((ROOT / "protocols" / "vectors" / "corpus.json").read_text())
MIB = 1 << 20


def body_of(case: dict[str, Any]) -> bytes:
    """Byte i of the body is i times 31 plus the carry of its position in MiB, modulo 256."""
    nbytes = case["train_bytes"] + case["held_out_bytes"]
    period = bytes((31 * i) % 256 for i in range(256)) * 4096
    return b"".join(
        bytes((b + k) % 256 for b in period[: min(MIB, nbytes - k * MIB)])
        for k in range(-(-nbytes // MIB))
    )


def root_of(chunks: list[bytes]) -> bytes:
    """RFC 6962 recursion with BLAKE3, independent of merkle.py."""
    if len(chunks) == 1:
        return blake3(b"\x00" + chunks[0]).digest()
    k = 1
    while k * 2 < len(chunks):
        k *= 2
    return blake3(b"\x01" + root_of(chunks[:k]) + root_of(chunks[k:])).digest()


def test_vectors() -> None:
    assert len(VECTORS["corpora"]) >= 4
    for case in VECTORS["corpora"]:
        body = body_of(case)
        chunks = [body[i : i + MIB] for i in range(0, len(body), MIB)]
        root = root_of(chunks)
        assert root.hex() == case["root"]
        made = Descriptor(case["train_bytes"], case["held_out_bytes"], root)
        raw = b"corpus\0\1" + struct.pack("<QQ", case["train_bytes"], case["held_out_bytes"]) + root
        assert made.to_bytes() == raw == bytes.fromhex(case["descriptor"])
        assert made.hash.hex() == case["hash"] == blake3(b"\0" + raw).hexdigest()
        assert parse_descriptor(raw) == made
        sizes = [made.chunk_nbytes(i) for i in range(made.chunks)]
        assert sizes == [len(chunk) for chunk in chunks]


def test_the_pinned_hash_is_the_root_of_a_blob_of_one_chunk() -> None:
    made = Descriptor(5, 3, b"r" * 32)
    assert verify_range(made.hash, 1, 0, [made.hash], [])


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "malformed"),
        (Descriptor(1, 1, b"r" * 32).to_bytes()[:-1], "malformed"),
        (Descriptor(1, 1, b"r" * 32).to_bytes() + b"\0", "malformed"),
        (b"corpus\0\2" + Descriptor(1, 1, b"r" * 32).to_bytes()[8:], "malformed"),
        (Descriptor(0, 9, b"r" * 32).to_bytes(), "malformed"),
        (Descriptor(limits.CORPUS_BYTES_MAX, 1, b"r" * 32).to_bytes(), "oversize"),
        (MAGIC + b"\xff" * (DESCRIPTOR_BYTES - 8), "oversize"),
    ],
)
def test_what_is_no_descriptor_is_refused(data: bytes, code: str) -> None:
    with pytest.raises(PeerFault) as caught:
        parse_descriptor(data)
    assert caught.value.code == code


def test_the_largest_corpus_is_taken() -> None:
    most = Descriptor(limits.CORPUS_BYTES_MAX - 1, 1, b"r" * 32)
    assert parse_descriptor(most.to_bytes()) == most
    assert most.chunks == limits.CORPUS_BYTES_MAX // MIB
