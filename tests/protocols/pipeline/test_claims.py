"""The set of a step and its owners, against a plain search over explicit lists."""

from __future__ import annotations

import random

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmtrain_protocols import limits, messages
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.messages.pipeline import CloseAnswer, HopClaims, HopOwners, StepKey
from swarmtrain_protocols.pipeline import claims as c

KEY = StepKey(0, 0, 0)
PEERS = [PeerId(bytes([n]) * 32) for n in (9, 3, 7)]
LEAST, MIDDLE, MOST = sorted(PEERS)


def whole(*numbers: int, blocks: int = 2, skipped: int = 0) -> c.Claims:
    """Claims at every hop of one path."""
    hops = [h for h in range(blocks + 2) if h != skipped or not skipped]
    return {(hop, skipped): c.mask_of(numbers) for hop in hops}


@given(st.sets(st.integers(0, limits.MICRO_BATCHES_MAX - 1)))
def test_sets_and_bitmaps(numbers: set[int]) -> None:
    mask = c.mask_of(numbers)
    assert c.numbers_of(mask) == sorted(numbers)
    data = c.to_bytes(mask)
    assert c.from_bytes(data) == mask
    assert {8 * i + b for i, x in enumerate(data) for b in range(8) if x >> b & 1} == numbers
    assert len(data) <= limits.MICRO_BATCHES_MAX // 8


def test_a_micro_batch_is_in_if_every_hop_is_claimed_by_somebody() -> None:
    first = {(0, 0): 0b111, (1, 0): 0b011, (3, 0): 0b111}
    second = {(1, 0): 0b110, (2, 0): 0b101}
    settled = c.settle({MOST: first, LEAST: second}, 2, 4)
    assert settled.micro_batches == [0, 2]
    assert settled.missing == {1: [2], 3: [0, 1, 2, 3]}
    assert settled.owners[1, 0] == MOST and settled.owners[1, 2] == LEAST
    assert settled.owners[2, 0] == LEAST
    assert (1, 1) not in settled.owners, "not in the set: nobody owns it"


def test_two_claimants_have_one_owner_the_least() -> None:
    both = whole(0, 1)
    settled = c.settle({MOST: both, MIDDLE: both}, 2, 2)
    assert set(settled.owners.values()) == {MIDDLE}


def test_paths_are_not_mixed() -> None:
    """Hop 2 was skipped by one path and is missing on the other: the halves do not add up."""
    full = {(0, 0): 1, (1, 0): 1, (3, 0): 1}
    short = {(1, 2): 1, (3, 2): 1}
    settled = c.settle({LEAST: full, MOST: short}, 2, 1)
    assert settled.micro_batches == [] and settled.missing == {0: [2]}
    short[0, 2] = 1
    settled = c.settle({LEAST: full, MOST: short}, 2, 1)
    assert (settled.micro_batches, settled.skipped) == ([0], {0: 2})
    assert settled.owners == {(0, 0): MOST, (1, 0): MOST, (3, 0): MOST}
    full[2, 0] = 1
    assert set(c.settle({LEAST: full, MOST: short}, 2, 1).owners.values()) == {LEAST}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32))
def test_against_a_plain_search(seed: int) -> None:
    rng = random.Random(seed)
    blocks, total = rng.randint(1, 4), rng.randint(1, 12)
    answers: dict[PeerId, c.Claims] = {}
    for peer in PEERS:
        answers[peer] = {
            (hop, skipped): rng.getrandbits(total)
            for skipped in ((0, 1) if blocks > 1 else (0,))
            for hop in range(blocks + 2)
            if (hop != skipped or not skipped) and rng.random() < 0.8
        }
    settled = c.settle(answers, blocks, total)

    def has(peer: PeerId, hop: int, path: int, k: int) -> bool:
        return k in c.numbers_of(answers[peer].get((hop, path), 0))

    for k in range(total):
        complete = [
            path
            for path in (0, 1)
            if all(
                any(has(p, h, path, k) for p in PEERS)
                for h in range(blocks + 2)
                if path == 0 or h != path
            )
        ]
        complete = [path for path in complete if path == 0 or blocks > 1]
        assert (k in settled.micro_batches) == bool(complete)
        if complete:
            path = complete[0]
            for hop in range(blocks + 2):
                expected = [p for p in sorted(PEERS) if has(p, hop, path, k)]
                if path and hop == path:
                    assert (hop, k) not in settled.owners
                else:
                    assert settled.owners[hop, k] == expected[0]
    plan = c.plan_of(KEY, 3, settled, blocks)
    shares = [c.owned(plan, peer, blocks) for peer in PEERS]
    for hop in range(blocks + 2):
        masks = [share.get(hop, 0) for share in shares if share is not None]
        assert sum(m.bit_count() for m in masks) == sum(
            (hop, k) in settled.owners for k in settled.micro_batches
        ), "every pair has exactly one owner"


def test_the_plan_travels_and_is_named_by_its_bytes() -> None:
    settled = c.settle({LEAST: whole(0, skipped=1), MOST: whole(1)}, 2, 2)
    plan = c.plan_of(KEY, 7, settled, 2)
    assert plan.members == (LEAST, MOST)
    assert plan.owners[1] == HopOwners(1, (2, 1)), "index 2 is nobody: that hop was skipped"
    assert messages.decode(messages.encode(plan)) == plan
    assert c.plan_digest(plan) == blake3(messages.encode(plan)).digest()
    assert c.owned(plan, LEAST, 2) == {0: 0b01, 2: 0b01, 3: 0b01}
    assert c.owned(plan, MIDDLE, 2) == {}
    assert c.by_stage({3: 1, 1: 2, 0: 4}, 2) == {0: {3: 1, 0: 4}, 1: {1: 2}}


def test_the_largest_plan_fits_into_a_control_frame() -> None:
    blocks = 6
    total = limits.PLAN_OWNERS_MAX // (blocks + 2)
    settled = c.settle({LEAST: whole(*range(total), blocks=blocks)}, blocks, total)
    plan = c.plan_of(KEY, 1, settled, blocks)
    assert len(messages.encode(plan)) < limits.FRAME_BYTES_CONTROL_MAX


@pytest.mark.parametrize("change", ["order", "hops", "length", "range"])
def test_a_malformed_plan_owns_nothing(change: str) -> None:
    plan = c.plan_of(KEY, 1, c.settle({LEAST: whole(0, 1)}, 2, 2), 2)
    owners = list(plan.owners)
    numbers = plan.micro_batches
    if change == "order":
        numbers = (1, 0)
    elif change == "hops":
        owners[1] = HopOwners(2, owners[1].owners)
    elif change == "length":
        owners[1] = HopOwners(1, (0,))
    else:
        numbers = (0, limits.MICRO_BATCHES_MAX)
    bad = type(plan)(plan.key, plan.query, plan.members, numbers, tuple(owners))
    assert c.owned(bad, LEAST, 2) is None
    assert c.owned(plan, LEAST, 2) is not None


def test_claims_travel_and_what_has_no_room_is_not_claimed() -> None:
    claims = {(0, 0): 1 << 20, (1, 2): 0b101, (2, 0): 0}
    listed = c.encode_claims(claims)
    assert listed == (HopClaims(0, b"\x00\x00\x10", 0), HopClaims(1, b"\x05", 2))
    assert c.decode_claims(listed, [0, 1], 2, 21, 2, 3) == {(0, 0): 1 << 20, (1, 2): 0b101}
    assert c.decode_claims(listed, [1], 2, 21, 2, 3) == {(1, 2): 0b101}, "not believed of stage 0"
    many = {(hop, s): (1 << 4096) - 1 for hop in range(17) for s in range(20)}
    answer = CloseAnswer(KEY, 1, c.encode_claims(many))
    assert 0 < len(answer.claims) < len(many)
    assert len(messages.encode(answer)) < limits.FRAME_BYTES_CONTROL_MAX
    assert messages.decode(messages.encode(answer)) == answer


@pytest.mark.parametrize(
    "item",
    [HopClaims(4, b"\x01"), HopClaims(0, b"\x10"), HopClaims(1, b"\x01", 1), HopClaims(1, b"", 3)],
)
def test_claims_of_what_does_not_exist(item: HopClaims) -> None:
    good = HopClaims(1, b"\x01", 2)
    assert c.decode_claims([good], [0, 1, 2], 2, 4, 2, 1) == {(1, 2): 1}
    assert c.decode_claims([good, item], [0, 1, 2], 2, 4, 2, 1) is None
    assert c.decode_claims([good, good], [0, 1, 2], 2, 4, 2, 1) is None


def test_claims_of_other_paths_than_everybody_takes() -> None:
    whole, short = HopClaims(1, b"\x0c", 0), HopClaims(1, b"\x03", 2)
    assert c.decode_claims([whole, short], [1], 2, 4, 2, 2) == {(1, 0): 0b1100, (1, 2): 0b11}
    assert c.decode_claims([whole, short], [1], 2, 4) is None, "nothing is left out"
    assert c.decode_claims([whole], [1], 2, 4) == {(1, 0): 0b1100}
    assert c.decode_claims([HopClaims(1, b"\x04", 2)], [1], 2, 4, 2, 2) is None, "2 skips nothing"
    assert c.decode_claims([HopClaims(1, b"\x02", 0)], [1], 2, 4, 2, 2) is None, "1 skips stage 2"
    assert c.decode_claims([HopClaims(2, b"\x01", 1)], [2], 2, 4, 2, 2) is None, "not stage 1"
