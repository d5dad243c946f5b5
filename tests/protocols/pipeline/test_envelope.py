"""What stands in a request, and that no message exceeds its room."""

from __future__ import annotations

import pytest

from swarmtrain_protocols import limits, messages
from swarmtrain_protocols.core import Effect
from swarmtrain_protocols.messages.pipeline import EMPTY, HopId, Tensor
from swarmtrain_protocols.pipeline.effects import ServeTensor
from swarmtrain_protocols.pipeline.envelope import View, hop_request
from swarmtrain_protocols.pipeline.microbatch import MicroBatch

VIEW = View(2, 9, 4)


def batch(inputs: int, gradient: int, tokens: int) -> MicroBatch:
    made = MicroBatch(5, (0, 1, 2), tokens=bytes(tokens))
    for hop in (1, 2):
        made.inputs[hop] = Tensor(b"i" * 32, inputs, bytes(inputs))
    made.gradients[1] = Tensor(b"g" * 32, gradient, bytes(gradient))
    return made


def test_the_request_names_step_version_and_era() -> None:
    out: list[Effect] = []
    made = hop_request(VIEW, 9, HopId(2, 9, 5, 1, True, 3), batch(10, 20, 30), 1, out)
    assert (made.version, made.stage_generation, made.path, made.kind) == (
        9,
        4,
        (0, 1, 2),
        "backward",
    )
    assert (len(made.inputs.data), len(made.gradient.data), made.tokens) == (10, 20, b"")
    head = hop_request(VIEW, 9, HopId(2, 9, 5, 2, True, 0), batch(10, 20, 30), 1, out)
    assert (head.gradient, len(head.tokens)) == (EMPTY, 30)
    forward = hop_request(VIEW, 9, HopId(2, 9, 5, 1, False, 0), batch(10, 20, 30), 1, out)
    assert (forward.kind, forward.gradient) == ("forward", EMPTY)
    assert out == []


@pytest.mark.parametrize("sizes", [(40, 40, 0), (10, 40, 0), (24, 24, 0), (48, 1, 0), (20, 0, 40)])
def test_every_request_fits_in_a_frame(sizes: tuple[int, int, int]) -> None:
    inputs, gradient, tokens = (1024 * size for size in sizes)
    out: list[Effect] = []
    hop = 2 if tokens else 1
    made = hop_request(
        VIEW, 9, HopId(2, 9, 5, hop, True, 0), batch(inputs, gradient, tokens), 1, out
    )
    assert len(messages.encode(made)) < limits.FRAME_BYTES_CONTROL_MAX
    stripped = [t for t in (made.inputs, made.gradient) if t.nbytes and not t.data]
    kept = [e.tensor for e in out if isinstance(e, ServeTensor)]
    assert [(t.root, t.nbytes) for t in kept] == [(t.root, t.nbytes) for t in reversed(stripped)]
    assert all(len(t.data) == t.nbytes for t in kept)
    assert bool(kept) == (inputs + gradient + tokens > limits.HOP_INLINE_BYTES_MAX)
