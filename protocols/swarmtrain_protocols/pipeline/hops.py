"""Hops of a micro-batch through the stages of a model, and the order in which it visits them.

A model of ``stages`` block stages has hops 0 … stages + 1: hop 0 is the embedding, hops 1 … stages
are the block stages, hop ``stages + 1`` is the head with the loss. Embedding and head belong to one
module, the ends, which is stage 0; hop h of the blocks belongs to stage h. Gradients of both ends
hops go into one accumulator.
"""

from __future__ import annotations

from swarmtrain_protocols.errors import LocalProtocolError

ENDS = 0
"""The stage of embedding and head."""


def stage_of(hop: int, stages: int) -> int:
    """The stage that serves ``hop`` of a model with ``stages`` block stages."""
    return ENDS if hop in (0, stages + 1) else hop


def hops_of(stage: int, stages: int) -> tuple[int, ...]:
    """The hops that ``stage`` serves."""
    return (0, stages + 1) if stage == ENDS else (stage,)


def plain_path(stages: int) -> tuple[int, ...]:
    """All hops in the order of the layers."""
    return tuple(range(stages + 2))


def swapped_path(stages: int) -> tuple[int, ...]:
    """CheckFree+ (arXiv 2506.15461): the first two and the last two block stages change places.

    Raises:
        LocalProtocolError: fewer than four block stages.
    """
    if stages < 4:
        raise LocalProtocolError("the swapped schedule needs four stages", f"{stages} given")
    inner = list(range(1, stages + 1))
    inner[0], inner[1] = inner[1], inner[0]
    inner[-1], inner[-2] = inner[-2], inner[-1]
    return (0, *inner, stages + 1)


def skipped_path(path: tuple[int, ...], hop: int) -> tuple[int, ...]:
    """``path`` without one inner hop (the overload valve of SkipPipe, arXiv 2502.19913)."""
    if hop not in path[1:-1]:
        raise LocalProtocolError("only inner hops can be skipped", f"hop {hop}")
    return tuple(each for each in path if each != hop)


def is_path(path: tuple[int, ...], stages: int) -> bool:
    """Whether a peer's path starts and ends at the ends and visits no hop twice.

    It may have no inner hop: while all block stages are lost, the ends are evaluated alone.
    """
    inner = path[1:-1]
    return (
        len(path) >= 2
        and (path[0], path[-1]) == (0, stages + 1)
        and len(set(inner)) == len(inner)
        and all(1 <= hop <= stages for hop in inner)
    )
