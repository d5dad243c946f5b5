"""Whether a hop may be computed: everything a request says is checked against what is known.

Spec 11 §2.2. Two questions: is it well formed for this run (``malformed``), and does it belong to
the weights and the step that are here now (``trouble``). Pure functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from swarmtrain_protocols import merkle
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.messages.pipeline import EMPTY, HopRequest, Tensor
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.pipeline.hops import is_path, stage_of

TRAINING = ("forward", "backward")


@dataclass(frozen=True, slots=True)
class HopSizes:
    """Bytes that tensors of a step must have; 0: any length within the bounds of the message."""

    tokens: int = 0
    activation: int = 0
    gradient: int = 0


ANY_SIZE = HopSizes()


def inline_tensor(data: bytes) -> Tensor:
    """A tensor whose bytes travel in the message itself."""
    return Tensor(merkle.leaf_hash(data), len(data), data) if data else EMPTY


def is_tensor(tensor: Tensor) -> bool:
    """Root, length and inline bytes agree."""
    if not tensor.nbytes:
        return tensor == EMPTY
    if tensor.root == EMPTY.root:
        return False
    inline = tensor.data
    return not inline or (len(inline) == tensor.nbytes and merkle.leaf_hash(inline) == tensor.root)


def skipped_hop(request: HopRequest, blocks: int) -> int:
    """The inner hop that the request's path leaves out, 0: none."""
    return next((hop for hop in range(1, blocks + 1) if hop not in request.path), 0)


def malformed(request: HopRequest, blocks: int, micro_batches: int, sizes: HopSizes) -> str:
    """What is wrong with a request whatever the state of the run, or ``""``."""
    hop, head, kind = request.id.hop, blocks + 1, request.kind
    training = kind in TRAINING
    if not is_path(request.path, blocks) or hop not in request.path:
        return "no such path"
    if training and len(request.path) < max(3, blocks + 1):
        return "the path leaves out more than one stage"
    if request.id.backward != (kind == "backward"):
        return "kind and direction differ"
    if training and request.id.micro_batch >= micro_batches:
        return "no such micro-batch"
    if hop == head and kind == "forward":
        return "the head does forward and backward in one"
    if not is_tensor(request.inputs) or not is_tensor(request.gradient):
        return "a tensor's root, length and bytes do not agree"
    return _parts(request, head) or (_lengths(request, sizes) if training else "")


def _parts(request: HopRequest, head: int) -> str:
    """Each hop has its own inputs: tokens at the ends, activations everywhere but at the first."""
    hop = request.id.hop
    ends = hop in (0, head)
    if bool(request.inputs.nbytes) != (hop != 0):
        return "inputs are for every hop but the first"
    if bool(request.tokens) != ends and not (request.kind == "generate" and hop == head):
        return "tokens are for embedding and head"
    if bool(request.gradient.nbytes) != (request.kind == "backward" and hop != head):
        return "a gradient is for backwards below the head"
    return ""


def _lengths(request: HopRequest, sizes: HopSizes) -> str:
    for name, expected, actual in (
        ("tokens", sizes.tokens, len(request.tokens)),
        ("inputs", sizes.activation, request.inputs.nbytes),
        ("gradient", sizes.gradient, request.gradient.nbytes),
    ):
        if expected and actual not in (0, expected):
            return f"{name}: {actual} bytes, not {expected}"
    return ""


def trouble(
    request: HopRequest,
    ledger: Ledger,
    blocks: int,
    served: Sequence[int],
    in_step: Callable[[str], bool],
) -> tuple[str, str] | None:
    """(code, reason) if the request cannot be computed with the weights that are here now."""
    stage, state = stage_of(request.id.hop, blocks), ledger.pipeline
    channel = ledger.channels.get(stage_channel(stage))
    if channel is None:
        return "not_ready", "the model is not defined yet"
    if stage not in served:
        return "not_served", f"stage {stage}"
    sync, local = state.mode == "sync", state.mode == "diloco"
    training = request.kind in TRAINING
    for name, theirs, ours in (
        ("generation", request.id.generation, ledger.generation),
        ("era", request.stage_generation, state.era),
        ("version", request.version, channel.round if training or not local else None),
        ("step", request.id.step, state.step if sync and training else None),
    ):
        if ours is not None and theirs != ours:
            return ("stale" if theirs < ours else "not_ready"), f"{name} is {ours} here"
    if ledger.ended and training:
        return "stale", "the run has ended"
    if training and state.lost():
        return "not_ready", f"stage {state.lost()[0]} is lost"
    if not in_step(channel.name):
        return "not_ready", "the state of the stage is not here yet"
    return None
