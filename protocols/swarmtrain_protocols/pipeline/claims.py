"""Have-sets, the set of a step, and who owns what of it: pure functions (spec 11 §2.4).

A set of micro-batches is an ``int`` whose bit k stands for micro-batch k; on the wire it is the
little-endian bytes of that number without trailing zeros. Claims are kept by (hop, skipped hop),
because a gradient belongs to the path that its micro-batch took: two paths are never mixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from blake3 import blake3

from swarmtrain_protocols import limits, messages
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.messages.pipeline import HopClaims, HopOwners, StepKey, StepPlan
from swarmtrain_protocols.pipeline.hops import stage_of

Claims = dict[tuple[int, int], int]
"""Set of micro-batches by (hop, skipped hop or 0)."""


def mask_of(numbers: Iterable[int]) -> int:
    """The set with these members."""
    mask = 0
    for number in numbers:
        mask |= 1 << number
    return mask


def numbers_of(mask: int) -> list[int]:
    """The members of a set, ascending."""
    found = []
    while mask:
        lowest = mask & -mask
        found.append(lowest.bit_length() - 1)
        mask ^= lowest
    return found


def to_bytes(mask: int) -> bytes:
    """Bitmap of a set: bit k % 8 of byte k // 8."""
    return mask.to_bytes((mask.bit_length() + 7) // 8, "little")


def from_bytes(data: bytes) -> int:
    """The set of a bitmap."""
    return int.from_bytes(data, "little")


def encode_claims(claims: Claims) -> tuple[HopClaims, ...]:
    """For the wire, by hop and path. What does not fit into one message is not claimed."""
    listed: list[HopClaims] = []
    room = limits.CLAIMS_BYTES_MAX
    for (hop, skipped), mask in sorted(claims.items()):
        data = to_bytes(mask)
        room -= len(data) + 8
        if room < 0 or len(listed) == limits.CLAIMS_MAX:
            break
        if mask:
            listed.append(HopClaims(hop, data, skipped))
    return tuple(listed)


def decode_claims(
    claims: Iterable[HopClaims],
    stages: Iterable[int],
    blocks: int,
    micro_batches: int,
    skip: int = 0,
    skips: int = 0,
) -> Claims | None:
    """Claims of a worker for the ``stages`` it is believed about; those of others are dropped.

    None: it speaks of hops or micro-batches that do not exist, twice of the same, or of paths that
    are not legal. The first ``skips`` micro-batches leave out ``skip``, the others nothing.
    """
    believed = list(stages)
    found: Claims = {}
    for item in claims:
        mask = from_bytes(item.micro_batches)
        slot = (item.hop, item.skipped)
        if item.hop > blocks + 1 or item.skipped > blocks or mask >> micro_batches:
            return None
        if slot in found or item.hop == item.skipped != 0:
            return None
        first = (1 << skips) - 1 if skip else 0
        legal = {0: ~first, skip: first} if skip else {0: -1}
        if mask & ~legal.get(item.skipped, 0):
            return None
        found[slot] = mask
    return {slot: m for slot, m in found.items() if stage_of(slot[0], blocks) in believed}


@dataclass(slots=True)
class Settlement:
    """What a set of answers makes of a step.

    ``owners`` by (hop, micro-batch), for the set alone. ``missing``: for every other micro-batch
    the hops that nobody claims; all of them if nobody claims anything.
    """

    micro_batches: list[int] = field(default_factory=list)
    skipped: dict[int, int] = field(default_factory=dict)
    owners: dict[tuple[int, int], PeerId] = field(default_factory=dict)
    missing: dict[int, list[int]] = field(default_factory=dict)


def settle(answers: Mapping[PeerId, Claims], blocks: int, micro_batches: int) -> Settlement:
    """The set of a step: micro-batches that somebody claims at every hop of one path.

    The owner of a hop is the claimant with the least id. Of several complete paths of a
    micro-batch the one with the least skipped hop counts (0, nothing skipped, first).
    """
    union: Claims = {}
    for peer in sorted(answers):
        for slot, mask in answers[peer].items():
            union[slot] = union.get(slot, 0) | mask
    paths = sorted({0} | {skipped for _, skipped in union})
    hops = {path: [h for h in range(blocks + 2) if h != path or not path] for path in paths}
    result = Settlement()
    for k in range(micro_batches):
        lacking = {p: [h for h in hops[p] if not union.get((h, p), 0) >> k & 1] for p in paths}
        path = min(paths, key=lambda p: (len(lacking[p]), p))
        if lacking[path]:
            result.missing[k] = lacking[path]
            continue
        result.micro_batches.append(k)
        result.skipped[k] = path
        for hop in hops[path]:
            result.owners[hop, k] = next(
                peer for peer in sorted(answers) if answers[peer].get((hop, path), 0) >> k & 1
            )
    return result


def plan_of(key: StepKey, query: int, settled: Settlement, blocks: int) -> StepPlan:
    """The plan that tells every owner what it owns. No owner: an index past the members."""
    members = tuple(sorted(set(settled.owners.values())))
    place = {peer: index for index, peer in enumerate(members)}
    listed = []
    for hop in range(blocks + 2):
        owners = [settled.owners.get((hop, k)) for k in settled.micro_batches]
        indices = (len(members) if peer is None else place[peer] for peer in owners)
        listed.append(HopOwners(hop, tuple(indices)))
    return StepPlan(key, query, members, tuple(settled.micro_batches), tuple(listed))


def plan_digest(plan: StepPlan) -> bytes:
    """BLAKE3 of the plan's MessagePack bytes; what STEP_CLOSED names it by."""
    return blake3(messages.encode(plan)).digest()


def owned(plan: StepPlan, member: bytes, blocks: int) -> dict[int, int] | None:
    """Micro-batches of ``member`` by hop. None: the plan is not well formed."""
    total = len(plan.micro_batches)
    if list(plan.micro_batches) != sorted(set(plan.micro_batches)):
        return None
    if [item.hop for item in plan.owners] != list(range(blocks + 2)):
        return None
    if any(len(item.owners) != total for item in plan.owners):
        return None
    if any(k >= limits.MICRO_BATCHES_MAX for k in plan.micro_batches):
        return None
    found: dict[int, int] = {}
    for item in plan.owners:
        mine = [
            k
            for k, index in zip(plan.micro_batches, item.owners, strict=True)
            if index < len(plan.members) and plan.members[index] == member
        ]
        if mine:
            found[item.hop] = mask_of(mine)
    return found


def by_stage(hops: Mapping[int, int], blocks: int) -> dict[int, dict[int, int]]:
    """Sets by hop, grouped by the stage that serves it, in the order of the stages."""
    grouped: dict[int, dict[int, int]] = {}
    for hop in sorted(hops, key=lambda h: stage_of(h, blocks)):
        grouped.setdefault(stage_of(hop, blocks), {})[hop] = hops[hop]
    return grouped
