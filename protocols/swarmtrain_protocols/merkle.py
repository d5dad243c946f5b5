"""BLAKE3 Merkle trees over the chunks of a blob (protocols/spec/09-fetch.md).

Everything bulky is named by the root of such a tree and fetched chunk by chunk, so that each chunk
is checked on its own, whoever sent it. The shape is that of RFC 6962: pairs from the left, an odd
last node moves up unchanged. Leaves and inner nodes are hashed under different first bytes, so that
neither can pass for the other (second-preimage attack on plain Merkle trees).
"""

from __future__ import annotations

from collections.abc import Sequence

from blake3 import blake3

from swarmtrain_protocols.errors import LocalProtocolError

HASH_BYTES = 32
LEAF_PREFIX = b"\x00"
NODE_PREFIX = b"\x01"


def leaf_hash(chunk: bytes | bytearray | memoryview) -> bytes:
    """``BLAKE3(0x00 || chunk)``, 32 bytes. Releases the interpreter lock for large chunks."""
    hasher = blake3(LEAF_PREFIX)
    hasher.update(chunk)
    return hasher.digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """``BLAKE3(0x01 || left || right)``, 32 bytes."""
    return blake3(NODE_PREFIX + left + right).digest()


def tree_levels(leaves: Sequence[bytes]) -> list[tuple[bytes, ...]]:
    """All levels of the tree, leaves first, the root alone in the last.

    Raises:
        LocalProtocolError: no leaves, or a leaf that is not 32 bytes.
    """
    if not leaves:
        raise LocalProtocolError("a Merkle tree needs at least one leaf")
    if any(len(leaf) != HASH_BYTES for leaf in leaves):
        raise LocalProtocolError("a leaf is a 32-byte hash")
    levels = [tuple(leaves)]
    while len(levels[-1]) > 1:
        below = levels[-1]
        pairs = [node_hash(below[i], below[i + 1]) for i in range(0, len(below) - 1, 2)]
        if len(below) % 2:
            pairs.append(below[-1])
        levels.append(tuple(pairs))
    return levels


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """Root hash, 32 bytes. Raises LocalProtocolError for no leaves."""
    return tree_levels(leaves)[-1][0]


def _proof(levels: Sequence[Sequence[bytes]], first: int, count: int) -> tuple[bytes, ...]:
    total = len(levels[0])
    if first < 0 or count < 1 or first + count > total:
        raise LocalProtocolError(f"range {first}+{count} is outside of {total} leaves")
    proof: list[bytes] = []
    low, high = first, first + count - 1
    for level in levels[:-1]:
        if low % 2:
            proof.append(level[low - 1])
        if high % 2 == 0 and high + 1 < len(level):
            proof.append(level[high + 1])
        low //= 2
        high //= 2
    return tuple(proof)


def range_proof(leaves: Sequence[bytes], first: int, count: int) -> tuple[bytes, ...]:
    """Hashes that lead from leaves ``first … first+count-1`` to the root.

    Order: level by level from the bottom, the left neighbour before the right one, and only those
    that exist.

    Raises:
        LocalProtocolError: the range is empty or outside of the leaves.
    """
    return _proof(tree_levels(leaves), first, count)


def verify_range(
    root: bytes, total: int, first: int, leaves: Sequence[bytes], proof: Sequence[bytes]
) -> bool:
    """True if ``leaves`` are leaves ``first …`` of the tree of ``total`` leaves with this root.

    Never raises on hostile input. ``total`` comes from the caller, never from the sender.
    """
    count = len(leaves)
    if first < 0 or count < 1 or first + count > total:
        return False
    if any(len(value) != HASH_BYTES for value in (*leaves, *proof)):
        return False
    nodes = list(leaves)
    low, width, used = first, total, 0
    while width > 1:
        if low % 2:
            if used == len(proof):
                return False
            nodes.insert(0, proof[used])
            used += 1
            low -= 1
        after = low + len(nodes)
        if after % 2 and after < width:
            if used == len(proof):
                return False
            nodes.append(proof[used])
            used += 1
        above = [node_hash(nodes[i], nodes[i + 1]) for i in range(0, len(nodes) - 1, 2)]
        if len(nodes) % 2:
            above.append(nodes[-1])
        nodes = above
        low //= 2
        width = (width + 1) // 2
    return used == len(proof) and nodes == [root]


class Blob:
    """Immutable chunks with their tree: what a provider serves and a root names.

    ``chunks`` are byte buffers (memoryviews over the owner's memory, format ``B``); they must not
    change while the blob is served. Hashing takes place in ``of``: call it on a worker thread.
    """

    __slots__ = ("_levels", "chunks", "leaves", "nbytes", "root")

    def __init__(self, chunks: Sequence[bytes | memoryview], leaves: Sequence[bytes]) -> None:
        if len(chunks) != len(leaves):
            raise LocalProtocolError(f"{len(chunks)} chunks but {len(leaves)} leaves")
        self._levels = tree_levels(leaves)
        self.chunks: tuple[memoryview, ...] = tuple(memoryview(c).cast("B") for c in chunks)
        self.leaves: tuple[bytes, ...] = self._levels[0]
        self.root: bytes = self._levels[-1][0]
        self.nbytes: int = sum(chunk.nbytes for chunk in self.chunks)

    @classmethod
    def of(cls, chunks: Sequence[bytes | memoryview]) -> Blob:
        """Hash every chunk and build the tree."""
        return cls(chunks, [leaf_hash(chunk) for chunk in chunks])

    def proof(self, first: int, count: int) -> tuple[bytes, ...]:
        """As ``range_proof``, in O(log n): the levels are kept."""
        return _proof(self._levels, first, count)

    def __repr__(self) -> str:
        return f"Blob({self.root.hex()[:8]}, {len(self.chunks)} chunks, {self.nbytes} bytes)"
