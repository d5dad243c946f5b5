"""Part tables and coefficients: pure functions that fix the bytes of a round."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from swarmtrain_protocols import limits
from swarmtrain_protocols.entries import Part


def plan_parts(
    values: int,
    owners: Sequence[bytes],
    leader: bytes,
    round_number: int,
    chunk_values: int = limits.CHUNK_VALUES,
) -> tuple[Part, ...]:
    """Slice ``values`` into contiguous parts of whole chunks, one or more per owner.

    A vector of a single chunk goes to the leader if it may own parts: that saves two hops.
    Otherwise shares are equal (to one chunk) and the owner of the first part rotates with the
    round. A part's deputy is the next owner in the list. With more owners than parts can be
    listed, those of this round's turn own one part each.
    """
    assert values > 0
    assert owners
    total = -(-values // chunk_values)
    order = list(owners)
    if leader in order:
        order.remove(leader)
        order.insert(0, leader)
    if total >= len(order):
        turn = round_number % len(order)
        order = order[turn:] + order[:turn]
    least = -(-total // limits.CHUNKS_PER_FETCH_MAX)
    assert least <= limits.PARTS_MAX, "the vector is too long for one channel"
    even = -(-least // len(order)) * len(order)  # the same number of parts for every owner
    shares = min(total, even, limits.PARTS_MAX)
    parts: list[Part] = []
    first = 0
    for index in range(shares):
        count = total // shares + (1 if index < total % shares else 0)
        owner = order[index % len(order)]
        deputy = order[(index + 1) % len(order)]
        parts.append(Part(first, count, owner, deputy))
        first += count
    assert first == total
    return tuple(parts)


def coefficients_of(samples: Sequence[float]) -> list[float]:
    """Weights by samples: c_i = fp32(samples_i / sum), the sum taken in fp64 in member order."""
    total = 0.0
    for item in samples:
        total += item
    assert total > 0
    return [_fp32(item / total) for item in samples]


def _fp32(value: float) -> float:
    """The nearest fp32 value, ties to even (IEEE 754)."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded
