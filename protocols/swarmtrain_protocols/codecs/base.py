"""What a codec is, and the checks that all codecs share.

A codec turns a chunk of ``n`` fp32 values into ``encoded_nbytes(n)`` bytes and back. Lengths follow
from ``n`` alone, so a receiver allocates before it asks. Spec: ``protocols/spec/06-codecs.md``.
"""

from __future__ import annotations

import sys
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from swarmtrain_protocols import limits
from swarmtrain_protocols.codecs import kernels
from swarmtrain_protocols.errors import LocalProtocolError, PeerFault

F32: TypeAlias = npt.NDArray[np.float32]
U8: TypeAlias = npt.NDArray[np.uint8]
Buffer: TypeAlias = "bytes | bytearray | memoryview | U8"

# The wire is little-endian and the kernels read it in place.
assert sys.byteorder == "little", "swarmtrain needs a little-endian machine"


class Codec(Protocol):
    """Stateless; one shared instance per name. Safe to call from several threads."""

    @property
    def name(self) -> str:
        """Name in manifests and log entries, for example ``int8``."""

    def encoded_nbytes(self, n: int) -> int:
        """Bytes of ``n`` encoded values."""

    def encode(self, x: F32, out: memoryview | bytearray | U8) -> None:
        """Encode f32[n], finite, into ``out`` of exactly ``encoded_nbytes(n)`` bytes."""

    def decode(self, data: Buffer, out: F32) -> None:
        """Decode into f32[n]; ``data`` has passed ``check``."""

    def decode_accumulate(self, data: Buffer, weight: np.float32, acc: F32) -> None:
        """``acc += weight * decode(data)``, each operation rounded to fp32; acc is f32[n]."""

    def check(
        self, data: Buffer, n: int, magnitude_max: float = limits.VALUE_MAGNITUDE_MAX
    ) -> None:
        """Refuse bytes that are not ``n`` encoded values of magnitude at most ``magnitude_max``.

        Results are sums: check them against ``limits.RESULT_MAGNITUDE_MAX``.

        Raises:
            PeerFault: ``malformed`` (length, negative scale) or ``non_finite`` (NaN, infinity, or
                a value so large that sums or the outer step could overflow).
        """


def check_finite(x: F32) -> None:
    """Refuse a local vector f32[n] that must not be sent.

    The bound is half of what ``Codec.check`` accepts, so that no rounding of a codec crosses it.

    Raises:
        LocalProtocolError: it holds NaN, infinity or a magnitude above
            ``limits.VALUE_MAGNITUDE_MAX / 2``.
    """
    magnitude_max = limits.VALUE_MAGNITUDE_MAX / 2
    if magnitude_bits(x) > magnitude_bits_of(magnitude_max):
        raise LocalProtocolError(
            "non-finite values",
            f"the vector holds NaN, infinity or a magnitude above {magnitude_max:.3g}",
            "Look at the loss and the gradients of this trainer.",
        )


def check_ieee_arithmetic() -> None:
    """Refuse a thread that flushes denormals to zero, because its sums would differ from others'.

    Some libraries switch that on for a whole thread, and threads inherit it.

    Raises:
        LocalProtocolError: denormals are flushed here.
    """
    smallest_normal = np.array([2.0**-126], np.float32)
    if (smallest_normal * np.float32(0.5))[0] == 0:
        raise LocalProtocolError(
            "denormals are flushed to zero in this thread",
            "results would not be bit-identical on all peers",
            "Do not call torch.set_flush_denormal(True) before starting a peer.",
        )


def magnitude_bits(x: F32) -> int:
    """Largest magnitude of f32[n] as the integer of its bit pattern; NaN sorts above infinity."""
    return int(kernels.active().absmax_bits(x.view(np.int32)))


def magnitude_bits_of(value: float) -> int:
    """Bit pattern of a non-negative value as fp32."""
    return int(np.array([value], np.float32).view(np.int32)[0])


def check_length(data: Buffer, nbytes: int) -> None:
    """Raise PeerFault ``malformed`` unless ``data`` has exactly ``nbytes`` bytes."""
    have = np.frombuffer(data, np.uint8).nbytes
    if have != nbytes:
        raise PeerFault("malformed", f"encoded chunk of {have} bytes, expected {nbytes}")


def view_of(data: Buffer, dtype: str, start: int, count: int) -> npt.NDArray[np.generic]:
    """View ``count`` items of ``dtype`` at byte ``start``; a copy only if memory is unaligned."""
    found = np.frombuffer(data, dtype=dtype, offset=start, count=count)
    return found if found.flags.aligned else found.copy()
