"""Which sample stands at which position: a permutation of every epoch, from a seed alone. Spec 13.

Nothing is stored and nothing is shuffled: a balanced Feistel network over the next power of four,
walked until it lands inside (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite
domains", 2002), finds the sample of any position of any epoch in a constant expected time.
"""

from __future__ import annotations

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from swarmtrain_protocols import limits

ROUNDS = 4
_MASK64 = (1 << 64) - 1

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]


def round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    """Four 64-bit keys: BLAKE3 of ``order`` 0x00, seed and epoch (u64 each), as little-endian."""
    data = b"order\x00" + seed.to_bytes(8, "little") + epoch.to_bytes(8, "little")
    digest = blake3(data).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS))


def _mixed(values: U64) -> U64:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014), modulo 2⁶⁴."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def shuffled(indices: I64, samples: int, seed: int, epoch: int) -> I64:
    """Samples that stand at ``indices`` of an epoch.

    Args:
        indices: int64 [n], each from 0 to ``samples`` - 1.
        samples: in an epoch.
        seed: of the run, below 2⁶⁴.

    Returns:
        int64 [n]; over all indices of an epoch every sample occurs once.
    """
    assert 0 < samples <= limits.SAMPLES_PER_EPOCH_MAX
    half = max(1, ((samples - 1).bit_length() + 1) // 2)
    keys = [np.uint64(key) for key in round_keys(seed, epoch)]
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    found = np.asarray(indices, np.int64).astype(np.uint64)
    assert not found.size or int(found.max()) < samples
    outside = np.ones(found.shape, bool)
    while outside.any():
        values = found[outside]
        left, right = values >> shift, values & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        found[outside] = left << shift | right
        outside &= found >= np.uint64(samples)
    return found.astype(np.int64)


def samples_at(positions: I64, samples: int, seed: int) -> I64:
    """As ``shuffled``, for positions in the data of the run, int64 [n], of any epochs."""
    positions = np.asarray(positions, np.int64)
    epochs, indices = np.divmod(positions, samples)
    out = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = shuffled(indices[here], samples, seed, int(epoch))
    return out
