"""Canonical state: chunks, hash, mean and apply, against plain Python and other libraries."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgpack
import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmtrain_protocols import limits
from swarmtrain_protocols.codecs import get_codec, use_numba
from swarmtrain_protocols.errors import LocalProtocolError, PeerFault, StateSpoilt
from swarmtrain_protocols.rules import outer_rule
from swarmtrain_protocols.state import (
    CanonicalState,
    Layout,
    decode_chunks,
    encode_chunks,
    header_chunk,
    parse_header,
    reduce_chunks,
)
from tests.protocols import reference_numbers as reference

Array = np.ndarray[Any, Any]
CHUNK = 512
FP32, INT8 = get_codec("fp32"), get_codec("int8")
OUTER = outer_rule(0.7, 0.9)


def vector(n: int, seed: int = 0, scale: float = 1.0) -> Array:
    return (np.random.default_rng(seed).standard_normal(n) * scale).astype(np.float32)


def a_state(n: int = 1200, seed: int = 0, names: tuple[str, ...] = ("momentum",)) -> CanonicalState:
    slots = {name: vector(n, seed + 1 + index) for index, name in enumerate(names)}
    return CanonicalState("train/0/0", 3, vector(n, seed), slots, chunk_values=CHUNK)


def mean_chunks(seed: int, n: int = 1200) -> list[Any]:
    return list(encode_chunks(vector(n, seed, 0.01), INT8, chunk_values=CHUNK))


def tree(hashes: list[bytes]) -> bytes:
    """RFC 6962 shape, by its recursive definition: split at the largest power of two below n."""
    if len(hashes) == 1:
        return hashes[0]
    split = 1
    while split * 2 < len(hashes):
        split *= 2
    return blake3(b"\x01" + tree(hashes[:split]) + tree(hashes[split:])).digest()


def expected_root(state: CanonicalState) -> bytes:
    header = {
        "channel": state.channel,
        "round": state.round,
        "values": state.theta.size,
        "slots": ["theta", *state.slots],
    }
    chunks = [msgpack.packb(header)]
    for start in range(0, state.theta.size, CHUNK):
        part = slice(start, start + CHUNK)
        arrays = (state.theta, *state.slots.values())
        chunks.append(b"".join(reference.pack(array[part].tolist()) for array in arrays))
    return tree([blake3(b"\x00" + chunk).digest() for chunk in chunks])


@pytest.mark.parametrize("n", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_the_hash_is_the_specified_one(n: int) -> None:
    state = a_state(n)
    assert state.root() == expected_root(state)
    assert state.blob().root == expected_root(state)


@pytest.mark.parametrize("names", [(), ("momentum",), ("m", "v")], ids=len)
def test_every_slot_is_in_the_hash_the_chunks_and_the_copy(names: tuple[str, ...]) -> None:
    state = a_state(names=names)
    assert (state.slot_names, state.nbytes) == (names, 4 * 1200 * (1 + len(names)))
    blob = state.blob()
    assert blob.root == state.root() == expected_root(state)
    assert [len(chunk) for chunk in blob.chunks[1:]] == [
        state.layout.state_nbytes(i, names) for i in range(3)
    ]
    theta = np.zeros(1200, "f4")
    joiner = CanonicalState.first("train/0/0", theta, names, round=3, chunk_values=CHUNK)
    for index, chunk in enumerate(blob.chunks):
        joiner.load_chunk(index, chunk)
    assert joiner.root() == blob.root
    for mine, theirs in zip(joiner.arrays, state.arrays, strict=True):
        assert mine.tobytes() == theirs.tobytes()
    copy = joiner.copy()
    roots = {joiner.root()}
    for array in copy.arrays:
        array[700] += 1
        changed = CanonicalState("train/0/0", 3, copy.theta, copy.slots, chunk_values=CHUNK)
        roots.add(changed.root())
    assert len(roots) == 2 + len(names) and joiner.root() == blob.root


def test_states_with_other_slots_are_other_states() -> None:
    named = [a_state(names=("m", "v")), a_state(names=("v", "m")), a_state(names=("m",))]
    assert len({state.root() for state in named}) == 3
    two = a_state(names=("m", "v"))
    with pytest.raises(PeerFault, match="another state"):
        two.load_chunk(0, a_state().header)
    with pytest.raises(PeerFault, match="bytes"):
        two.load_chunk(1, a_state().chunk(1))


def test_the_hash_covers_round_channel_and_every_slot() -> None:
    base = a_state().root()
    others = [a_state(), a_state(), a_state(), a_state()]
    others[0].round = 4
    others[1].channel = "train/0/1"
    others[2].theta[700] = np.nextafter(others[2].theta[700], np.float32(9))
    others[3].slots["momentum"][1199] = -0.0
    assert len({base, *(state.root() for state in others)}) == 5


@pytest.mark.parametrize("numba", [False, True], ids=["numpy", "numba"])
def test_apply_equals_plain_python_and_refreshes_the_hash(numba: bool) -> None:
    use_numba(numba)
    try:
        state = a_state()
        state.root()
        theta, momentum = state.theta.tolist(), state.slots["momentum"].tolist()
        for seed in (5, 6):
            chunks = mean_chunks(seed)
            mean: list[float] = []
            for index, data in enumerate(chunks):
                mean += reference.decode("int8", bytes(data), state.layout.nvalues(index))
            lr, beta = reference.f32(0.7), reference.f32(0.9)
            theta, momentum = reference.outer_step(theta, momentum, mean, lr, beta)
            state.apply(chunks, INT8, OUTER)
            assert state.theta.tolist() == theta
            assert state.slots["momentum"].tolist() == momentum
            assert state.root() == expected_root(state)
        assert state.round == 5
    finally:
        use_numba(False)


def test_threads_do_not_change_the_result() -> None:
    alone, together = a_state(), a_state()
    alone.apply(mean_chunks(5), INT8, outer_rule(0.4, 0.9))
    with ThreadPoolExecutor(3) as pool:
        together.apply(mean_chunks(5), INT8, outer_rule(0.4, 0.9), run=pool.map)
    assert alone.root() == together.root() == expected_root(alone)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_bad_result_changes_nothing(bad: int) -> None:
    state = a_state()
    before = state.root()
    chunks = mean_chunks(5)
    chunks[bad][:4] = np.float32(np.inf).tobytes()
    for broken in (chunks, chunks[:2], [*mean_chunks(5)[:2], b""]):
        with pytest.raises(PeerFault):
            state.apply(broken, INT8, OUTER)
    assert (state.root(), state.round) == (before, 3)
    assert expected_root(state) == before


def test_a_joiner_rebuilds_the_state_from_its_chunks() -> None:
    donor = a_state()
    blob = donor.blob()
    donor.apply(mean_chunks(5), INT8, OUTER)  # the snapshot stands still
    assert bytes(blob.chunks[0]) == header_chunk("train/0/0", 3, 1200)
    joiner = CanonicalState.first("train/0/0", np.zeros(1200, "f4"), round=3, chunk_values=CHUNK)
    assert joiner.root() != blob.root
    for index in (2, 0, 3, 1):
        joiner.load_chunk(index, blob.chunks[index])
    assert joiner.root() == blob.root == expected_root(joiner)
    joiner.apply(mean_chunks(5), INT8, OUTER)
    assert joiner.root() == donor.root()
    with pytest.raises(PeerFault):
        joiner.load_chunk(1, blob.chunks[3])
    with pytest.raises(PeerFault):
        joiner.load_chunk(0, blob.chunks[0])  # of round 3, and this one is at 4


def test_a_copy_moves_alone() -> None:
    state = a_state()
    copy = state.copy()
    before = state.root()
    state.apply(mean_chunks(1), INT8, OUTER)
    assert copy.root() == before == expected_root(copy)


def test_headers_are_canonical_or_refused() -> None:
    good = header_chunk("train/0/0", 7, 99)
    assert (parse_header(good).round, parse_header(memoryview(good)).values) == (7, 99)
    stage = header_chunk("train/3/0", 7, 99, ("m", "v"))
    assert parse_header(stage).slots == ("theta", "m", "v")
    twice = msgpack.packb({"channel": "a", "round": 1, "values": 2, "slots": ["theta", "m", "m"]})
    many = ["theta", "a", "b", "c", "d"]
    more = msgpack.packb({"channel": "a", "round": 1, "values": 2, "slots": many})
    other = msgpack.packb({"channel": "a", "round": 1, "values": 2, "slots": ["m", "v"]})
    longer = msgpack.packb({"round": 1, "channel": "a", "values": 2, "slots": ["theta"]})
    for bad in (
        b"",
        good[:-1],
        good + b"\0",
        other,
        longer,
        twice,
        more,
        b"\xff",
        b"\x93\x01\x02\x03",
    ):
        with pytest.raises(PeerFault) as caught:
            parse_header(bad)
        assert caught.value.code == "malformed"


def test_layout() -> None:
    layout = Layout(3 * limits.CHUNK_VALUES + 10)
    assert layout.chunks == 4
    assert [layout.nvalues(i) for i in range(4)] == [limits.CHUNK_VALUES] * 3 + [10]
    assert layout.part(3) == slice(3 * limits.CHUNK_VALUES, 3 * limits.CHUNK_VALUES + 10)
    assert layout.range_values(2, 2) == limits.CHUNK_VALUES + 10
    assert layout.encoded_nbytes(3, INT8) == 14
    assert layout.state_nbytes(0, ("momentum",)) == 8 * limits.CHUNK_VALUES
    assert layout.state_nbytes(0, ()) == 4 * limits.CHUNK_VALUES
    assert Layout(limits.CHUNK_VALUES).chunks == 1
    for call in (lambda: Layout(0), lambda: layout.part(4), lambda: layout.part(-1)):
        with pytest.raises(LocalProtocolError):
            call()


@settings(max_examples=30)
@given(
    members=st.integers(1, 5),
    n=st.integers(1, 700),
    codecs=st.tuples(st.sampled_from(["fp32", "bf16", "int8"]), st.sampled_from(["fp32", "int8"])),
    seed=st.integers(0, 99),
)
def test_the_mean_equals_plain_python(
    members: int, n: int, codecs: tuple[str, str], seed: int
) -> None:
    codec_in, codec_out = get_codec(codecs[0]), get_codec(codecs[1])
    rng = np.random.default_rng(seed)
    coefficients = [reference.f32(c) for c in rng.dirichlet(np.ones(members))]
    contributions = [
        encode_chunks(vector(n, seed + i), codec_in, chunk_values=CHUNK) for i in range(members)
    ]
    got = reduce_chunks(contributions, coefficients, codec_in, codec_out, n, chunk_values=CHUNK)
    layout = Layout(n, CHUNK)
    for index in range(layout.chunks):
        acc = [0.0] * layout.nvalues(index)
        for chunks, coefficient in zip(contributions, coefficients, strict=True):
            decoded = reference.decode(codecs[0], bytes(chunks[index]), len(acc))
            acc = reference.accumulate(acc, coefficient, decoded)
        assert bytes(got[index]) == reference.encode(codecs[1], acc)


def test_the_order_of_members_matters_and_is_kept() -> None:
    parts = [encode_chunks(np.array([v], "f4"), FP32) for v in (1e8, 1.0, -1e8)]
    straight = reduce_chunks(parts, [1.0, 1.0, 1.0], FP32, FP32, 1)
    swapped = reduce_chunks([parts[0], parts[2], parts[1]], [1.0, 1.0, 1.0], FP32, FP32, 1)
    assert reference.unpack(bytes(straight[0])) == [0.0]
    assert reference.unpack(bytes(swapped[0])) == [1.0]


def test_a_part_equals_the_same_chunks_of_the_whole() -> None:
    n, seeds = 1200, (1, 2, 3)
    whole = [encode_chunks(vector(n, s), INT8, chunk_values=CHUNK) for s in seeds]
    everything = reduce_chunks(whole, [0.5, 0.25, 0.25], INT8, INT8, n, chunk_values=CHUNK)
    part = reduce_chunks(
        [chunks[1:] for chunks in whole],
        [0.5, 0.25, 0.25],
        INT8,
        INT8,
        n - CHUNK,
        chunk_values=CHUNK,
    )
    assert part == everything[1:]


def test_sums_that_overflow_are_a_fault_and_sums_that_do_not_are_legal_results() -> None:
    largest = np.full(300, limits.VALUE_MAGNITUDE_MAX / 2, np.float32)
    for codec in (FP32, get_codec("bf16"), INT8):
        chunks = encode_chunks(largest, codec)
        total = reduce_chunks([chunks] * 64, [1.0] * 64, codec, codec, 300)
        out = np.zeros(300, np.float32)
        decode_chunks(total, codec, out)
        np.testing.assert_allclose(out, np.full(300, 2.0**105), rtol=0.01)
        for coefficient in (2.0**40, float("nan"), float("inf")):
            with pytest.raises(PeerFault) as caught:
                reduce_chunks([chunks], [coefficient], codec, codec, 300)
            assert caught.value.code == "non_finite"


def test_misuse_is_told() -> None:
    chunks = mean_chunks(1)
    with pytest.raises(LocalProtocolError):
        reduce_chunks([chunks], [0.5, 0.5], INT8, INT8, 1200, chunk_values=CHUNK)
    with pytest.raises(LocalProtocolError):
        reduce_chunks([chunks[:1]], [1.0], INT8, INT8, 1200, chunk_values=CHUNK)
    with pytest.raises(LocalProtocolError):
        CanonicalState("a", 0, np.zeros(4), {})  # fp64
    with pytest.raises(LocalProtocolError):
        CanonicalState("a", 0, np.zeros(8, "f4")[::2], {})
    with pytest.raises(LocalProtocolError):
        CanonicalState("a", 0, np.zeros(5, "f4"), {"m": np.zeros(4, "f4")})
    with pytest.raises(PeerFault):
        decode_chunks(chunks[:2], INT8, np.zeros(1200, "f4"), chunk_values=CHUNK)


@pytest.mark.parametrize("array", ["theta", "momentum"])
def test_nothing_is_added_to_a_state_that_changed_in_memory(array: str) -> None:
    """It is told once; from then on the state's hash is that of what it is."""
    state, was = a_state(), a_state()
    state.root()
    (state.theta if array == "theta" else state.slots[array]).view(np.uint32)[700] ^= 1 << 5
    before = [x.copy() for x in state.arrays]
    with pytest.raises(StateSpoilt, match=r"in 1 of 3 chunks.*train/0/0"):
        state.apply(mean_chunks(5), INT8, OUTER)
    assert state.round == 3 and all(map(np.array_equal, before, state.arrays))
    assert state.root() == expected_root(state) != was.root()
    state.apply(mean_chunks(5), INT8, OUTER)
    was.apply(mean_chunks(5), INT8, OUTER)
    differ = [
        i for i, pair in enumerate(zip(state.leaves, was.leaves, strict=True)) if len({*pair}) > 1
    ]
    assert state.round == 4 and differ == [2]
