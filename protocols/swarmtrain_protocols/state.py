"""Canonical state of a channel, its chunks and its hash, and the mean that moves it.

A channel's vector is cut into chunks of ``limits.CHUNK_VALUES`` values. Contributions, results and
states are lists of chunks, each list a blob under a Merkle root. The state hash of a channel is the
root over a small header and, per chunk, the bytes of theta and then those of each slot: the vectors
of its optimizer, which ``rules.py`` names. Spec: ``protocols/spec/07-outer-step.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated

import msgspec
import numpy as np
from blake3 import blake3
from msgspec import Meta

from swarmtrain_protocols import limits
from swarmtrain_protocols.codecs.base import (
    F32,
    Buffer,
    Codec,
    check_ieee_arithmetic,
    magnitude_bits,
    magnitude_bits_of,
)
from swarmtrain_protocols.errors import LocalProtocolError, PeerFault, StateSpoilt
from swarmtrain_protocols.merkle import LEAF_PREFIX, Blob, leaf_hash, merkle_root
from swarmtrain_protocols.messages.common import Channel, Count
from swarmtrain_protocols.stageopt import square_norm

THETA = "theta"
MOMENTUM = ("momentum",)
"""The slots of a channel whose results are mean pseudo-gradients (DiLoCo)."""
SLOTS_MAX = 3

Mapper = Callable[[Callable[[int], None], Iterable[int]], Iterable[None]]
"""``map``, or the ``map`` of an executor, to spread chunks over threads."""

Step = Callable[[F32, Sequence[F32], F32, int], None]
"""(theta, slots, decoded result, index of the first value): moves one chunk f32[n] in place."""


class Layout:
    """How ``values`` fp32 values fall into chunks; only the last chunk may be short."""

    __slots__ = ("chunk_values", "chunks", "values")

    def __init__(self, values: int, chunk_values: int = limits.CHUNK_VALUES) -> None:
        if not 0 < values <= limits.VALUES_PER_CHANNEL_MAX:
            raise LocalProtocolError(f"a channel of {values} values", "must hold at least one")
        self.values = values
        self.chunk_values = chunk_values
        self.chunks = -(-values // chunk_values)

    def start(self, index: int) -> int:
        """Index of the first value of chunk ``index``."""
        if not 0 <= index < self.chunks:
            raise LocalProtocolError(f"chunk {index} of {self.chunks}")
        return index * self.chunk_values

    def nvalues(self, index: int) -> int:
        """How many values chunk ``index`` has."""
        return min(self.chunk_values, self.values - self.start(index))

    def part(self, index: int) -> slice:
        """The values of chunk ``index``."""
        return slice(self.start(index), self.start(index) + self.nvalues(index))

    def encoded_nbytes(self, index: int, codec: Codec) -> int:
        """Bytes of chunk ``index`` of a contribution or result."""
        return codec.encoded_nbytes(self.nvalues(index))

    def state_nbytes(self, index: int, slots: Sequence[str]) -> int:
        """Bytes of theta and ``slots`` of chunk ``index`` (chunk ``index + 1`` of the blob)."""
        return (1 + len(slots)) * 4 * self.nvalues(index)

    def range_values(self, first: int, count: int) -> int:
        """How many values chunks ``first … first+count-1`` hold together."""
        last = first + count - 1
        return self.start(last) + self.nvalues(last) - self.start(first)


class StateHeader(msgspec.Struct, frozen=True):
    """Chunk 0 of a state blob, MessagePack. ``slots`` names the vectors of a chunk, theta first."""

    channel: Channel
    round: Count
    values: Count
    slots: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=16)], ...],
        Meta(min_length=1, max_length=1 + SLOTS_MAX),
    ]


_header_decoder = msgspec.msgpack.Decoder(StateHeader)


def header_chunk(channel: str, round: int, values: int, slots: Sequence[str] = MOMENTUM) -> bytes:
    """Chunk 0 of the state blob; whoever asks for a state knows these bytes beforehand."""
    return msgspec.msgpack.encode(StateHeader(channel, round, values, (THETA, *slots)))


def parse_header(data: Buffer) -> StateHeader:
    """Read chunk 0 of a state blob.

    Raises:
        PeerFault: ``malformed``.
    """
    try:
        header = _header_decoder.decode(bytes(data))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PeerFault("malformed", f"state header: {error}") from None
    names = header.slots
    if names[0] != THETA or len(set(names)) != len(names) or msgspec.msgpack.encode(header) != data:
        raise PeerFault("malformed", "state header is not in its canonical form")
    return header


class CanonicalState:
    """What every member in step holds bit for bit: round, theta and slots of a channel.

    ``round`` counts the results applied so far: the result of round ``r`` takes a state with
    ``round == r`` to ``r + 1``. ``slots`` are the vectors of its optimizer by name, in the order
    of the header. The arrays are used in place, not copied; write them only through ``apply`` and
    ``load_chunk``.
    """

    def __init__(
        self,
        channel: str,
        round: int,
        theta: F32,
        slots: Mapping[str, F32],
        *,
        chunk_values: int = limits.CHUNK_VALUES,
    ) -> None:
        assert len(slots) <= SLOTS_MAX and THETA not in slots
        for array in (theta, *slots.values()):
            if array.dtype != np.float32 or array.ndim != 1 or not array.flags.c_contiguous:
                raise LocalProtocolError("theta and slots must be contiguous f32[n]")
            if array.size != theta.size:
                raise LocalProtocolError("theta and slots differ in length")
        self.channel = channel
        self.round = round
        self.theta = theta
        self.slots = dict(slots)
        self.layout = Layout(theta.size, chunk_values)
        self._leaves: list[bytes] | None = None

    @classmethod
    def first(
        cls,
        channel: str,
        theta: F32,
        slots: Sequence[str] = MOMENTUM,
        *,
        round: int = 0,
        chunk_values: int = limits.CHUNK_VALUES,
    ) -> CanonicalState:
        """Parameters f32[n] with slots of zeros: round 0, or a stage that was rebuilt."""
        zeros = {name: np.zeros_like(theta) for name in slots}
        return cls(channel, round, theta, zeros, chunk_values=chunk_values)

    @property
    def slot_names(self) -> tuple[str, ...]:
        return tuple(self.slots)

    @property
    def arrays(self) -> tuple[F32, ...]:
        """Theta, then the slots."""
        return (self.theta, *self.slots.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def header(self) -> bytes:
        """Chunk 0 of the blob."""
        return header_chunk(self.channel, self.round, self.layout.values, self.slot_names)

    @property
    def leaves(self) -> list[bytes]:
        """Leaf hashes of all blob chunks, header first. Hashes everything on first use."""
        if self._leaves is None:
            self._leaves = [self._leaf(index) for index in range(self.layout.chunks)]
        return [leaf_hash(self.header), *self._leaves]

    def root(self) -> bytes:
        """The state hash, 32 bytes."""
        return merkle_root(self.leaves)

    def chunk(self, index: int) -> bytes:
        """A copy of a blob chunk: 0 is the header, ``i + 1`` is chunk ``i`` of the arrays."""
        if index == 0:
            return self.header
        part = self.layout.part(index - 1)
        return b"".join(array[part].tobytes() for array in self.arrays)

    def blob(self) -> Blob:
        """An immutable snapshot (a copy) for serving to joiners while this state moves on."""
        return Blob([self.chunk(i) for i in range(self.layout.chunks + 1)], self.leaves)

    def copy(self) -> CanonicalState:
        """An independent copy, for example to be saved while this state moves on."""
        copied = CanonicalState(
            self.channel,
            self.round,
            self.theta.copy(),
            {name: array.copy() for name, array in self.slots.items()},
            chunk_values=self.layout.chunk_values,
        )
        copied._leaves = None if self._leaves is None else list(self._leaves)
        return copied

    def load_chunk(self, index: int, data: Buffer) -> None:
        """Write blob chunk ``index``, verified against the root by whoever fetched it.

        Raises:
            PeerFault: ``malformed``: a length or header that does not fit this state.
        """
        if index == 0:
            if bytes(data) != self.header:
                raise PeerFault("malformed", "state header of another state")
            return
        part = self.layout.part(index - 1)
        found = np.frombuffer(data, np.uint8)
        if found.size != self.layout.state_nbytes(index - 1, self.slot_names):
            raise PeerFault("malformed", f"state chunk {index} of {found.size} bytes")
        each = 4 * self.layout.nvalues(index - 1)
        for number, array in enumerate(self.arrays):
            array[part].view(np.uint8)[:] = found[number * each : (number + 1) * each]
        if self._leaves is not None:
            self._leaves[index - 1] = self._leaf(index - 1)

    def apply(
        self, result_chunks: Sequence[Buffer], codec: Codec, step: Step, *, run: Mapper = map
    ) -> None:
        """Take a step with the encoded result of round ``self.round``, chunk by chunk.

        All chunks are checked first, so a bad result changes nothing, and nothing is built on bits
        that have flipped since this state was hashed.

        Raises:
            PeerFault: ``malformed`` or ``non_finite``.
            StateSpoilt: the arrays differ from their hash; from now on the hash is that of what
                they are.
        """
        check_ieee_arithmetic()
        layout = self.layout
        if len(result_chunks) != layout.chunks:
            raise PeerFault("malformed", f"{len(result_chunks)} chunks, expected {layout.chunks}")
        for index, data in enumerate(result_chunks):
            codec.check(data, layout.nvalues(index), limits.RESULT_MAGNITUDE_MAX)
        if spoilt := self.hash_again(run):
            raise StateSpoilt(
                f"own state differs from its hash in {len(spoilt)} of {layout.chunks} chunks",
                f"memory of {self.channel} has changed",
                "test this machine's memory",
            )
        leaves = [b""] * layout.chunks

        def move(index: int) -> None:
            part = layout.part(index)
            mean = np.empty(layout.nvalues(index), np.float32)
            codec.decode(result_chunks[index], mean)
            slots = [array[part] for array in self.slots.values()]
            step(self.theta[part], slots, mean, layout.start(index))
            leaves[index] = self._leaf(index)

        for _ in run(move, range(layout.chunks)):
            pass
        self._leaves = leaves
        self.round += 1

    def hash_again(self, run: Mapper = map) -> list[int]:
        """Hash the arrays as they are; which chunks are not what was hashed before."""
        if self._leaves is None:
            return []
        before, found = self._leaves, [b""] * self.layout.chunks

        def look(index: int) -> None:
            found[index] = self._leaf(index)

        for _ in run(look, range(self.layout.chunks)):
            pass
        self._leaves = found
        return [index for index, leaf in enumerate(before) if leaf != found[index]]

    def _leaf(self, index: int) -> bytes:
        part = self.layout.part(index)
        hasher = blake3(LEAF_PREFIX)
        for array in self.arrays:
            hasher.update(array[part].view(np.uint8).data)
        return hasher.digest()

    def __repr__(self) -> str:
        return f"CanonicalState({self.channel}, round {self.round}, {self.layout.values} values)"


def chunk_buffers(sizes: Sequence[int]) -> list[memoryview]:
    """Writable buffers of these sizes, cut from one allocation (the system gives huge pages)."""
    whole = memoryview(np.empty(sum(sizes), np.uint8).data)
    views: list[memoryview] = []
    start = 0
    for size in sizes:
        views.append(whole[start : start + size])
        start += size
    return views


def encode_chunks(
    x: F32, codec: Codec, *, chunk_values: int = limits.CHUNK_VALUES, run: Mapper = map
) -> list[memoryview]:
    """Encode f32[n], already checked by ``check_finite``, into one buffer per chunk."""
    layout = Layout(x.size, chunk_values)
    chunks = chunk_buffers([layout.encoded_nbytes(i, codec) for i in range(layout.chunks)])

    def work(index: int) -> None:
        codec.encode(x[layout.part(index)], chunks[index])

    for _ in run(work, range(layout.chunks)):
        pass
    return chunks


def decode_chunks(
    chunks: Sequence[Buffer],
    codec: Codec,
    out: F32,
    *,
    chunk_values: int = limits.CHUNK_VALUES,
    run: Mapper = map,
) -> None:
    """Check and decode all chunks of a vector into ``out`` f32[n].

    Raises:
        PeerFault: ``malformed`` or ``non_finite``.
    """
    layout = Layout(out.size, chunk_values)
    if len(chunks) != layout.chunks:
        raise PeerFault("malformed", f"{len(chunks)} chunks, expected {layout.chunks}")

    def work(index: int) -> None:
        codec.check(chunks[index], layout.nvalues(index), limits.RESULT_MAGNITUDE_MAX)
        codec.decode(chunks[index], out[layout.part(index)])

    for _ in run(work, range(layout.chunks)):
        pass


def square_of(
    chunks: Sequence[Buffer], sizes: Sequence[int], codec: Codec, run: Mapper = map
) -> float:
    """Sum of the squares of all values of checked chunks of these many, in fp64.

    By chunk as ``square_norm`` (07 §2.3) and then in the order of the chunks: the same bits
    wherever the same bytes are.
    """
    squares = [0.0] * len(sizes)

    def work(index: int) -> None:
        decoded = np.empty(sizes[index], np.float32)
        codec.decode(chunks[index], decoded)
        squares[index] = square_norm(decoded)

    for _ in run(work, range(len(sizes))):
        pass
    total = 0.0
    for square in squares:
        total += square
    return total


def reduce_chunk(
    contributions: Sequence[Buffer],
    coefficients: Sequence[float],
    codec_in: Codec,
    codec_out: Codec,
    n: int,
    out: memoryview | None = None,
) -> memoryview:
    """One chunk of n values: encode ``sum_i c_i * decode(contribution_i)``, once, into ``out``.

    The sum starts at zero and runs in the order given, which is member order; every product and
    every addition rounds to fp32. Owners, deputies and the simulator get the same bytes from it.

    Args:
        contributions: encoded chunks that passed ``codec_in.check``.
        coefficients: one fp32 value each.

    Raises:
        PeerFault: ``non_finite``: the sum exceeds what a result may hold.
    """
    check_ieee_arithmetic()
    if len(contributions) != len(coefficients):
        raise LocalProtocolError(f"{len(contributions)} contributions, {len(coefficients)} weights")
    acc = np.zeros(n, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # judged by the sum
        for data, coefficient in zip(contributions, coefficients, strict=True):
            codec_in.decode_accumulate(data, np.float32(coefficient), acc)
    if magnitude_bits(acc) > magnitude_bits_of(limits.RESULT_MAGNITUDE_MAX / 2):
        raise PeerFault("non_finite", "the weighted sum is not finite or too large for a result")
    if out is None:
        out = memoryview(bytearray(codec_out.encoded_nbytes(n)))
    codec_out.encode(acc, out)
    return out


def reduce_chunks(
    contributions: Sequence[Sequence[Buffer]],
    coefficients: Sequence[float],
    codec_in: Codec,
    codec_out: Codec,
    n: int,
    *,
    chunk_values: int = limits.CHUNK_VALUES,
) -> list[memoryview]:
    """A part of n values in all its chunks: ``contributions[member][chunk]`` to ``[chunk]``.

    See ``reduce_chunk``. Contributions left out by the agreed set are left out here.
    """
    layout = Layout(n, chunk_values)
    for chunks in contributions:
        if len(chunks) != layout.chunks:
            raise LocalProtocolError(f"{len(chunks)} chunks, expected {layout.chunks}")
    return [
        reduce_chunk(
            [chunks[index] for chunks in contributions],
            coefficients,
            codec_in,
            codec_out,
            layout.nvalues(index),
        )
        for index in range(layout.chunks)
    ]
