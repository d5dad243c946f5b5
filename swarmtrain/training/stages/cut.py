"""Cuts a model into its ends (embedding and head, one module) and equal stages of blocks.

Stage 0 is the ends, stages 1 … S are groups of equally many blocks with equal layouts. A stage's
parameters are those its module lists, tied ones once, in that order, named from the stage's own
root (``blocks.0.up.weight``): all inner stages therefore have one layout.

A model that cannot be computed twice with the same result (dropout, noise, running statistics) or
whose parameters reach across a cut is refused: a worker recomputes what it forgot since the forward
pass. Where a model has values, both are tried out with a few tokens, not only read off its modules.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swarmtrain_protocols.errors import ConfigError
from swarmtrain_protocols.manifest import check_stages

StageLayout = list[tuple[str, tuple[int, ...]]]
"""(name, shape) of a stage's trainable parameters, in the order of its flat vector."""
_MISFITS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)
"""What parts raise that do not fit together."""


class CannotCut(ConfigError):
    """The model does not fall into ends and equal stages. Says which part is in the way."""


class Ends(nn.Module):
    """Embedding and head as one module, so that tied weights are one parameter."""

    def __init__(self, embed: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.embed = embed
        self.head = head

    def forward(self, tokens: Tensor) -> Tensor:
        """The model without its blocks: int64 [batch, time] → logits [batch, time, vocabulary]."""
        found: Tensor = self.head(self.embed(tokens))
        return found


class Stage(nn.Module):
    """A group of blocks. ``shared`` computes once per pass what every block takes beside x."""

    def __init__(self, blocks: Sequence[nn.Module], shared: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, time, width] → the same shape."""
        extra = {} if self.shared is None else self.shared(x)
        for block in self.blocks:
            found = block(x, **extra)
            x = found[0] if isinstance(found, tuple) else found
        return x


@dataclass(frozen=True, slots=True)
class Cut:
    """A model in pieces. ``modules[0]`` is the ``Ends``, ``modules[s]`` is stage s.

    Pieces on the meta device have no values: θ⁰ is then drawn from the run's seed.
    """

    modules: tuple[nn.Module, ...]
    width: int
    vocabulary: int
    context: int
    depth: int

    @property
    def stages(self) -> int:
        """Number of block stages S; modules are S + 1."""
        return len(self.modules) - 1

    @property
    def ends(self) -> Ends:
        found = self.modules[0]
        assert isinstance(found, Ends)
        return found

    def layout(self, stage: int) -> StageLayout:
        """(name, shape) of the parameters of a stage, in the order of its flat vector."""
        return layout_of(self.modules[stage])

    def values(self, stage: int) -> int:
        """Number of values of a stage."""
        return sum(math.prod(shape) for _, shape in self.layout(stage))

    def drawn(self, stage: int) -> bool:
        """Whether θ⁰ of a stage comes from the seed, because its module holds no values."""
        return any(p.is_meta for p in self.modules[stage].parameters())


def layout_of(module: nn.Module) -> StageLayout:
    """(name, shape) of a module's trainable parameters in its order, tied ones once."""
    return [(name, tuple(p.shape)) for name, p in module.named_parameters()]


def plain_ranges(layout: StageLayout) -> tuple[tuple[int, int], ...]:
    """Values of a stage without weight decay: those of parameters of one dimension."""
    ranges: list[tuple[int, int]] = []
    start = 0
    for _, shape in layout:
        stop = start + math.prod(shape)
        if len(shape) <= 1 and ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], stop)
        elif len(shape) <= 1:
            ranges.append((start, stop))
        start = stop
    return tuple(ranges)


def cut_parts(
    embed: nn.Module,
    blocks: Sequence[nn.Module],
    head: nn.Module,
    stages: int,
    *,
    context: int,
    shared: nn.Module | None = None,
) -> Cut:
    """Cut a model given as parts.

    Args:
        embed: int64 [batch, time] → [batch, time, width].
        blocks: each [batch, time, width] → the same shape (or a tuple that begins with it).
        head: [batch, time, width] → logits [batch, time, vocabulary].
        context: the most tokens of a sequence.
        shared: x → keyword arguments of every block, without parameters (rotary positions, masks).

    Raises:
        CannotCut: what is in the way.
        ConfigError: the blocks do not divide into ``stages`` equal groups.
    """
    size = check_stages(stages, len(blocks))
    ends = Ends(embed, head)
    pieces = [
        Stage(blocks[first : first + size], copy.deepcopy(shared))
        for first in range(0, len(blocks), size)
    ]
    modules = (ends, *pieces)
    for number, module in enumerate(modules):
        _check_module(number, module)
    _check_disjoint(modules)
    layouts = [layout_of(piece) for piece in pieces]
    for number, layout in enumerate(layouts[1:], 2):
        if layout != layouts[0]:
            raise CannotCut(
                f"stage {number} differs from stage 1",
                "all stages need blocks of equal shapes",
                "move the odd block into the embedding or the head",
            )
    device = next(ends.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        width, vocabulary = _probe(ends, pieces[0], context)
        found = Cut(modules, width, vocabulary, context, len(blocks))
        _check_repeatable(found)
    return found


def cut_sequential(
    model: nn.Module, stages: int, *, context: int, embedding: str, head: str
) -> Cut:
    """Cut a model that calls its children one after the other, in the order it lists them.

    Lists of modules between the two ends count as their members.

    Args:
        embedding: name of the first child; ``head`` of the last one.

    Raises:
        CannotCut: no such children, not at the two ends, a model that does something else than
            call its children in order, or as ``cut_parts``.
    """
    names = [name for name, _ in model.named_children()]
    parts = [part for _, part in model.named_children()]
    for name, place in ((embedding, 0), (head, -1)):
        if name not in names or names[place] != name:
            raise CannotCut(
                f"the model has no child {name!r} at its {'start' if place == 0 else 'end'}",
                f"its children are {', '.join(names[:12]) or 'none'}",
                "name the embedding (first) and the head (last)",
            )
    blocks: list[nn.Module] = []
    for part in parts[1:-1]:
        blocks += list(part) if isinstance(part, (nn.Sequential, nn.ModuleList)) else [part]
    found = cut_parts(parts[0], blocks, parts[-1], stages, context=context)
    check_equal(model, found)
    return found


def _check_module(number: int, module: nn.Module) -> None:
    where = "the ends" if number == 0 else f"stage {number}"
    parameters = list(module.named_parameters())
    if not parameters:
        raise CannotCut(f"{where} of the model", "nothing to train there")
    for name, p in parameters:
        if hasattr(p, "placements") or p.layout != torch.strided or not p.is_floating_point():
            raise CannotCut(f"parameter {name} of {where}", f"{p.dtype} {p.layout} or sharded")
        if not p.requires_grad:
            raise CannotCut(
                f"parameter {name} of {where} is frozen",
                "replicas could not tell that theirs are equal",
                "make it a buffer that every member computes alike, or train it",
            )
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._NormBase) and part.track_running_stats:
            raise CannotCut(f"{name} of {where}", "running statistics change with every pass")
        rates = (getattr(part, key, 0.0) for key in ("p", "dropout", "attention_dropout"))
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            raise CannotCut(
                f"{name} of {where} has dropout",
                "recomputing a forward pass would draw other values",
                "set its probability to 0",
            )


def _check_disjoint(modules: Sequence[nn.Module]) -> None:
    owner: dict[int, int] = {}
    for number, module in enumerate(modules):
        for name, p in module.named_parameters():
            if owner.setdefault(id(p), number) != number:
                raise CannotCut(
                    f"parameter {name} of stage {number}",
                    f"stage {owner[id(p)]} has it as well; only embedding and head can be tied",
                )


@torch.no_grad()
def _probe(ends: Ends, stage: Stage, context: int) -> tuple[int, int]:
    """Width and vocabulary, from two tokens sent through the ends and one stage."""
    device = next(ends.parameters()).device
    tokens = torch.zeros((1, min(2, context)), dtype=torch.int64, device=device)
    try:
        x = ends.embed(tokens)
        y = stage(x)
        logits = ends.head(y)
    except _MISFITS as error:
        raise CannotCut("two tokens do not pass through the model", str(error)[:400]) from None
    shapes = [tuple(t.shape) for t in (x, y, logits) if isinstance(t, Tensor)]
    if len(shapes) < 3 or any(len(s) != 3 for s in shapes) or shapes[0] != shapes[1]:
        raise CannotCut(
            "the model's parts do not pass on [batch, time, width]", f"they pass {shapes}"
        )
    return shapes[0][2], shapes[2][2]


def _some_tokens(cut: Cut) -> Tensor:
    """int64 [1, time] of different ids, on the device of the ends."""
    device = next(cut.ends.parameters()).device
    return (torch.arange(min(8, cut.context), device=device) * 7 % cut.vocabulary)[None]


def _tolerance(like: Tensor) -> float:
    return 0.05 if like.dtype in (torch.float16, torch.bfloat16) else 1e-4


@torch.no_grad()
def _check_repeatable(cut: Cut) -> None:
    """Send the same tokens through every piece three times: modules do not tell all they draw."""
    if any(cut.drawn(number) for number in range(cut.stages + 1)):
        return
    before = [{n: b.clone() for n, b in module.named_buffers()} for module in cut.modules]
    passes = [_outputs(cut) for _ in range(3)]
    for number, module in enumerate(cut.modules):
        where = "the ends" if number == 0 else f"stage {number}"
        for name, buffer in module.named_buffers():
            if name in before[number] and not torch.equal(buffer, before[number][name]):
                raise CannotCut(
                    f"buffer {name} of {where} changes with every pass",
                    "recomputing a forward pass would count twice",
                    "keep no statistics in the model",
                )
        for other in passes[1:]:
            for y, z in zip(passes[0][number], other[number], strict=True):
                if not bool((y - z).abs().max() <= _tolerance(y) * y.abs().max()):
                    raise CannotCut(
                        f"{where} of the model answers the same input differently each time",
                        "recomputing a forward pass would draw other values",
                        "take out dropout and noise",
                    )


def _outputs(cut: Cut) -> list[tuple[Tensor, ...]]:
    """What every piece answers to some tokens, the ends (activation, logits) first."""
    # Every stage gets the embedding, so that each one is judged by itself.
    x = cut.ends.embed(_some_tokens(cut))
    return [(x, cut.ends.head(x)), *((stage(x),) for stage in cut.modules[1:])]


@torch.no_grad()
def check_equal(model: nn.Module, cut: Cut) -> None:
    """Names do not tell all (scaled embeddings, other masks): compare the logits of some tokens.

    Raises:
        CannotCut: the pieces compute something else than the model.
    """
    first = next(model.parameters())
    if first.is_meta:
        return
    ids = _some_tokens(cut)
    try:
        whole = model(ids)
        expected = whole if isinstance(whole, Tensor) else whole.logits
    except _MISFITS as error:
        raise CannotCut("the whole model takes no tokens", str(error)[:400]) from None
    x = cut.ends.embed(ids)
    for stage in cut.modules[1:]:
        x = stage(x)
    found = cut.ends.head(x)
    if not bool((found - expected).abs().max() <= _tolerance(first) * expected.abs().max()):
        raise CannotCut(
            f"{type(model).__name__} in pieces answers other logits than whole",
            "it does more than call its parts in order",
            "cut it yourself with swarmtrain.training.stages.cut.cut_parts",
        )
