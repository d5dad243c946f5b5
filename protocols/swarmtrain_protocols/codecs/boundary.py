"""How activations and their gradients become bytes between the stages of a model (spec 06 §1.2).

Unlike the codecs of contributions these keep a shape: ``[batch, time, width]``, in a header of 16
bytes that is checked against what the receiver expects before anything is allocated. int8 and fp8
have one fp32 scale per token (the last axis), absmax scaled. This is the NumPy oracle; trainers run
the same arithmetic on their device. Token ids travel under the same header.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from swarmtrain_protocols import limits
from swarmtrain_protocols.codecs.base import F32, U8
from swarmtrain_protocols.codecs.kernels_numpy import TINY, decode_bf16, encode_bf16
from swarmtrain_protocols.errors import ConfigError, LocalProtocolError, PeerFault

I32: TypeAlias = npt.NDArray[np.int32]
Buffer: TypeAlias = "bytes | bytearray | memoryview"
Floats: TypeAlias = npt.NDArray[np.float32] | npt.NDArray[np.float64]

HEADER = struct.Struct("<BBHIII")
VERSION = 1
TOKENS = 0
"""Codec number of token ids, i32 [batch, time]."""
INT8_LEVELS = np.float32(127.0)
INT8_MAGNITUDE_MAX = 128.0
FP8_LEVELS = np.float32(448.0)
"""Largest finite value of e4m3 without infinities (OCP 8-bit floating point, 2023)."""


@dataclass(frozen=True, slots=True)
class Header:
    """``codec`` number and shape of what follows. ``width`` is 1 for token ids."""

    codec: int
    batch: int
    time: int
    width: int

    @property
    def tokens(self) -> int:
        """Number of rows: batch x time."""
        return self.batch * self.time


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a receiver expects: at most so many sequences of at most so many tokens, this width."""

    batch_max: int
    time_max: int
    width: int


def pack_header(codec: int, shape: tuple[int, ...]) -> bytes:
    """The 16 bytes before a payload of shape [batch, time, width]."""
    batch, time, width = shape
    return HEADER.pack(VERSION, codec, 0, batch, time, width)


def parse_header(data: Buffer, bounds: Bounds, codec: int) -> Header:
    """Read and check the header; the payload is not looked at.

    Raises:
        PeerFault: ``malformed`` (short, another version, codec or width, an empty shape), or
            ``oversize`` (more sequences or tokens than ``bounds`` allow).
    """
    view = memoryview(data).cast("B")
    if view.nbytes < HEADER.size:
        raise PeerFault("malformed", f"boundary tensor of {view.nbytes} bytes")
    version, found, reserved, batch, time, width = HEADER.unpack_from(view)
    if (version, reserved) != (VERSION, 0) or found != codec:
        raise PeerFault("malformed", f"boundary codec {found} of version {version}, not {codec}")
    if not batch or not time or width != bounds.width:
        raise PeerFault("malformed", f"boundary tensor of shape [{batch}, {time}, {width}]")
    if batch > bounds.batch_max or time > bounds.time_max:
        raise PeerFault(
            "oversize",
            f"[{batch}, {time}] tokens, at most [{bounds.batch_max}, {bounds.time_max}]",
        )
    return Header(found, batch, time, width)


def encode_tokens(tokens: I32) -> bytes:
    """Token ids i32 [batch, time] under a header."""
    if tokens.ndim != 2 or tokens.dtype != np.int32:
        raise LocalProtocolError(f"token ids of shape {tokens.shape} and type {tokens.dtype}")
    return pack_header(TOKENS, (*tokens.shape, 1)) + np.ascontiguousarray(tokens).tobytes()


def decode_tokens(data: Buffer, batch_max: int, time_max: int, vocabulary: int) -> I32:
    """Token ids i32 [batch, time], a view of ``data``.

    Raises:
        PeerFault: ``malformed`` (header, length, an id outside the vocabulary) or ``oversize``.
    """
    header = parse_header(data, Bounds(batch_max, time_max, 1), TOKENS)
    check_payload(data, 4 * header.tokens)
    ids = np.frombuffer(data, "<i4", offset=HEADER.size)
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise PeerFault("malformed", f"a token id outside 0 … {vocabulary - 1}")
    return ids.reshape(header.batch, header.time)


def check_payload(data: Buffer, nbytes: int) -> None:
    """Raise PeerFault ``malformed`` unless exactly ``nbytes`` follow the header."""
    have = memoryview(data).nbytes - HEADER.size
    if have != nbytes:
        raise PeerFault("malformed", f"boundary payload of {have} bytes, expected {nbytes}")


class BoundaryCodec(Protocol):
    """Stateless. ``encode`` and ``decode`` are exact: decoders agree bit for bit everywhere."""

    @property
    def name(self) -> str:
        """Name in the run key ``boundary_codec``."""

    @property
    def code(self) -> int:
        """Number in the header."""

    def payload_nbytes(self, tokens: int, width: int) -> int:
        """Bytes after the header of a tensor of ``tokens`` rows."""

    def encode(self, x: Floats) -> bytes:
        """Header and payload of finite values [batch, time, width]."""

    def check(self, data: Buffer, bounds: Bounds) -> Header:
        """Refuse bytes that are not a tensor within ``bounds``, before anything is allocated.

        Raises:
            PeerFault: ``malformed``, ``oversize`` or ``non_finite``.
        """

    def decode(self, data: Buffer, bounds: Bounds) -> Floats:
        """``check``, then the values [batch, time, width]: f32 (f64 if the codec carries f64)."""


def check_values(x: Floats) -> None:
    """Refuse local values [batch, time, width] that must not be sent.

    Raises:
        LocalProtocolError: wrong shape or type, NaN, infinity or a magnitude above half of
            ``limits.VALUE_MAGNITUDE_MAX``.
    """
    if x.ndim != 3 or 0 in x.shape or x.dtype not in (np.float32, np.float64):
        raise LocalProtocolError(f"a boundary tensor of shape {x.shape} and type {x.dtype}")
    if not float(np.abs(x).max()) <= limits.VALUE_MAGNITUDE_MAX / 2:
        raise LocalProtocolError("non-finite values", "an activation or gradient is not finite")


class _Plain:
    """Values one after the other, without scales."""

    name: str
    code: int
    dtype: str

    def payload_nbytes(self, tokens: int, width: int) -> int:
        return tokens * width * np.dtype(self.dtype).itemsize

    def check(self, data: Buffer, bounds: Bounds) -> Header:
        header = parse_header(data, bounds, self.code)
        check_payload(data, self.payload_nbytes(header.tokens, header.width))
        values = self._values(np.frombuffer(data, self.dtype, offset=HEADER.size))
        if not float(np.abs(values).max()) <= limits.VALUE_MAGNITUDE_MAX:
            raise PeerFault("non_finite", f"{self.name} boundary: NaN, infinite or too large")
        return header

    def encode(self, x: Floats) -> bytes:
        check_values(x)
        return pack_header(self.code, x.shape) + self._payload(x).tobytes()

    def decode(self, data: Buffer, bounds: Bounds) -> Floats:
        header = self.check(data, bounds)
        values = self._values(np.frombuffer(data, self.dtype, offset=HEADER.size))
        return values.reshape(header.batch, header.time, header.width).copy()

    def _payload(self, x: Floats) -> npt.NDArray[Any]:
        return np.ascontiguousarray(x, dtype=self.dtype)

    def _values(self, payload: npt.NDArray[Any]) -> Floats:
        return cast(Floats, payload)


class BoundaryFp32(_Plain):
    """Four bytes per value."""

    name, code, dtype = "fp32", 1, "<f4"


class BoundaryFp64(_Plain):
    """Eight bytes per value: for exactness tests."""

    name, code, dtype = "fp64", 2, "<f8"


class BoundaryBf16(_Plain):
    """The upper half of each fp32, rounded to nearest, ties to even."""

    name, code, dtype = "bf16", 3, "<u2"

    def _payload(self, x: Floats) -> npt.NDArray[Any]:
        codes = np.empty(x.size, np.uint16)
        encode_bf16(np.ascontiguousarray(x, np.float32).reshape(-1), codes)
        return codes

    def _values(self, payload: npt.NDArray[Any]) -> Floats:
        out = np.empty(payload.size, np.float32)
        decode_bf16(np.ascontiguousarray(payload), out)
        return out


class _Scaled:
    """One fp32 scale per token, all scales first, then one byte per value."""

    name: str
    code: int
    levels: np.float32
    magnitude_max: float

    def payload_nbytes(self, tokens: int, width: int) -> int:
        return tokens * (4 + width)

    def encode(self, x: Floats) -> bytes:
        check_values(x)
        rows = np.ascontiguousarray(x, np.float32).reshape(-1, x.shape[-1])
        absmax = np.abs(rows).max(axis=1)
        small = absmax < TINY
        absmax[small] = self.levels
        scales = absmax / self.levels
        inverse = self.levels / absmax
        scales[small] = inverse[small] = 0
        codes = self._codes(rows * inverse[:, None])
        return b"".join((pack_header(self.code, x.shape), scales.tobytes(), codes.tobytes()))

    def check(self, data: Buffer, bounds: Bounds) -> Header:
        header = parse_header(data, bounds, self.code)
        check_payload(data, self.payload_nbytes(header.tokens, header.width))
        scales = np.frombuffer(data, "<f4", header.tokens, HEADER.size)
        # The division is exact, and the comparison is false for NaN.
        bound = np.float32(limits.VALUE_MAGNITUDE_MAX / self.magnitude_max)
        if not bool((np.abs(scales) <= bound).all()):
            raise PeerFault("non_finite", f"{self.name} boundary: a scale is not finite")
        if bool(np.signbit(scales).any()):
            raise PeerFault("malformed", f"{self.name} boundary: negative scale")
        self._check_codes(np.frombuffer(data, np.uint8, offset=HEADER.size + scales.nbytes))
        return header

    def decode(self, data: Buffer, bounds: Bounds) -> F32:
        header = self.check(data, bounds)
        scales = np.frombuffer(data, "<f4", header.tokens, HEADER.size)
        codes = np.frombuffer(data, np.uint8, offset=HEADER.size + scales.nbytes)
        values = self._values(codes).reshape(header.tokens, header.width)
        found: F32 = values * scales[:, None]
        return found.reshape(header.batch, header.time, header.width)

    def _codes(self, scaled: F32) -> U8:
        raise NotImplementedError

    def _values(self, codes: U8) -> F32:
        raise NotImplementedError

    def _check_codes(self, codes: U8) -> None:
        raise NotImplementedError


class BoundaryInt8(_Scaled):
    """round(x / scale) with scale = absmax / 127 of the token, ties to even."""

    name, code, levels, magnitude_max = "int8", 4, INT8_LEVELS, INT8_MAGNITUDE_MAX

    def _codes(self, scaled: F32) -> U8:
        return np.rint(scaled).astype(np.int8).view(np.uint8)

    def _values(self, codes: U8) -> F32:
        return codes.view(np.int8).astype(np.float32)

    def _check_codes(self, codes: U8) -> None:
        """Every byte is a code; a foreign encoder may use -128."""


class BoundaryFp8(_Scaled):
    """x / scale as e4m3, with scale = absmax / 448 of the token, rounded to nearest even."""

    name, code, levels, magnitude_max = "fp8", 5, FP8_LEVELS, 448.0

    def _codes(self, scaled: F32) -> U8:
        return encode_e4m3(scaled)

    def _values(self, codes: U8) -> F32:
        return E4M3[codes]

    def _check_codes(self, codes: U8) -> None:
        if bool(((codes & 0x7F) == 0x7F).any()):
            raise PeerFault("non_finite", "fp8 boundary: a code is not a number")


def encode_e4m3(x: F32) -> U8:
    """Nearest e4m3 codes of values of magnitude below 464, ties to even, denormals kept."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    sign = (bits >> 24) & np.uint32(0x80)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    # Keep 3 of 23 fraction bits; the carry of rounding runs into the exponent, as it should.
    rounded = magnitude + np.uint32(0x7FFFF) + ((magnitude >> 20) & np.uint32(1))
    normal = (rounded >> 20) - np.uint32((127 - 7) << 3)
    # Below 2^-6 codes count units of 2^-9; 8 of them is the first normal code.
    low = np.rint(np.abs(x) * np.float32(512)).astype(np.uint32)
    code = np.where(magnitude < np.float32(2.0**-6).view(np.uint32), low, normal)
    return cast(U8, (code | sign).astype(np.uint8))


def _e4m3_values() -> F32:
    codes = np.arange(256)
    exponent, fraction = (codes >> 3) & 15, (codes & 7).astype(np.float32)
    normal = np.ldexp(np.float32(1) + fraction / np.float32(8), exponent - 7)
    values = np.where(exponent > 0, normal, np.ldexp(fraction, -9)).astype(np.float32)
    values[(codes & 0x7F) == 0x7F] = np.nan
    return np.where(codes & 0x80, -values, values).astype(np.float32)


E4M3 = _e4m3_values()
"""f32[256]: the value of each code."""

_CODECS: dict[str, BoundaryCodec] = {
    codec.name: codec
    for codec in (BoundaryFp32(), BoundaryFp64(), BoundaryBf16(), BoundaryInt8(), BoundaryFp8())
}
BOUNDARY_CODEC_NAMES = (*_CODECS, "subspace")
"""``subspace`` needs a basis and is made by ``codecs.subspace``."""


def get_boundary_codec(name: str) -> BoundaryCodec:
    """The codec of that name, of those that need nothing but their name.

    Raises:
        ConfigError: there is none; the message lists those that exist.
    """
    codec = _CODECS.get(name)
    if codec is None:
        raise ConfigError(
            f"unknown boundary codec {name!r}", "no such codec", f"Use one of: {', '.join(_CODECS)}"
        )
    return codec
