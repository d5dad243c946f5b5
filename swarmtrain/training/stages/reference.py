"""What a pipeline must equal: one process with the whole model, and a pipeline without a network.

``reference_step`` chains the pieces in one autograd graph. ``LocalPipeline`` sends encoded bytes
hop by hop through runtimes, as drivers and workers do, with a choice of replicas per hop.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from swarmtrain.training.stages.cut import Cut
from swarmtrain.training.stages.runtime import StageRuntime
from swarmtrain_protocols.codecs.boundary import I32, encode_tokens
from swarmtrain_protocols.pipeline.hops import plain_path, stage_of
from swarmtrain_protocols.pipeline.sampling import Sampling, decode_logits, next_token


@dataclass(frozen=True, slots=True)
class Step:
    """Gradient sums [n] by stage and losses by micro-batch."""

    gradients: dict[int, NDArray[Any]]
    losses: list[float]


def reference_step(
    cut: Cut,
    theta: Mapping[int, NDArray[Any]],
    micro_batches: Sequence[I32],
    dtype: torch.dtype = torch.float32,
    fixed: Callable[[Tensor], Tensor | None] | None = None,
    path: Sequence[int] | None = None,
) -> Step:
    """Gradient sums over micro-batches i32 [batch, time + 1] in one graph on the CPU.

    Args:
        theta: weights [n] by stage.
        fixed: what the embedding adds to its output, by token ids (codec ``subspace``).
        path: order of hops; None: the order of the layers.
    """
    model = Whole(cut, theta, dtype, fixed)
    losses = []
    for tokens in micro_batches:
        ids = torch.from_numpy(tokens.astype(np.int64))
        logits = model.logits(ids[:, :-1], path)
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(float(loss.detach()))
    gradients = {
        stage: torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in found]
        ).numpy()
        for stage, found in model.parameters.items()
    }
    return Step(gradients, losses)


class Whole:
    """All pieces of a cut on the CPU, called one after the other. Arguments as above."""

    def __init__(
        self,
        cut: Cut,
        theta: Mapping[int, NDArray[Any]],
        dtype: torch.dtype = torch.float32,
        fixed: Callable[[Tensor], Tensor | None] | None = None,
    ) -> None:
        stages = range(cut.stages + 1)
        name = str(dtype).removeprefix("torch.")
        runtime = StageRuntime(cut, stages, codec="fp64", batch_max=1, seed=0, dtype=name)
        self.cut, self._fixed = cut, fixed
        self.modules = [copy.deepcopy(runtime.module(stage)) for stage in stages]
        self.parameters = {s: list(m.parameters()) for s, m in enumerate(self.modules)}
        for stage, values in theta.items():
            start = 0
            for p in self.parameters[stage]:
                part = torch.from_numpy(values[start : start + p.numel()].copy())
                p.data.copy_(part.view(p.shape))
                start += p.numel()

    def logits(self, ids: Tensor, path: Sequence[int] | None = None) -> Tensor:
        """int64 [batch, time] → [batch, time, vocabulary]."""
        x: Tensor = self.modules[0].embed(ids)  # type: ignore[operator]
        added = None if self._fixed is None else self._fixed(ids)
        x = x if added is None else x + added
        for hop in (path or plain_path(self.cut.stages))[1:-1]:
            x = self.modules[hop](x)
        found: Tensor = self.modules[0].head(x)  # type: ignore[operator]
        return found

    @torch.no_grad()
    def generate(self, prompt: Sequence[int], count: int, sampling: Sampling) -> list[int]:
        """``count`` tokens after ``prompt``; beyond the context only its last tokens are seen."""
        ids = list(prompt)
        for _ in range(count):
            window = torch.tensor([ids[-self.cut.context :]])
            row = self.logits(window)[0, -1].float().numpy()
            ids.append(next_token(row, sampling, len(ids)))
        return ids[len(prompt) :]


class LocalPipeline:
    """Replicas of stages in one process.

    Args:
        replicas: by stage, the runtimes that serve it.
        stages: number of block stages.
    """

    def __init__(self, replicas: Mapping[int, Sequence[StageRuntime]], stages: int) -> None:
        self.replicas = replicas
        self.stages = stages
        self.sent_nbytes = 0

    def _at(self, hop: int, micro_batch: int) -> StageRuntime:
        choice = self.replicas[stage_of(hop, self.stages)]
        return choice[micro_batch % len(choice)]

    def _ends(self, hop: int) -> bool:
        return hop in (0, self.stages + 1)

    def micro_batch(
        self, number: int, tokens: I32, path: Sequence[int] | None = None, sign: int = 1
    ) -> float:
        """Forward and backward of i32 [batch, time + 1] at the replicas that ``number`` names."""
        ids = encode_tokens(tokens)
        hops = tuple(path or plain_path(self.stages))
        inputs: list[bytes] = [b""]
        for hop in hops[:-1]:
            given = ids if self._ends(hop) else b""
            inputs.append(self._at(hop, number).forward(hop, inputs[-1], given).output)
        gradient, loss = b"", 0.0
        for hop, kept in zip(reversed(hops), reversed(inputs), strict=True):
            given = ids if self._ends(hop) else b""
            done = self._at(hop, number).backward(hop, kept, gradient, given, sign=sign)
            gradient, loss = done.output, loss + done.loss
            self.sent_nbytes += len(kept) + len(gradient)
        return loss

    def evaluate(self, tokens: I32, path: Sequence[int] | None = None) -> float:
        """Mean nats per token of i32 [batch, time + 1] by ``path`` (None: all hops)."""
        ids, x, loss = encode_tokens(tokens), b"", 0.0
        for hop in path or plain_path(self.stages):
            done = self._at(hop, 0).evaluate(hop, x, ids if self._ends(hop) else b"")
            x, loss = done.output, done.loss
        return loss

    def logits(self, tokens: I32) -> bytes:
        """Encoded logits after the last of i32 [batch, time]."""
        ids, x = encode_tokens(tokens), b""
        for hop in plain_path(self.stages):
            x = self._at(hop, 0).generate(hop, x, ids if hop == 0 else b"").output
        return x

    def generate(self, prompt: Sequence[int], count: int, sampling: Sampling) -> list[int]:
        """As ``Whole.generate``, hop by hop."""
        ids = list(prompt)
        cut = self.replicas[0][0].cut
        for _ in range(count):
            window = np.array([ids[-cut.context :]], np.int32)
            row = decode_logits(self.logits(window), 1, cut.vocabulary)[0]
            ids.append(next_token(row, sampling, len(ids)))
        return ids[len(prompt) :]

    def gradients(self, stage: int) -> NDArray[Any]:
        """The sum of the accumulators of a stage's replicas, [n]."""
        parts = [runtime.gradient_sum(stage) for runtime in self.replicas[stage]]
        found: NDArray[Any] = np.sum(parts, axis=0)
        return found
