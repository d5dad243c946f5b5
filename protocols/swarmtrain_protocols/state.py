"""Canonical state of a channel, its chunks and its hash, and the mean that moves it.

A channel's vector is cut into chunks of ``limits.CHUNK_VALUES`` values. Contributions, results and
states are lists of chunks, each list a blob under a Merkle root. The state hash of a channel is the
root over a small header and, per chunk, the bytes of theta and then those of the outer momentum.
Spec: ``protocols/spec/07-outer-step.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
from swarmtrain_protocols.errors import LocalProtocolError, PeerFault
from swarmtrain_protocols.merkle import LEAF_PREFIX, Blob, leaf_hash, merkle_root
from swarmtrain_protocols.messages.common import Channel, Count
from swarmtrain_protocols.outer import outer_step

SLOTS = ("theta", "momentum")

Mapper = Callable[[Callable[[int], None], Iterable[int]], Iterable[None]]
"""``map``, or the ``map`` of an executor, to spread chunks over threads."""


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

    def state_nbytes(self, index: int) -> int:
        """Bytes of theta and momentum of chunk ``index`` (chunk ``index + 1`` of the blob)."""
        return len(SLOTS) * 4 * self.nvalues(index)

    def range_values(self, first: int, count: int) -> int:
        """How many values chunks ``first … first+count-1`` hold together."""
        last = first + count - 1
        return self.start(last) + self.nvalues(last) - self.start(first)


class StateHeader(msgspec.Struct, frozen=True):
    """Chunk 0 of a state blob, MessagePack."""

    channel: Channel
    round: Count
    values: Count
    slots: Annotated[tuple[str, ...], Meta(max_length=4)] = SLOTS


_header_decoder = msgspec.msgpack.Decoder(StateHeader)


def header_chunk(channel: str, round: int, values: int) -> bytes:
    """Chunk 0 of the state blob; whoever asks for a state knows these bytes beforehand."""
    return msgspec.msgpack.encode(StateHeader(channel, round, values))


def parse_header(data: Buffer) -> StateHeader:
    """Read chunk 0 of a state blob.

    Raises:
        PeerFault: ``malformed``.
    """
    try:
        header = _header_decoder.decode(bytes(data))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PeerFault("malformed", f"state header: {error}") from None
    if header.slots != SLOTS or header_chunk(header.channel, header.round, header.values) != data:
        raise PeerFault("malformed", "state header is not in its canonical form")
    return header


class CanonicalState:
    """What every member in step holds bit for bit: round, theta and outer momentum of a channel.

    ``round`` counts the results applied so far: the result of round ``r`` takes a state with
    ``round == r`` to ``r + 1``. The arrays are used in place, not copied; write them only through
    ``apply`` and ``load_chunk``.
    """

    def __init__(
        self,
        channel: str,
        round: int,
        theta: F32,
        momentum: F32,
        *,
        chunk_values: int = limits.CHUNK_VALUES,
    ) -> None:
        for array in (theta, momentum):
            if array.dtype != np.float32 or array.ndim != 1 or not array.flags.c_contiguous:
                raise LocalProtocolError("theta and momentum must be contiguous f32[n]")
        if theta.size != momentum.size:
            raise LocalProtocolError("theta and momentum differ in length")
        self.channel = channel
        self.round = round
        self.theta = theta
        self.momentum = momentum
        self.layout = Layout(theta.size, chunk_values)
        self._leaves: list[bytes] | None = None

    @classmethod
    def first(
        cls, channel: str, theta: F32, *, chunk_values: int = limits.CHUNK_VALUES
    ) -> CanonicalState:
        """Round 0: the initial parameters f32[n], and momentum zero."""
        return cls(channel, 0, theta, np.zeros_like(theta), chunk_values=chunk_values)

    @property
    def header(self) -> bytes:
        """Chunk 0 of the blob."""
        return header_chunk(self.channel, self.round, self.layout.values)

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
        return self.theta[part].tobytes() + self.momentum[part].tobytes()

    def blob(self) -> Blob:
        """An immutable snapshot (a copy) for serving to joiners while this state moves on."""
        return Blob([self.chunk(i) for i in range(self.layout.chunks + 1)], self.leaves)

    def copy(self) -> CanonicalState:
        """An independent copy, for example to be saved while this state moves on."""
        copied = CanonicalState(
            self.channel,
            self.round,
            self.theta.copy(),
            self.momentum.copy(),
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
        if found.size != self.layout.state_nbytes(index - 1):
            raise PeerFault("malformed", f"state chunk {index} of {found.size} bytes")
        half = found.size // 2
        self.theta[part].view(np.uint8)[:] = found[:half]
        self.momentum[part].view(np.uint8)[:] = found[half:]
        if self._leaves is not None:
            self._leaves[index - 1] = self._leaf(index - 1)

    def apply(
        self,
        result_chunks: Sequence[Buffer],
        codec: Codec,
        lr: float,
        beta: float,
        *,
        run: Mapper = map,
    ) -> None:
        """Take the outer step with the encoded result of round ``self.round``, chunk by chunk.

        All chunks are checked first, so a bad result changes nothing.

        Raises:
            PeerFault: ``malformed`` or ``non_finite``.
        """
        check_ieee_arithmetic()
        layout = self.layout
        if len(result_chunks) != layout.chunks:
            raise PeerFault("malformed", f"{len(result_chunks)} chunks, expected {layout.chunks}")
        for index, data in enumerate(result_chunks):
            codec.check(data, layout.nvalues(index), limits.RESULT_MAGNITUDE_MAX)
        leaves = [b""] * layout.chunks

        def step(index: int) -> None:
            part = layout.part(index)
            mean = np.empty(layout.nvalues(index), np.float32)
            codec.decode(result_chunks[index], mean)
            outer_step(
                self.theta[part], self.momentum[part], mean, np.float32(lr), np.float32(beta)
            )
            leaves[index] = self._leaf(index)

        for _ in run(step, range(layout.chunks)):
            pass
        self._leaves = leaves
        self.round += 1

    def _leaf(self, index: int) -> bytes:
        part = self.layout.part(index)
        hasher = blake3(LEAF_PREFIX)
        hasher.update(self.theta[part].view(np.uint8).data)
        hasher.update(self.momentum[part].view(np.uint8).data)
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
