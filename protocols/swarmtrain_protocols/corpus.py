"""A corpus as a blob: what its hash covers, and how its bytes are cut (spec 12-corpus.md).

``train`` and ``held-out`` bytes, one after the other, are the body: chunks of 1 MiB under a Merkle
root. The root binds neither the number of chunks nor where the held-out part begins, so a
*descriptor* of fixed size says both and names the root, and the hash of the descriptor, as a blob
of one chunk, is what the manifest pins. Whoever knows the pinned hash can thus fetch the
descriptor, and then the body, from anybody.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.merkle import HASH_BYTES, leaf_hash

MAGIC = b"corpus\x00\x01"
_FORM = struct.Struct(f"<8sQQ{HASH_BYTES}s")
DESCRIPTOR_BYTES = _FORM.size


class Descriptor(NamedTuple):
    """Sizes of the two parts in bytes, and the Merkle root over the chunks of the body."""

    train_bytes: int
    held_out_bytes: int
    root: bytes

    @property
    def nbytes(self) -> int:
        """Of the body."""
        return self.train_bytes + self.held_out_bytes

    @property
    def chunks(self) -> int:
        return chunk_count(self.nbytes)

    @property
    def hash(self) -> bytes:
        """What the manifest pins: the Merkle root of the one-chunk blob ``to_bytes()``."""
        return leaf_hash(self.to_bytes())

    def chunk_nbytes(self, index: int) -> int:
        """Size of chunk ``index``; only the last one may be shorter."""
        chunk = limits.CORPUS_CHUNK_BYTES
        return min(chunk, self.nbytes - index * chunk)

    def to_bytes(self) -> bytes:
        """56 bytes: magic (8), u64 train bytes, u64 held-out bytes, root (32)."""
        return _FORM.pack(MAGIC, self.train_bytes, self.held_out_bytes, self.root)


def chunk_count(nbytes: int) -> int:
    """Chunks of a body of ``nbytes`` bytes."""
    return -(-nbytes // limits.CORPUS_CHUNK_BYTES)


def parse_descriptor(data: bytes | bytearray | memoryview) -> Descriptor:
    """Read what ``to_bytes`` wrote.

    Raises:
        PeerFault: ``malformed`` (length, magic, nothing to train on) or ``oversize``.
    """
    if len(data) != DESCRIPTOR_BYTES:
        raise PeerFault("malformed", f"a corpus descriptor of {len(data)} bytes")
    magic, train_bytes, held_out_bytes, root = _FORM.unpack(data)
    if magic != MAGIC or not train_bytes:
        raise PeerFault("malformed", "not a corpus descriptor")
    found = Descriptor(train_bytes, held_out_bytes, root)
    if found.nbytes > limits.CORPUS_BYTES_MAX:
        raise PeerFault("oversize", f"a corpus of {found.nbytes} bytes")
    return found
