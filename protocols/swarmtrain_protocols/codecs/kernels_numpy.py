"""The kernels in NumPy: oracle of the compiled ones, and what small processes run.

Every line is one fp32 operation, so what is rounded when can be read off. Long vectors go through
in slices: temporaries stay in cache, and memory stays small.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from swarmtrain_protocols import limits

F32: TypeAlias = npt.NDArray[np.float32]
I8: TypeAlias = npt.NDArray[np.int8]
I32: TypeAlias = npt.NDArray[np.int32]
U16: TypeAlias = npt.NDArray[np.uint16]
F64: TypeAlias = npt.NDArray[np.float64]

BLOCK = limits.BLOCK_VALUES
SLICE = 128 * BLOCK
LEVELS = np.float32(127.0)
# Adding and subtracting 1.5 * 2**23 rounds a small fp32 to the nearest integer, ties to even.
ROUND = np.float32(12582912.0)
# Blocks below this encode as zeros: 127 / absmax must stay finite and the scale normal.
TINY = np.float32(2.0**-100)


def _slices(n: int, step: int = SLICE) -> Iterator[slice]:
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def absmax_bits(bits: I32) -> int:
    """Largest magnitude of i32[n] bit patterns of fp32 values."""
    largest = 0
    for part in _slices(bits.size):
        largest = max(largest, int((bits[part] & np.int32(0x7FFFFFFF)).max()))
    return largest


def _encode_blocks(x: F32, scales: F32, codes: I8) -> None:
    """x f32[blocks, width], scales f32[blocks], codes i8[blocks, width]."""
    absmax = np.abs(x).max(axis=1)
    small = absmax < TINY
    absmax[small] = LEVELS
    np.divide(absmax, LEVELS, out=scales)
    scales[small] = 0
    inverse = LEVELS / absmax
    inverse[small] = 0
    scaled = x * inverse[:, None]
    scaled += ROUND
    scaled -= ROUND
    codes[...] = scaled


def encode_int8(x: F32, scales: F32, codes: I8) -> None:
    """Encode f32[n] into f32[blocks] scales and i8[n] codes; absmax / 127 per block."""
    full = x.size - x.size % BLOCK
    for part in _slices(full):
        blocks = slice(part.start // BLOCK, part.stop // BLOCK)
        _encode_blocks(x[part].reshape(-1, BLOCK), scales[blocks], codes[part].reshape(-1, BLOCK))
    if full < x.size:
        tail = slice(full, x.size)
        _encode_blocks(x[None, tail], scales[full // BLOCK :], codes[None, tail])


def _scaled(scales: F32, codes: I8, part: slice) -> F32:
    """scale * code of a slice that starts at a block, f32[stop - start]."""
    values = codes[part].astype(np.float32)
    blocks = scales[part.start // BLOCK : -(-part.stop // BLOCK)]
    full = values.size - values.size % BLOCK
    values[:full].reshape(-1, BLOCK)[...] *= blocks[: full // BLOCK, None]
    if full < values.size:
        values[full:] *= blocks[-1]
    return values


def decode_int8(scales: F32, codes: I8, out: F32) -> None:
    """out[i] = scale * code."""
    for part in _slices(out.size):
        out[part] = _scaled(scales, codes, part)


def accumulate_int8(scales: F32, codes: I8, weight: np.float32, acc: F32) -> None:
    """acc[i] += weight * (scale * code), three roundings."""
    for part in _slices(acc.size):
        values = _scaled(scales, codes, part)
        values *= weight
        acc[part] += values


def encode_bf16(x: F32, out: U16) -> None:
    """Round f32[n] to the nearest bf16, ties to even."""
    for part in _slices(x.size):
        bits = x[part].view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        out[part] = (bits + (np.uint32(0x7FFF) + odd)) >> np.uint32(16)


def _widened(data: U16) -> F32:
    widened: F32 = (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return widened


def decode_bf16(data: U16, out: F32) -> None:
    """Widen bf16 to f32[n]."""
    for part in _slices(out.size):
        out[part] = _widened(data[part])


def accumulate_bf16(data: U16, weight: np.float32, acc: F32) -> None:
    """acc[i] += weight * widen(data[i]), two roundings."""
    for part in _slices(acc.size):
        acc[part] += weight * _widened(data[part])


def accumulate_fp32(data: F32, weight: np.float32, acc: F32) -> None:
    """acc[i] += weight * data[i], two roundings."""
    for part in _slices(acc.size):
        acc[part] += weight * data[part]


def outer_step(theta: F32, momentum: F32, mean: F32, lr: np.float32, beta: np.float32) -> None:
    """b = beta*b + mean; theta -= lr*(mean + beta*b); see ``outer.outer_step``."""
    for part in _slices(theta.size):
        b = momentum[part]
        b *= beta
        b += mean[part]
        step = beta * b
        step += mean[part]
        step *= lr
        theta[part] -= step


def sgd_step(theta: F32, gradient: F32, scale: np.float32, rate: np.float32) -> None:
    """theta -= rate * (scale * gradient), three roundings; see ``stageopt``."""
    for part in _slices(theta.size):
        step = scale * gradient[part]
        step *= rate
        theta[part] -= step


def adamw_step(theta: F32, m: F32, v: F32, gradient: F32, numbers: F32) -> None:
    """One step of AdamW in place; ``numbers`` as ``stageopt.AdamWNumbers`` orders them."""
    scale, beta1, rest1, beta2, rest2, root2, eps, keep, rate = numbers
    for part in _slices(theta.size):
        g = scale * gradient[part]
        first, second, values = m[part], v[part], theta[part]
        first *= beta1
        first += rest1 * g
        g *= g
        g *= rest2
        second *= beta2
        second += g
        below = np.sqrt(second)
        below /= root2
        below += eps
        step = first / below
        step *= rate
        values *= keep
        values -= step


def add_squares(x: F32, lanes: F64) -> None:
    """lanes[j] += the squares of x[j], x[j + BLOCK], ... in that order, in fp64."""
    for part in _slices(x.size):
        squares = x[part].astype(np.float64)
        squares *= squares
        for start in range(0, squares.size, BLOCK):
            block = squares[start : start + BLOCK]
            lanes[: block.size] += block
