"""The requests a driver sends, and what they say about the step they belong to."""

from __future__ import annotations

from dataclasses import dataclass

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Effect
from swarmtrain_protocols.messages.pipeline import EMPTY, HopId, HopRequest, Tensor
from swarmtrain_protocols.pipeline.effects import ServeTensor
from swarmtrain_protocols.pipeline.hops import ENDS, stage_of
from swarmtrain_protocols.pipeline.microbatch import MicroBatch


@dataclass(frozen=True, slots=True)
class View:
    """What the log says about the step in progress. Anything older is void."""

    generation: int
    step: int
    era: int
    skip: int = 0
    """The hop that some micro-batches leave out (``paths``), 0: none."""


def hop_request(
    view: View,
    version: int,
    identity: HopId,
    batch: MicroBatch,
    stages: int,
    out: list[Effect],
) -> HopRequest:
    """The request ``identity`` with the tensors it was always sent with."""
    hop, backward = identity.hop, identity.backward
    ends = stage_of(hop, stages) == ENDS
    tokens = batch.tokens if ends and batch.tokens is not None else b""
    gradient = batch.gradients[hop] if backward else EMPTY
    inputs, gradient = _fitting(view.step, batch.inputs[hop], gradient, len(tokens), out)
    return HopRequest(
        identity,
        "backward" if backward else "forward",
        version,
        view.era,
        batch.path,
        inputs,
        gradient,
        tokens,
    )


def _fitting(
    step: int, inputs: Tensor, gradient: Tensor, nbytes: int, out: list[Effect]
) -> tuple[Tensor, Tensor]:
    """Tensors that do not fit in one message beside each other go by their roots."""
    room = limits.HOP_INLINE_BYTES_MAX - nbytes
    if gradient.data and len(inputs.data) + len(gradient.data) > room:
        out.append(ServeTensor(step, gradient))
        gradient = Tensor(gradient.root, gradient.nbytes)
    if inputs.data and len(inputs.data) + len(gradient.data) > room:
        out.append(ServeTensor(step, inputs))
        inputs = Tensor(inputs.root, inputs.nbytes)
    return inputs, gradient
