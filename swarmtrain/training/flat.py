"""The model as flat f32 vectors, in the order that all members of a run agree on.

Order: trainable parameters as the model lists them, tied ones once, grouped by fragment; one
channel ``train/0/<fragment>`` per group. Buffers and frozen parameters stay private.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray

from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import ConfigError

F32 = NDArray[np.float32]
Schema = tuple[tuple[str, tuple[int, ...], str], ...]
"""(name, shape, dtype) of every trainable parameter, in model order."""

_BLOCK = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter and its values ``start … stop-1`` of a channel."""

    name: str
    parameter: torch.Tensor
    start: int
    stop: int


def schema_hash(schema: Schema) -> bytes:
    """BLAKE3 over MessagePack of the list of [name, shape, dtype], 32 bytes."""
    return blake3(msgspec.msgpack.encode([[n, list(s), d] for n, s, d in schema])).digest()


def assign_fragments(sizes: list[tuple[str, int]], fragments: int) -> list[int]:
    """Fragment of each parameter, a pure function of names and sizes.

    The ``l``-th layer (a name up to its first number) goes to fragment ``l mod fragments``, strided
    as in Streaming DiLoCo (arXiv 2501.18512); what is in no layer goes where least is, in order.

    Raises:
        ConfigError: a fragment would be empty.
    """
    out = [-1] * len(sizes)
    filled = [0] * fragments
    layers: dict[str, int] = {}
    for index, (name, size) in enumerate(sizes):
        found = _BLOCK.search(name)
        if found:
            layer = layers.setdefault(name[: found.end(1)], len(layers))
            out[index] = layer % fragments
            filled[out[index]] += size
    for index, (_, size) in enumerate(sizes):
        if out[index] < 0:
            out[index] = filled.index(min(filled))
            filled[out[index]] += size
    if 0 in filled:
        raise ConfigError(
            f"run key fragments = {fragments}",
            f"this model fills only {sum(1 for n in filled if n)} of them",
            "choose fewer fragments",
        )
    return out


class Flat:
    """Moves values between a model's parameters (any device and dtype) and f32 vectors on the CPU.

    Raises:
        ConfigError: nothing to train, sharded parameters, too few layers for ``fragments``.
    """

    def __init__(self, model: torch.nn.Module, fragments: int = 1) -> None:
        found = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if not found:
            raise ConfigError("the model has no trainable parameters", todo="nothing to share")
        if not 1 <= fragments <= limits.CHANNELS_MAX:
            raise ConfigError(f"run key fragments = {fragments}", "out of range")
        for name, p in found:
            if hasattr(p, "placements"):
                raise ConfigError(
                    f"parameter {name} is a DTensor",
                    "sharded parameters are not supported by this version",
                    "train with one rank per site, or join before sharding",
                )
            if not p.is_floating_point() or p.layout != torch.strided or p.numel() == 0:
                raise ConfigError(f"parameter {name}", f"{p.dtype} {p.layout} {tuple(p.shape)}")
        self.schema: Schema = tuple(
            (name, tuple(p.shape), str(p.dtype).removeprefix("torch.")) for name, p in found
        )
        self.schema_hash = schema_hash(self.schema)
        chosen = assign_fragments([(name, p.numel()) for name, p in found], fragments)
        self._places: dict[str, tuple[Place, ...]] = {}
        for fragment in range(fragments):
            group = [item for item, f in zip(found, chosen, strict=True) if f == fragment]
            self._places[f"train/0/{fragment}"] = tuple(_places(group))
        self._pinned: dict[str, torch.Tensor] = {}

    @property
    def layout(self) -> list[tuple[str, int]]:
        """(channel, number of values), in channel order."""
        return [(name, places[-1].stop) for name, places in self._places.items()]

    @property
    def channels(self) -> tuple[str, ...]:
        return tuple(self._places)

    def places(self, channel: str) -> tuple[Place, ...]:
        """The parameters of a channel and where they lie in it."""
        return self._places[channel]

    def values(self, channel: str) -> int:
        """Number of values of a channel."""
        return self._places[channel][-1].stop

    def exact(self, channel: str) -> bool:
        """Whether the model holds f32, so that what is written is what is read."""
        return all(p.parameter.dtype == torch.float32 for p in self._places[channel])

    @torch.no_grad()
    def read(self, channel: str, out: F32) -> None:
        """Copy the parameters of a channel into ``out`` (f32[n])."""
        target = self._staging(channel)
        into = torch.from_numpy(out) if target is None else target
        for place in self._places[channel]:
            piece = into[place.start : place.stop].view(place.parameter.shape)
            piece.copy_(place.parameter, non_blocking=target is not None)
        if target is not None:
            torch.cuda.current_stream(self._device(channel)).synchronize()
            np.copyto(out, target.numpy())

    @torch.no_grad()
    def write(self, channel: str, values: F32) -> None:
        """Copy ``values`` (f32[n]) into the parameters of a channel, rounding to their dtype."""
        source = self._staging(channel)
        if source is None:
            origin = torch.from_numpy(values)
        else:
            np.copyto(source.numpy(), values)
            origin = source
        for place in self._places[channel]:
            piece = origin[place.start : place.stop].view(place.parameter.shape)
            place.parameter.copy_(piece, non_blocking=source is not None)
        if source is not None:
            # The staging buffer is used again; the copies must have left it.
            torch.cuda.current_stream(self._device(channel)).synchronize()

    def state_dict(self, vectors: dict[str, F32]) -> dict[str, torch.Tensor]:
        """Fresh CPU f32 tensors by parameter name, in model order, from one vector per channel."""
        found = {
            place.name: torch.from_numpy(vectors[channel][place.start : place.stop].copy()).view(
                place.parameter.shape
            )
            for channel, places in self._places.items()
            for place in places
        }
        return {name: found[name] for name, _, _ in self.schema}

    def _device(self, channel: str) -> torch.device:
        return self._places[channel][0].parameter.device

    def _staging(self, channel: str) -> torch.Tensor | None:
        """A pinned buffer for a model on a CUDA device: one for all copies, no synchronous ones."""
        if self._device(channel).type != "cuda":
            return None
        found = self._pinned.get(channel)
        if found is None:
            found = torch.empty(self.values(channel), dtype=torch.float32, pin_memory=True)
            self._pinned[channel] = found
        return found


def _places(group: list[tuple[str, torch.nn.Parameter]]) -> Iterator[Place]:
    start = 0
    for name, parameter in group:
        yield Place(name, parameter, start, start + parameter.numel())
        start += parameter.numel()
