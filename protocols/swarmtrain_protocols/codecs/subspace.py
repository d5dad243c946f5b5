"""Boundaries of k numbers per token for models whose blocks write into one subspace (spec 06 §1.2).

Subspace networks (arXiv 2506.01260), with a fixed basis: every output projection, and the trainable
embedding, is kept in span(U) of an orthonormal U f32[width, rank]. An activation is then the fixed
embedding of its token plus U·c, so (token, c) says all, and its gradient matters only as Uᵀg.
Basis and fixed embedding follow from the run's seed, bit for bit on every machine.

A trainer computes with the projection of the weights that it is given, and projects their gradient:
θ itself needs no treatment after a step, and its part outside the span never matters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from swarmtrain_protocols import limits
from swarmtrain_protocols.codecs.base import F32
from swarmtrain_protocols.codecs.boundary import (
    HEADER,
    I32,
    Bounds,
    Buffer,
    Floats,
    Header,
    check_payload,
    check_values,
    pack_header,
    parse_header,
)
from swarmtrain_protocols.errors import ConfigError, LocalProtocolError, PeerFault

ACTIVATION = 6
GRADIENT = 7
EMBEDDING_STD = 0.02
Kinds = Literal["rows", "columns"] | None
_SEED_BASIS = 1
_SEED_EMBEDDING = 2


def basis(seed: int, width: int, rank: int) -> F32:
    """Orthonormal f32[width, rank]: Gram-Schmidt, twice, with exactly rounded sums.

    Raises:
        ConfigError: a rank that is not between 1 and width.
    """
    if not 1 <= rank <= width:
        raise ConfigError(f"boundary rank {rank}", f"the model is {width} wide", "choose 1 … width")
    drawn = _uniform(seed, _SEED_BASIS, rank * width).reshape(rank, width)
    vectors: list[npt.NDArray[np.float64]] = []
    for row in drawn:
        for _ in range(2):
            for other in vectors:
                row = row - math.fsum(row * other) * other
        vectors.append(row / math.sqrt(math.fsum(row * row)))
    return np.stack(vectors, axis=1).astype(np.float32)


def fixed_embedding(seed: int, vocabulary: int, width: int) -> F32:
    """f32[vocabulary, width] that is never trained: uniform with standard deviation 0.02."""
    spread = EMBEDDING_STD * math.sqrt(3)
    values = _uniform(seed, _SEED_EMBEDDING, vocabulary * width) * spread
    return values.astype(np.float32).reshape(vocabulary, width)


def _uniform(seed: int, stream: int, n: int) -> npt.NDArray[np.float64]:
    """f64[n] in [-1, 1) from integers alone."""
    words = np.random.Philox(key=np.array([seed, stream << 32], np.uint64)).random_raw(n)
    return (words >> np.uint64(12)).astype(np.float64) * 2.0**-51 - 1.0


class Subspace:
    """Basis f32[width, rank] and fixed embedding f32[vocabulary, width] of a run."""

    name = "subspace"

    def __init__(self, seed: int, width: int, rank: int, vocabulary: int) -> None:
        self.basis = basis(seed, width, rank)
        self.embedding = fixed_embedding(seed, vocabulary, width)
        self.width, self.rank, self.vocabulary = width, rank, vocabulary

    def encode_activation(self, x: Floats, tokens: I32) -> bytes:
        """x [batch, time, width] whose tokens are i32 [batch, time]."""
        check_values(x)
        if tokens.shape != x.shape[:2] or x.shape[2] != self.width:
            raise LocalProtocolError(f"activation {x.shape} of tokens {tokens.shape}")
        coefficients = (x - self.embedding[tokens]).astype(np.float32) @ self.basis
        return self.pack(coefficients, tokens)

    def encode_gradient(self, g: Floats) -> bytes:
        """g [batch, time, width]; only its part in the subspace arrives."""
        check_values(g)
        return self.pack(g.astype(np.float32) @ self.basis, None)

    def pack(self, coefficients: F32, tokens: I32 | None) -> bytes:
        """Header, then token ids (activations only), then f32 [batch, time, rank]."""
        code = GRADIENT if tokens is None else ACTIVATION
        ids = b"" if tokens is None else np.ascontiguousarray(tokens, np.int32).tobytes()
        values = np.ascontiguousarray(coefficients, np.float32).tobytes()
        return pack_header(code, coefficients.shape) + ids + values

    def unpack(self, data: Buffer, bounds: Bounds, *, gradient: bool) -> tuple[F32, I32 | None]:
        """(coefficients f32 [batch, time, rank], token ids), views of ``data``.

        Args:
            bounds: as for every boundary; their width is the model's.

        Raises:
            PeerFault: ``malformed``, ``oversize`` or ``non_finite``.
        """
        inner = Bounds(bounds.batch_max, bounds.time_max, self.rank)
        header = parse_header(data, inner, GRADIENT if gradient else ACTIVATION)
        ids_nbytes = 0 if gradient else 4 * header.tokens
        check_payload(data, ids_nbytes + 4 * header.tokens * self.rank)
        values = np.frombuffer(data, "<f4", offset=HEADER.size + ids_nbytes)
        if not float(np.abs(values).max()) <= limits.VALUE_MAGNITUDE_MAX / self.rank:
            raise PeerFault("non_finite", "subspace boundary: NaN, infinite or too large")
        shape = (header.batch, header.time)
        tokens = None if gradient else self._tokens(data, header).reshape(shape)
        return values.reshape(*shape, self.rank), tokens

    def _tokens(self, data: Buffer, header: Header) -> I32:
        ids = np.frombuffer(data, "<i4", header.tokens, HEADER.size)
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocabulary:
            raise PeerFault("malformed", f"a token id outside 0 … {self.vocabulary - 1}")
        return ids

    def decode_activation(self, data: Buffer, bounds: Bounds) -> tuple[F32, I32]:
        """(x f32 [batch, time, width], token ids i32 [batch, time]). Raises as ``unpack``."""
        values, tokens = self.unpack(data, bounds, gradient=False)
        assert tokens is not None
        found: F32 = values @ self.basis.T + self.embedding[tokens]
        return found, tokens

    def decode_gradient(self, data: Buffer, bounds: Bounds) -> F32:
        """g f32 [batch, time, width]. Raises as ``unpack``."""
        values, _ = self.unpack(data, bounds, gradient=True)
        found: F32 = values @ self.basis.T
        return found

    def kind(self, name: str, shape: tuple[int, ...]) -> Kinds:
        """How a tensor writes to the residual stream: ``rows`` (output projections, [width, …]),
        ``columns`` (embeddings, [count, width]), or not at all.

        Raises:
            ConfigError: it writes by its name but does not have the stream's width.
        """
        kind: Kinds = None
        if name.endswith((".out.weight", ".down.weight")):
            kind = "rows"
        elif name.startswith("embed."):
            kind = "columns"
        if kind is not None and shape[0 if kind == "rows" else -1] != self.width:
            raise ConfigError(f"tensor {name} of shape {shape}", f"the model is {self.width} wide")
        return kind

    def constrain(self, theta: F32, layout: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        """Project f32[n] of one stage into the subspace, in place, bit for bit everywhere."""
        start = 0
        for name, shape in layout:
            stop = start + math.prod(shape)
            kind = self.kind(name, shape)
            if kind == "rows":
                project(self.basis, theta[start:stop].reshape(self.width, -1))
            elif kind == "columns":
                project(self.basis, theta[start:stop].reshape(-1, self.width).T)
            start = stop
        assert start == theta.size, "the layout is not this vector's"


def project(u: F32, w: F32) -> None:
    """``w ← u (uᵀ w)`` in place for u f32[d, k], w f32[d, n], summed in the order of rows.

    No BLAS: its order of summation differs from machine to machine.
    """
    coefficients = np.zeros((u.shape[1], w.shape[1]), np.float32)
    for row in range(u.shape[0]):
        coefficients += u[row, :, None] * w[row, None, :]
    for row in range(u.shape[0]):
        total = np.zeros(w.shape[1], np.float32)
        for column in range(u.shape[1]):
            total += u[row, column] * coefficients[column]
        w[row] = total
