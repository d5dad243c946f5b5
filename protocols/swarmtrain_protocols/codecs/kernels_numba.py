"""The kernels compiled by numba, at memory speed and without the interpreter lock.

Import only through ``kernels.use_numba(True)``. Strict IEEE: no fast-math flag, so LLVM neither
contracts to fused multiply-adds nor reassociates, and each operation rounds to fp32 as in
``kernels_numpy``. Blocks go as slices to small functions, because LLVM vectorises those; the
absmax runs over integer bit patterns, because a float maximum would not vectorise without flags.
Signatures are explicit: one machine-code version each, and nothing compiles in mid-round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

import numba  # type: ignore[import-untyped,unused-ignore]
import numpy as np
import numpy.typing as npt
from numba import types

from swarmtrain_protocols.codecs import kernels_numpy

F32: TypeAlias = npt.NDArray[np.float32]
I8: TypeAlias = npt.NDArray[np.int8]
I32: TypeAlias = npt.NDArray[np.int32]
U16: TypeAlias = npt.NDArray[np.uint16]
F64: TypeAlias = npt.NDArray[np.float64]
Function = TypeVar("Function", bound=Callable[..., Any])

BLOCK = kernels_numpy.BLOCK
LEVELS = kernels_numpy.LEVELS
ROUND = kernels_numpy.ROUND
TINY = kernels_numpy.TINY
MAGNITUDE = np.int32(0x7FFFFFFF)


def _array(dtype: Any, *, readonly: bool = False) -> Any:
    return types.Array(dtype, 1, "C", readonly=readonly)


_F32_IN = _array(types.float32, readonly=True)
_F32 = _array(types.float32)
_I8_IN = _array(types.int8, readonly=True)
_I8 = _array(types.int8)
_I32_IN = _array(types.int32, readonly=True)
_U16_IN = _array(types.uint16, readonly=True)
_U16 = _array(types.uint16)
_F64 = _array(types.float64)
_f32 = types.float32


def _compile(*signature: Any, result: Any = types.void) -> Callable[[Function], Function]:
    def decorate(function: Function) -> Function:
        # NumPy's error model: a division needs no branch, so that its loop is vectorised.
        compiled = numba.njit(
            result(*signature), cache=True, nogil=True, fastmath=False, error_model="numpy"
        )
        return cast(Function, compiled(function))

    return decorate


@_compile(_I32_IN, result=types.int32)
def absmax_bits(bits: I32) -> int:
    """Largest magnitude of i32[n] bit patterns of fp32 values."""
    largest = np.int32(0)
    for i in range(bits.size):
        largest = max(largest, np.int32(bits[i] & MAGNITUDE))
    return largest  # type: ignore[return-value,unused-ignore]


@_compile(_F32_IN, _f32, _I8)
def _quantize(x: F32, inverse: np.float32, codes: I8) -> None:
    for i in range(x.size):
        codes[i] = np.int8(np.int32((x[i] * inverse + ROUND) - ROUND))


@_compile(_F32_IN, _F32, _I8)
def encode_int8(x: F32, scales: F32, codes: I8) -> None:
    """Encode f32[n] into f32[blocks] scales and i8[n] codes; absmax / 127 per block."""
    bits = np.empty(1, np.int32)
    n = x.size
    for b in range(scales.size):
        start = b * BLOCK
        stop = min(start + BLOCK, n)
        block = x[start:stop]
        bits[0] = absmax_bits(block.view(np.int32))
        absmax = bits.view(np.float32)[0]
        if absmax < TINY:
            scales[b] = np.float32(0)
            codes[start:stop] = np.int8(0)
        else:
            scales[b] = absmax / LEVELS
            _quantize(block, LEVELS / absmax, codes[start:stop])


@_compile(_f32, _I8_IN, _F32)
def _scale(scale: np.float32, codes: I8, out: F32) -> None:
    for i in range(codes.size):
        out[i] = scale * np.float32(codes[i])


@_compile(_F32_IN, _I8_IN, _F32)
def decode_int8(scales: F32, codes: I8, out: F32) -> None:
    """out[i] = scale * code."""
    n = out.size
    for b in range(scales.size):
        start = b * BLOCK
        stop = min(start + BLOCK, n)
        _scale(scales[b], codes[start:stop], out[start:stop])


@_compile(_f32, _I8_IN, _f32, _F32)
def _scale_add(scale: np.float32, codes: I8, weight: np.float32, acc: F32) -> None:
    for i in range(codes.size):
        acc[i] = acc[i] + weight * (scale * np.float32(codes[i]))


@_compile(_F32_IN, _I8_IN, _f32, _F32)
def accumulate_int8(scales: F32, codes: I8, weight: np.float32, acc: F32) -> None:
    """acc[i] += weight * (scale * code), three roundings."""
    n = acc.size
    for b in range(scales.size):
        start = b * BLOCK
        stop = min(start + BLOCK, n)
        _scale_add(scales[b], codes[start:stop], weight, acc[start:stop])


@_compile(_F32_IN, _U16)
def encode_bf16(x: F32, out: U16) -> None:
    """Round f32[n] to the nearest bf16, ties to even."""
    bits = x.view(np.uint32)
    for i in range(out.size):
        u = bits[i]
        odd = np.uint32((u >> np.uint32(16)) & np.uint32(1))
        out[i] = np.uint16(np.uint32(u + np.uint32(np.uint32(0x7FFF) + odd)) >> np.uint32(16))


@_compile(_U16_IN, _F32)
def decode_bf16(data: U16, out: F32) -> None:
    """Widen bf16 to f32[n]."""
    bits = out.view(np.uint32)
    for i in range(data.size):
        bits[i] = np.uint32(data[i]) << np.uint32(16)


@_compile(_F32_IN, _f32, _F32)
def accumulate_fp32(data: F32, weight: np.float32, acc: F32) -> None:
    """acc[i] += weight * data[i], two roundings."""
    for i in range(data.size):
        acc[i] = acc[i] + weight * data[i]


@_compile(_U16_IN, _f32, _F32)
def accumulate_bf16(data: U16, weight: np.float32, acc: F32) -> None:
    """acc[i] += weight * widen(data[i]), two roundings."""
    widened = np.empty(BLOCK, np.float32)
    n = acc.size
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        decode_bf16(data[start:stop], widened[: stop - start])
        accumulate_fp32(widened[: stop - start], weight, acc[start:stop])


@_compile(_F32, _F32, _F32_IN, _f32, _f32)
def outer_step(theta: F32, momentum: F32, mean: F32, lr: np.float32, beta: np.float32) -> None:
    """b = beta*b + mean; theta -= lr*(mean + beta*b); see ``outer.outer_step``."""
    for i in range(theta.size):
        b = beta * momentum[i] + mean[i]
        momentum[i] = b
        theta[i] = theta[i] - lr * (mean[i] + beta * b)


@_compile(_F32, _F32_IN, _f32, _f32)
def sgd_step(theta: F32, gradient: F32, scale: np.float32, rate: np.float32) -> None:
    """theta -= rate * (scale * gradient), three roundings; see ``stageopt``."""
    for i in range(theta.size):
        theta[i] = theta[i] - rate * (scale * gradient[i])


@_compile(_F32, _F32, _F32, _F32_IN, _F32_IN)
def adamw_step(theta: F32, m: F32, v: F32, gradient: F32, numbers: F32) -> None:
    """One step of AdamW in place; ``numbers`` as ``stageopt.AdamWNumbers`` orders them."""
    scale, beta1, rest1 = numbers[0], numbers[1], numbers[2]
    beta2, rest2, root2 = numbers[3], numbers[4], numbers[5]
    eps, keep, rate = numbers[6], numbers[7], numbers[8]
    for i in range(theta.size):
        g = scale * gradient[i]
        first = beta1 * m[i] + rest1 * g
        second = beta2 * v[i] + rest2 * (g * g)
        m[i] = first
        v[i] = second
        theta[i] = keep * theta[i] - rate * (first / (np.sqrt(second) / root2 + eps))


@_compile(_F32_IN, _F64)
def add_squares(x: F32, lanes: F64) -> None:
    """lanes[j] += the squares of x[j], x[j + BLOCK], ... in that order, in fp64."""
    n = x.size
    for start in range(0, n, BLOCK):
        block = x[start : min(start + BLOCK, n)]
        for j in range(block.size):
            lanes[j] = lanes[j] + np.float64(block[j]) * np.float64(block[j])
