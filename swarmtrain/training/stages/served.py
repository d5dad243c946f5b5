"""One stage on a device: a module with weights, and the accumulator of their gradients.

In mode ``diloco`` it has weights of its own beside those of the state that it took up.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from swarmtrain.training.stages.cut import layout_of
from swarmtrain.training.stages.local import LocalRules, LocalStage
from swarmtrain_protocols.codecs.subspace import Kinds, Subspace
from swarmtrain_protocols.errors import LocalProtocolError


class Served:
    """One stage on the device: its module, its parameters in order, and their accumulator.

    ``pairs`` counts the backwards in the accumulator; ``hops`` of them make a micro-batch.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        subspace: Subspace | None,
        rules: LocalRules | None = None,
        hops: int = 1,
    ) -> None:
        named = list(module.named_parameters())
        self.module = module
        self.parameters = [p for _, p in named]
        self.values = sum(p.numel() for p in self.parameters)
        self.accumulator = torch.zeros(self.values, device=device, dtype=dtype)
        self.pairs = 0
        self._hops = hops
        self.local: LocalStage | None = None
        if rules is not None:
            self.local = LocalStage(layout_of(module), rules, device, dtype)
        self._kinds = [
            None if subspace is None else subspace.kind(*each) for each in layout_of(module)
        ]
        if subspace is not None:
            self._basis = torch.from_numpy(subspace.basis).to(device, dtype)

    def load(self, theta: Tensor) -> None:
        """Take up a state [n]."""
        if self.local is not None:
            self.local.start(theta)
        self.write(theta)

    def clear(self) -> None:
        """Set the accumulator to zero."""
        self.accumulator.zero_()
        self.pairs = 0

    def step(self, run_step: int) -> None:
        """A local step with the mean of what was accumulated, which is cleared.

        Raises:
            LocalProtocolError: nothing was accumulated, or the stages of this run step together.
        """
        if self.local is None or not self.pairs:
            raise LocalProtocolError("a local step", f"with {self.pairs} gradients")
        self.local.step(self.accumulator * (self._hops / self.pairs), run_step)
        self.write(self.local.theta)
        self.clear()

    def delta(self) -> Tensor:
        """What local steps have changed since the state was taken up, [n]."""
        if self.local is None:
            raise LocalProtocolError("a pseudo-gradient", "the stages of this run step together")
        return self.local.delta()

    @contextlib.contextmanager
    def canonical(self) -> Iterator[None]:
        """Compute with the state that was taken up, without what local steps have changed."""
        local = self.local
        if local is None or not local.moved:
            yield
            return
        self.write(local.anchor)
        try:
            yield
        finally:
            self.write(local.theta)

    @torch.no_grad()
    def write(self, theta: Tensor) -> None:
        start = 0
        for p, kind in zip(self.parameters, self._kinds, strict=True):
            values = theta[start : start + p.numel()].view(p.shape).to(p.dtype)
            p.copy_(self._projected(values, kind))
            start += p.numel()

    @torch.no_grad()
    def add(self, gradients: Sequence[Tensor | None], sign: int) -> None:
        # Whatever needs memory comes first: half an addition could not be taken back.
        flat = [
            None if part is None else self._projected(part, kind).reshape(-1)
            for part, kind in zip(gradients, self._kinds, strict=True)
        ]
        start = 0
        for p, part in zip(self.parameters, flat, strict=True):
            if part is not None:
                self.accumulator[start : start + p.numel()].add_(part, alpha=sign)
            start += p.numel()
        self.pairs += sign

    def _projected(self, w: Tensor, kind: Kinds) -> Tensor:
        """What the model sees of weights, and by the chain rule of their gradient."""
        if kind is None:
            return w
        u = self._basis
        return u @ (u.T @ w) if kind == "rows" else (w @ u) @ u.T


def placed(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy of a piece on the device; tied parameters stay tied, missing values are zero."""
    found = copy.deepcopy(module)
    moved: dict[int, nn.Parameter] = {}
    for part in found.modules():
        for name, p in part.named_parameters(recurse=False, remove_duplicate=False):
            if id(p) not in moved:
                values = torch.zeros(p.shape, device=device, dtype=dtype)
                moved[id(p)] = nn.Parameter(values if p.is_meta else p.detach().to(device, dtype))
            setattr(part, name, moved[id(p)])
        for name, buffer in part.named_buffers(recurse=False):
            assert not buffer.is_meta, "a buffer without values"
            floating = buffer.is_floating_point()
            setattr(part, name, buffer.to(device, dtype) if floating else buffer.to(device))
    return found
