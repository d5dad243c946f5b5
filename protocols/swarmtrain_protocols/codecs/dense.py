"""Codecs without blocks: fp32 as it is, bf16 rounded to nearest even."""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt

from swarmtrain_protocols import limits
from swarmtrain_protocols.codecs import kernels
from swarmtrain_protocols.codecs.base import (
    F32,
    U8,
    Buffer,
    check_length,
    magnitude_bits,
    magnitude_bits_of,
    view_of,
)
from swarmtrain_protocols.errors import PeerFault


class Fp32:
    """Four bytes per value, lossless."""

    name = "fp32"

    def encoded_nbytes(self, n: int) -> int:
        return 4 * n

    def encode(self, x: F32, out: memoryview | bytearray | U8) -> None:
        np.frombuffer(out, np.uint8)[:] = x.view(np.uint8)

    def decode(self, data: Buffer, out: F32) -> None:
        out.view(np.uint8)[:] = np.frombuffer(data, np.uint8)

    def decode_accumulate(self, data: Buffer, weight: np.float32, acc: F32) -> None:
        values = cast(F32, view_of(data, "<f4", 0, acc.size))
        kernels.active().accumulate_fp32(values, np.float32(weight), acc)

    def check(
        self, data: Buffer, n: int, magnitude_max: float = limits.VALUE_MAGNITUDE_MAX
    ) -> None:
        check_length(data, self.encoded_nbytes(n))
        values = cast(F32, view_of(data, "<f4", 0, n))
        if magnitude_bits(values) > magnitude_bits_of(magnitude_max):
            raise PeerFault("non_finite", f"fp32 value is NaN, infinite or above {magnitude_max:g}")


class Bf16:
    """The upper half of each fp32, rounded to nearest even: two bytes per value."""

    name = "bf16"

    def encoded_nbytes(self, n: int) -> int:
        return 2 * n

    def encode(self, x: F32, out: memoryview | bytearray | U8) -> None:
        target = np.frombuffer(out, "<u2")
        if target.flags.aligned:
            kernels.active().encode_bf16(x, target)
            return
        encoded = np.empty(x.size, np.uint16)
        kernels.active().encode_bf16(x, encoded)
        target[:] = encoded

    def decode(self, data: Buffer, out: F32) -> None:
        kernels.active().decode_bf16(self._codes(data, out.size), out)

    def decode_accumulate(self, data: Buffer, weight: np.float32, acc: F32) -> None:
        codes = self._codes(data, acc.size)
        kernels.active().accumulate_bf16(codes, np.float32(weight), acc)

    def check(
        self, data: Buffer, n: int, magnitude_max: float = limits.VALUE_MAGNITUDE_MAX
    ) -> None:
        check_length(data, self.encoded_nbytes(n))
        magnitudes = self._codes(data, n) & np.uint16(0x7FFF)
        largest = int(magnitudes.max()) if n else 0
        if largest << 16 > magnitude_bits_of(magnitude_max):
            raise PeerFault("non_finite", f"bf16 value is NaN, infinite or above {magnitude_max:g}")

    def _codes(self, data: Buffer, n: int) -> npt.NDArray[np.uint16]:
        return cast("npt.NDArray[np.uint16]", view_of(data, "<u2", 0, n))
