"""Chunks of a state that is being fetched: where they lie, and which of them are proven. Spec 10.

In memory here; a shell gives one over a file instead (``dataplane.Room``), so that what was proven
outlives the process.
"""

from __future__ import annotations

from collections.abc import Sequence

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
            if index not in self._proven and self._expected[index] == leaf:
                self.chunks[index][:] = state.chunk(index)
                self.proven(index, [leaf])

    def close(self) -> None:
        """It is complete, or of no use any more."""
