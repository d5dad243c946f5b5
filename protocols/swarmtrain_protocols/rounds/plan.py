"""Part tables: pure functions that fix who sums what in a round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from swarmtrain_protocols import limits
from swarmtrain_protocols.entries import Part
from swarmtrain_protocols.rounds.unlike import apportion, shares_of, usable_rates


def plan_parts(
    values: int,
    owners: Sequence[bytes],
    leader: bytes,
    round_number: int,
    chunk_values: int = limits.CHUNK_VALUES,
    rates: Mapping[bytes, float] | None = None,
    receivers: int = 0,
) -> tuple[Part, ...]:
    """Slice ``values`` into contiguous parts of whole chunks, one or more per owner.

    A vector of a single chunk goes to the leader if it may own parts: that saves two hops.
    Otherwise shares are equal (to one chunk) and the owner of the first part rotates with the
    round. A part's deputy is the next owner in the list. With more owners than parts can be
    listed, those of this round's turn own one part each.

    ``rates`` (bytes per second by member, 0: not known) that differ make shares unequal: those with
    which the slowest of the owners is done first, if the result goes to ``receivers`` members.
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
    relative = usable_rates(order, rates or {})
    if relative and least + len(order) <= limits.PARTS_MAX:
        shares_by_rate = shares_of([relative[k] for k in order], max(receivers, len(order)))
        return _uneven(order, apportion(total, shares_by_rate))
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


def _uneven(order: Sequence[bytes], counts: Sequence[int]) -> tuple[Part, ...]:
    """``counts[i]`` chunks for owner i, in pieces that can be fetched at once."""
    working = [owner for owner, count in zip(order, counts, strict=True) if count]
    idle = [owner for owner, count in zip(order, counts, strict=True) if not count]
    parts: list[Part] = []
    first = 0
    for owner, count in zip(order, counts, strict=True):
        others = [k for k in (*_after(working, owner), *idle) if k != owner] or [owner]
        while count:
            piece = min(count, limits.CHUNKS_PER_FETCH_MAX)
            parts.append(Part(first, piece, owner, others[0]))
            first, count = first + piece, count - piece
    return tuple(parts)


def _after(people: Sequence[bytes], one: bytes) -> list[bytes]:
    """``people`` in order, beginning behind ``one``."""
    at = people.index(one) + 1 if one in people else 0
    return [*people[at:], *people[:at]]
