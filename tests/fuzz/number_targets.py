"""Targets of numbers: the decoder of every codec, packed chunks, states, Merkle proofs."""

from __future__ import annotations

import numpy as np

from swarmtrain_protocols import limits, merkle, packing
from swarmtrain_protocols.codecs import CODEC_NAMES, get_codec, kernels
from swarmtrain_protocols.codecs.boundary import (
    BOUNDARY_CODEC_NAMES,
    Bounds,
    decode_tokens,
    encode_tokens,
    get_boundary_codec,
)
from swarmtrain_protocols.codecs.subspace import Subspace
from swarmtrain_protocols.corpus import parse_descriptor
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.state import (
    CanonicalState,
    decode_chunks,
    encode_chunks,
    parse_header,
    reduce_chunk,
)
from tests.fuzz.engine import Target
from tests.fuzz.mutate import splice_msgpack

BOUNDS = Bounds(batch_max=4, time_max=8, width=6)
WEIRD = np.array(
    [0.0, -0.0, 1.5, -3e-39, 5e-45, 1e30, -1e30, 2.0**99, 1e-30, 7.0, -127.0, 0.125, 3e8, 1e-8],
    np.float32,
)
CHUNK = 300


def _values(n: int) -> np.ndarray:
    return np.resize(WEIRD, n)


def _codec(data: bytes) -> object:
    """[codec, n as u16, contribution]: checked, decoded, summed beside an honest one."""
    if len(data) < 3:
        return "short"
    codec = get_codec(CODEC_NAMES[data[0] % len(CODEC_NAMES)])
    n = max(1, int.from_bytes(data[1:3], "little") % 1024)
    body, before = data[3:], _values(n)
    acc = before.copy()
    try:
        codec.check(body, n)
    finally:
        assert acc.tobytes() == before.tobytes()
    out = np.empty(n, np.float32)
    codec.decode(body, out)
    assert np.isfinite(out).all() and np.abs(out).max() <= limits.VALUE_MAGNITUDE_MAX
    honest = bytearray(codec.encoded_nbytes(n))
    codec.encode(before / np.float32(4), honest)
    chunk = reduce_chunk([body, honest], [0.75, 0.25], codec, codec, n)
    codec.check(chunk, n, limits.RESULT_MAGNITUDE_MAX)
    return codec.name


def codec() -> Target:
    seeds = []
    for number, name in enumerate(CODEC_NAMES):
        for n in (1, 3, 256, 257, 700):
            out = bytearray(get_codec(name).encoded_nbytes(n))
            get_codec(name).encode(_values(n) * np.float32(0.5), out)
            seeds.append(bytes([number]) + n.to_bytes(2, "little") + bytes(out))
    return Target("codec", _codec, (PeerFault,), seeds, memory_bytes=1 << 17)


def _kernels(data: bytes) -> object:
    """Compiled kernels and NumPy give the same bits for whatever passed the check."""
    if len(data) < 3:
        return "short"
    codec = get_codec(CODEC_NAMES[data[0] % len(CODEC_NAMES)])
    n = max(1, int.from_bytes(data[1:3], "little") % 1024)
    codec.check(data[3:], n)
    found = []
    for compiled in (False, True):
        kernels.use_numba(compiled)
        try:
            acc = _values(n)
            codec.decode_accumulate(data[3:], np.float32(0.3), acc)
            found.append(acc.tobytes())
        finally:
            kernels.use_numba(False)
    assert found[0] == found[1], "kernels differ"
    return codec.name


def compiled() -> Target:
    return Target("compiled_codec", _kernels, (PeerFault,), codec().seeds, memory_bytes=1 << 17)


SUBSPACE = Subspace(7, BOUNDS.width, 3, 50)
TOKENS = np.arange(12, dtype=np.int32).reshape(3, 4)
BOUNDARIES = tuple(name for name in BOUNDARY_CODEC_NAMES if name != "subspace")


def _boundary(data: bytes) -> object:
    if not data:
        return "short"
    number, body = data[0] % (len(BOUNDARIES) + 3), data[1:]
    if number < len(BOUNDARIES):
        found = get_boundary_codec(BOUNDARIES[number]).decode(body, BOUNDS)
        assert found.shape[0] <= BOUNDS.batch_max and found.shape[1] <= BOUNDS.time_max
    elif number == len(BOUNDARIES):
        found, tokens = SUBSPACE.decode_activation(body, BOUNDS)
        assert tokens.shape == found.shape[:2]
    elif number == len(BOUNDARIES) + 1:
        found = SUBSPACE.decode_gradient(body, BOUNDS)
    else:
        ids = decode_tokens(body, BOUNDS.batch_max, BOUNDS.time_max, 50)
        assert ids.min() >= 0 and ids.max() < 50
        return "tokens"
    assert found.shape[2] == BOUNDS.width and np.isfinite(found).all()
    return number


def boundary() -> Target:
    x = np.linspace(-3, 3, 3 * 4 * BOUNDS.width, dtype=np.float32).reshape(3, 4, BOUNDS.width)
    bodies = [get_boundary_codec(name).encode(x) for name in BOUNDARIES]
    bodies += [SUBSPACE.encode_activation(x, TOKENS), SUBSPACE.encode_gradient(x)]
    bodies.append(encode_tokens(TOKENS))
    seeds = [bytes([number]) + body for number, body in enumerate(bodies)]
    return Target("boundary", _boundary, (PeerFault,), seeds, memory_bytes=1 << 17)


def _packed(data: bytes) -> object:
    into = bytearray(b"\xee" * 8192)
    try:
        packing.unpack(data, memoryview(into))
    except PeerFault:
        assert into == b"\xee" * 8192, "a refused chunk was written"
        raise
    return "unpacked"


def packed() -> Target:
    plain = [bytes(8192), bytes(range(256)) * 32, b"ab" * 4096, bytes(100), bytes(1 << 20)]
    seeds = [data for item in plain if (data := packing.pack(item)) is not None]
    return Target("packed_chunk", _packed, (PeerFault,), seeds, memory_bytes=1 << 18)


STATE = CanonicalState.first("train/0/0", _values(700).copy(), chunk_values=CHUNK)
BLOB = STATE.blob()
RESULT = encode_chunks(_values(700), get_codec("int8"), chunk_values=CHUNK)


def _state(data: bytes) -> object:
    """Chunk 0 is the header, others fill a state; an odd first byte: chunks of a result."""
    if not data:
        return "short"
    number, body = data[0] // 2 % 4, data[1:]
    if data[0] % 2:
        out = np.full(700, 9.0, np.float32)
        chunks = [*RESULT]
        chunks[number % len(chunks)] = memoryview(body)
        decode_chunks(chunks, get_codec("int8"), out, chunk_values=CHUNK)
        assert np.isfinite(out).all()
        return "result"
    if number == 0:
        return parse_header(body).round
    state = STATE.copy()
    try:
        state.load_chunk(number, body)
    except PeerFault:
        assert state.theta.tobytes() == STATE.theta.tobytes()
        raise
    return "loaded"


def state() -> Target:
    seeds = [bytes([2 * number]) + bytes(chunk) for number, chunk in enumerate(BLOB.chunks)]
    seeds += [bytes([2 * number + 1]) + bytes(chunk) for number, chunk in enumerate(RESULT)]
    return Target("state", _state, (PeerFault,), seeds, splice_msgpack, 1 << 17)


LEAVES = [merkle.leaf_hash(bytes([number])) for number in range(11)]
ROOT = merkle.merkle_root(LEAVES)


def _proof(data: bytes) -> object:
    """[total, first, count, hashes …]: true only for what is in the tree."""
    if len(data) < 3:
        return "short"
    total, first, count = data[0], data[1], data[2] % 32
    hashes = [data[at : at + 32] for at in range(3, len(data), 32)]
    leaves, proof = hashes[:count], hashes[count:]
    good = merkle.verify_range(ROOT, total, first, leaves, proof)
    assert not good or (total != 11 or leaves == LEAVES[first : first + count])
    return good


def proof() -> Target:
    seeds = []
    for first, count in ((0, 1), (3, 4), (10, 1), (0, 11), (6, 3)):
        hashes = [*LEAVES[first : first + count], *merkle.range_proof(LEAVES, first, count)]
        seeds.append(bytes([11, first, count]) + b"".join(hashes))
    return Target("merkle", _proof, (), seeds, memory_bytes=1 << 18)


def _descriptor(data: bytes) -> object:
    found = parse_descriptor(data)
    assert found.to_bytes() == data and found.nbytes <= limits.CORPUS_BYTES_MAX
    return "corpus"


def corpus() -> Target:
    from swarmtrain_protocols.corpus import Descriptor

    seeds = [Descriptor(1000, 10, b"r" * 32).to_bytes(), Descriptor(1, 0, bytes(32)).to_bytes()]
    return Target("corpus", _descriptor, (PeerFault,), seeds)


MAKERS = (codec, compiled, boundary, packed, state, proof, corpus)
