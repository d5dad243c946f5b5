"""Boundary codecs on the device that computes: the arithmetic of ``codecs.boundary`` in torch.

Codes are made and read where the tensor is, so that only encoded bytes cross to the host. What a
peer sent is checked by the NumPy oracle first, before anything is allocated for it.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from swarmtrain_protocols.codecs.boundary import (
    FP8_LEVELS,
    HEADER,
    INT8_LEVELS,
    Bounds,
    Buffer,
    Header,
    get_boundary_codec,
    pack_header,
)
from swarmtrain_protocols.codecs.boundary import (
    BoundaryCodec as Oracle,
)
from swarmtrain_protocols.codecs.kernels_numpy import TINY
from swarmtrain_protocols.codecs.subspace import Subspace
from swarmtrain_protocols.errors import ConfigError

_STORED = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
_SCALED = {"int8": float(INT8_LEVELS), "fp8": float(FP8_LEVELS)}


class BoundaryCodec(Protocol):
    """What passes between two stages. Tensors have the runtime's device and type.

    Token ids (int64 [batch, time]) go in and come out where a codec needs them; others give None.
    """

    @property
    def name(self) -> str:
        """Name in the run key ``boundary_codec``."""

    @property
    def nbytes_max(self) -> int:
        """Bytes of the largest activation within the bounds."""

    def encode_activation(self, x: Tensor, tokens: Tensor | None) -> bytes:
        """x: finite, [batch, time, width]."""

    def decode_activation(self, data: Buffer) -> tuple[Tensor, Tensor | None]:
        """Raises PeerFault: ``malformed``, ``oversize`` or ``non_finite``."""

    def encode_gradient(self, g: Tensor) -> bytes:
        """g: finite, [batch, time, width]."""

    def decode_gradient(self, data: Buffer) -> Tensor:
        """Raises PeerFault: ``malformed``, ``oversize`` or ``non_finite``."""

    def fixed(self, tokens: Tensor) -> Tensor | None:
        """What the embedding adds to its output and never trains, or None."""


def device_codec(
    name: str,
    bounds: Bounds,
    device: torch.device,
    dtype: torch.dtype,
    subspace: Subspace | None = None,
) -> BoundaryCodec:
    """The codec of that name for tensors of this device and type.

    Raises:
        ConfigError: there is none, or ``subspace`` without a basis.
    """
    if name != "subspace":
        return PlainBoundary(get_boundary_codec(name), bounds, device, dtype)
    if subspace is None:
        raise ConfigError("boundary codec subspace", "no basis was given")
    return SubspaceBoundary(subspace, bounds, device, dtype)


def _host(x: Tensor) -> bytes:
    """The bytes of a tensor in row-major order."""
    return x.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def _load(data: Buffer, device: torch.device) -> Tensor:
    """u8[n] on the device; a copy, because received bytes may be read-only."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)


class PlainBoundary:
    """fp32, fp64, bf16, int8 and fp8: values as they are, or scaled per token."""

    def __init__(
        self, oracle: Oracle, bounds: Bounds, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.oracle, self.bounds = oracle, bounds
        self.device, self.dtype = device, dtype

    @property
    def name(self) -> str:
        return self.oracle.name

    @property
    def nbytes_max(self) -> int:
        bounds = self.bounds
        rows = bounds.batch_max * bounds.time_max
        return HEADER.size + self.oracle.payload_nbytes(rows, bounds.width)

    def encode_activation(self, x: Tensor, tokens: Tensor | None) -> bytes:
        """x: finite, [batch, time, width]; ``tokens`` is not needed."""
        return self.encode_gradient(x)

    def decode_activation(self, data: Buffer) -> tuple[Tensor, Tensor | None]:
        """Raises PeerFault: ``malformed``, ``oversize`` or ``non_finite``."""
        return self.decode_gradient(data), None

    def encode_gradient(self, g: Tensor) -> bytes:
        """g: finite, [batch, time, width]."""
        head = pack_header(self.oracle.code, tuple(g.shape))
        stored = _STORED.get(self.name)
        if stored is not None:
            # A double rounds to fp32 before bf16, as in the oracle.
            narrow = g.float() if stored == torch.bfloat16 else g
            return head + _host(narrow.to(stored))
        rows = g.float().reshape(-1, g.shape[-1])
        levels = _SCALED[self.name]
        absmax = rows.abs().amax(dim=1)
        small = absmax < float(TINY)
        absmax = absmax.masked_fill(small, levels)
        scales = (absmax / levels).masked_fill(small, 0.0)
        inverse = (levels / absmax).masked_fill(small, 0.0)
        scaled = rows * inverse[:, None]
        if self.name == "int8":
            codes = scaled.round().to(torch.int8)
        else:
            codes = scaled.to(torch.float8_e4m3fn)
        return head + _host(scales) + _host(codes)

    def decode_gradient(self, data: Buffer) -> Tensor:
        """Raises PeerFault: ``malformed``, ``oversize`` or ``non_finite``."""
        header = self.oracle.check(data, self.bounds)
        payload = _load(memoryview(data).cast("B")[HEADER.size :], self.device)
        stored = _STORED.get(self.name)
        values = payload.view(stored) if stored is not None else self._scaled(header, payload)
        return values.to(self.dtype).view(header.batch, header.time, header.width)

    def _scaled(self, header: Header, payload: Tensor) -> Tensor:
        scales = payload[: 4 * header.tokens].view(torch.float32)
        kind = torch.int8 if self.name == "int8" else torch.float8_e4m3fn
        codes = payload[4 * header.tokens :].view(kind).float()
        return codes.view(header.tokens, header.width) * scales[:, None]

    def fixed(self, tokens: Tensor) -> Tensor | None:
        """Nothing is added to the embedding."""
        return None


class SubspaceBoundary:
    """Coefficients in the basis of ``codecs.subspace``, with the token ids of activations."""

    def __init__(
        self, subspace: Subspace, bounds: Bounds, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.subspace, self.bounds = subspace, bounds
        self.device, self.dtype = device, dtype
        self._basis = torch.from_numpy(subspace.basis).to(device, dtype)
        self._embedding = torch.from_numpy(subspace.embedding).to(device, dtype)

    @property
    def name(self) -> str:
        return self.subspace.name

    @property
    def nbytes_max(self) -> int:
        return HEADER.size + self.bounds.batch_max * self.bounds.time_max * 4 * (
            1 + self.subspace.rank
        )

    def encode_activation(self, x: Tensor, tokens: Tensor | None) -> bytes:
        """x: finite, [batch, time, width]; ``tokens``: int64 [batch, time]."""
        assert tokens is not None, "activations in a subspace travel with their tokens"
        coefficients = (x - self._embedding[tokens]) @ self._basis
        ids = tokens.to(torch.int32).cpu().numpy()
        return self.subspace.pack(coefficients.float().cpu().numpy(), ids)

    def decode_activation(self, data: Buffer) -> tuple[Tensor, Tensor | None]:
        """Raises PeerFault: ``malformed``, ``oversize`` or ``non_finite``."""
        values, ids = self.subspace.unpack(data, self.bounds, gradient=False)
        assert ids is not None
        tokens = torch.from_numpy(ids.astype(np.int64)).to(self.device)
        return self._expanded(values) + self._embedding[tokens], tokens

    def encode_gradient(self, g: Tensor) -> bytes:
        """g: finite, [batch, time, width]; only its part in the subspace arrives."""
        return self.subspace.pack((g @ self._basis).float().cpu().numpy(), None)

    def decode_gradient(self, data: Buffer) -> Tensor:
        """Raises PeerFault: ``malformed``, ``oversize`` or ``non_finite``."""
        values, _ = self.subspace.unpack(data, self.bounds, gradient=True)
        return self._expanded(values)

    def _expanded(self, values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Tensor:
        return torch.from_numpy(values.copy()).to(self.device, self.dtype) @ self._basis.T

    def fixed(self, tokens: Tensor) -> Tensor | None:
        """The fixed embedding of int64 [batch, time]: [batch, time, width]."""
        return self._embedding[tokens]
