"""Chunks of a state that is being fetched: where they lie, and which of them are proven. Spec 10.

In memory here; a shell gives one over a file instead (``dataplane.Room``), so that what was proven
outlives the process.
"""

from __future__ import annotations

from collections.abc import Sequence

from swarmtrain_protocols.merkle import leaf_hash
from swarmtrain_protocols.state import CanonicalState, chunk_buffers


class Incoming:
    """One state on its way.

    Args:
        root: the pinned hash, 32 bytes.
        chunks: writable memory of exact size, one buffer per chunk, header first.
    """

    def __init__(self, root: bytes, chunks: list[memoryview]) -> None:
        self.root = root
        self.chunks = chunks
        self._proven: dict[int, bytes] = {}
        self._expected: dict[int, bytes] = {}

    @classmethod
    def in_memory(cls, root: bytes, sizes: Sequence[int]) -> Incoming:
        """With fresh memory for chunks of these sizes, bytes."""
        return cls(root, chunk_buffers(sizes))

    def there(self) -> list[int]:
        """Chunks that need not be fetched, in order."""
        return sorted(self._proven)

    def proven(self, first: int, leaves: Sequence[bytes]) -> None:
        """Chunks ``first …`` are in place, and these leaf hashes of theirs lead to the root."""
        for index, leaf in enumerate(leaves, first):
            self._proven[index] = leaf

    def expect(self, first: int, leaves: Sequence[bytes]) -> None:
        """Leaf hashes that lead to the root; their chunks may be anywhere."""
        for index, leaf in enumerate(leaves, first):
            self._expected[index] = leaf

    def missing(self, first: int, count: int) -> tuple[int, int]:
        """(first, count) of what is not here of a range whose leaf hashes are known; hashes it.

        A fetch that has failed may have brought most of it.
        """
        lacking = []
        for index in range(first, first + count):
            leaf = self._expected.get(index)
            if index not in self._proven and leaf == leaf_hash(self.chunks[index]):
                self.proven(index, [leaf])
            if index not in self._proven:
                lacking.append(index)
        return (lacking[0], lacking[-1] + 1 - lacking[0]) if lacking else (first, 0)

    def was_asked_for(self, first: int) -> bool:
        """The leaf hash of that chunk is known: somebody has begun to send it, or its hash."""
        return first in self._expected

    def prepare(self, state: CanonicalState | None) -> tuple[tuple[int, ...], bool]:
        """(chunks that are here already, whether the leaf hashes of all are wanted).

        With them known, chunks that ``state``, which holds still, has in common are copied.
        """
        if state is None or state.layout.chunks + 1 != len(self.chunks):
            return tuple(self.there()), False
        if len(self._expected) == len(self.chunks):
            self._take_equal(state)
            return tuple(self.there()), False
        have = tuple(self.there())
        return have, len(have) < len(self.chunks)

    def _take_equal(self, state: CanonicalState) -> None:
        for index, leaf in enumerate(state.leaves):
            if index in self._proven or self._expected[index] != leaf:
                continue
            chunk = state.chunk(index)
            if leaf_hash(chunk) == leaf:  # a bit may have flipped since it was hashed
                self.chunks[index][:] = chunk
                self.proven(index, [leaf])

    def close(self) -> None:
        """It is complete, or of no use any more."""
