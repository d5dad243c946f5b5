"""Which kernels run: NumPy until somebody asks for numba, and never silently anything else.

Both compute the same bits. NumPy starts at once and stays small, which is what seeds want; numba
runs at memory speed without the interpreter lock. ``use_numba(True)`` imports numba and compiles
(seconds the first time, then from its cache), so call it from a thread that may wait.
"""

from __future__ import annotations

import importlib
from typing import Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from swarmtrain_protocols.codecs import kernels_numpy

F32: TypeAlias = npt.NDArray[np.float32]
I8: TypeAlias = npt.NDArray[np.int8]
I32: TypeAlias = npt.NDArray[np.int32]
U16: TypeAlias = npt.NDArray[np.uint16]
F64: TypeAlias = npt.NDArray[np.float64]


class Kernels(Protocol):
    """The arithmetic. Arrays are contiguous and aligned; inputs may be read-only."""

    def absmax_bits(self, bits: I32) -> int:
        """Largest magnitude in i32[n] bit patterns of fp32 values; 0 if empty."""

    def encode_int8(self, x: F32, scales: F32, codes: I8) -> None: ...

    def decode_int8(self, scales: F32, codes: I8, out: F32) -> None: ...

    def accumulate_int8(self, scales: F32, codes: I8, weight: np.float32, acc: F32) -> None: ...

    def encode_bf16(self, x: F32, out: U16) -> None: ...

    def decode_bf16(self, data: U16, out: F32) -> None: ...

    def accumulate_bf16(self, data: U16, weight: np.float32, acc: F32) -> None: ...

    def accumulate_fp32(self, data: F32, weight: np.float32, acc: F32) -> None: ...

    def outer_step(
        self, theta: F32, momentum: F32, mean: F32, lr: np.float32, beta: np.float32
    ) -> None: ...

    def sgd_step(self, theta: F32, gradient: F32, scale: np.float32, rate: np.float32) -> None: ...

    def adamw_step(self, theta: F32, m: F32, v: F32, gradient: F32, numbers: F32) -> None: ...

    def add_squares(self, x: F32, lanes: F64) -> None: ...


_active: Kernels = cast(Kernels, kernels_numpy)


def active() -> Kernels:
    """The kernels in use by the whole process."""
    return _active


def use_numba(enabled: bool) -> None:
    """Choose the kernels of this process. Safe at any time: both compute the same bits.

    Raises:
        ImportError: numba is asked for and not installed.
    """
    global _active
    if enabled:
        name = "swarmtrain_protocols.codecs.kernels_numba"
        _active = cast(Kernels, importlib.import_module(name))
    else:
        _active = cast(Kernels, kernels_numpy)


def uses_numba() -> bool:
    """True once ``use_numba(True)`` has returned."""
    return _active is not cast(Kernels, kernels_numpy)
