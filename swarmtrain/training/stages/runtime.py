"""Computes hops of the stages that this site serves, on one device.

A stage has weights and one gradient accumulator, and keeps nothing else between calls: a backward
recomputes its forward from the same decoded bytes. Encoded bytes go in and come out, so that a
forward here and its recomputation elsewhere begin from equal numbers. A call that raises has
changed nothing.

The loss of a micro-batch is its mean in nats per token; accumulators hold the sum of the gradients
of that over micro-batches, and whoever closes the step divides by their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from swarmtrain.training.flat import schema_hash
from swarmtrain.training.stages.boundary import device_codec
from swarmtrain.training.stages.cut import Cut, StageLayout
from swarmtrain.training.stages.families import cut_preset
from swarmtrain.training.stages.local import LocalRules
from swarmtrain.training.stages.served import Served, placed
from swarmtrain_protocols import limits
from swarmtrain_protocols.codecs.base import F32
from swarmtrain_protocols.codecs.boundary import (
    Bounds,
    Buffer,
    decode_tokens,
    encode_tokens,
    pack_header,
)
from swarmtrain_protocols.codecs.subspace import Subspace
from swarmtrain_protocols.errors import ConfigError, Diverged, LocalProtocolError, PeerFault
from swarmtrain_protocols.messages.pipeline import Kind
from swarmtrain_protocols.pipeline.candidates import fresh
from swarmtrain_protocols.pipeline.hops import ENDS, hops_of, stage_of

DTYPES = {"float32": torch.float32, "float64": torch.float64}
LOGITS_CODE = 1
"""Logits travel as fp32 [batch, 1, vocabulary] whatever the boundary codec."""


@dataclass(frozen=True, slots=True)
class HopResult:
    """``output``: an encoded activation, gradient or row of logits, or empty. ``loss``: mean nats
    per token where the head computed one, else 0."""

    output: bytes
    loss: float = 0.0


class StageRuntime:
    """Stages of a cut model on one device.

    Args:
        cut: the model; pieces on the meta device get θ⁰ from ``seed``.
        served: stages to begin with.
        codec: name of the boundary codec.
        batch_max: the most sequences of a micro-batch; the most tokens are the model's context.
        subspace: basis of the codec ``subspace``.
        local: of mode ``diloco``, in which stages step by themselves.

    Raises:
        ConfigError: unknown codec or type, a model that the codec cannot serve.
        LocalProtocolError: a stage that does not exist.
    """

    def __init__(
        self,
        cut: Cut,
        served: Sequence[int],
        *,
        codec: str,
        batch_max: int,
        seed: int,
        device: str = "cpu",
        dtype: str = "float32",
        subspace: Subspace | None = None,
        local: LocalRules | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"type {dtype} of stages", "unknown", f"one of {list(DTYPES)}")
        self.cut, self.seed, self.batch_max = cut, seed, batch_max
        self.device, self.dtype = torch.device(device), DTYPES[dtype]
        bounds = Bounds(batch_max, cut.context, cut.width)
        self.boundary = device_codec(codec, bounds, self.device, self.dtype, subspace)
        _check_messages(self.boundary.nbytes_max, batch_max, cut.context)
        self.subspace = subspace
        self._local = local
        self._served: dict[int, Served] = {}
        self.serve(served)

    @classmethod
    def build(
        cls,
        keys: Mapping[str, Any],
        stages: Sequence[int],
        device: str = "cpu",
        dtype: str = "float32",
        cut: Cut | None = None,
    ) -> StageRuntime:
        """The runtime of a run, serving ``stages``; other stages take no memory.

        Args:
            cut: the model; default: that of the preset.
            keys: run keys by name: preset, model, stages, batch_size, seed, boundary_codec.
                ``model.boundary_rank`` is the rank of the codec ``subspace`` (0: width / 8).

        Raises:
            ConfigError: keys that name no such model.
        """
        sizes = dict(keys.get("model") or {})
        rank = sizes.pop("boundary_rank", 0)
        cut = cut or cut_preset({**keys, "model": sizes})
        return cls(
            cut,
            stages,
            codec=keys["boundary_codec"],
            batch_max=keys["batch_size"],
            seed=keys["seed"],
            device=device,
            dtype=dtype,
            subspace=subspace_of(cut, keys["seed"], rank, keys["boundary_codec"]),
            local=LocalRules.of(keys),
        )

    # -- what is served ---------------------------------------------------------------------

    @property
    def served(self) -> tuple[int, ...]:
        """Stages that this runtime computes, in order."""
        return tuple(sorted(self._served))

    def serve(self, stages: Sequence[int]) -> None:
        """Serve these stages from now on; new ones begin at θ⁰, others are dropped."""
        wanted = sorted(set(stages))
        if wanted and not 0 <= wanted[0] <= wanted[-1] <= self.cut.stages:
            raise LocalProtocolError(f"stages {wanted}", f"the model has 0 … {self.cut.stages}")
        for stage in list(self._served):
            if stage not in wanted:
                del self._served[stage]
        for stage in wanted:
            if stage not in self._served:
                module = placed(self.cut.modules[stage], self.device, self.dtype)
                hops = len(hops_of(stage, self.cut.stages))
                self._served[stage] = Served(
                    module, self.device, self.dtype, self.subspace, self._local, hops
                )
                self.load(stage, self.theta0(stage))

    def layout(self, stage: int) -> StageLayout:
        """(name, shape) of the tensors of any stage, in the order of its flat vector."""
        return self.cut.layout(stage)

    @property
    def values(self) -> tuple[int, ...]:
        """Number of values of every stage, the ends first."""
        return tuple(self.cut.values(stage) for stage in range(self.cut.stages + 1))

    @property
    def schema_hash(self) -> bytes:
        """BLAKE3 of (stage/name, shape, float32) of all stages: equal models are equal here."""
        return schema_hash(
            tuple(
                (f"{stage}/{name}", shape, "float32")
                for stage in range(self.cut.stages + 1)
                for name, shape in self.layout(stage)
            )
        )

    def theta0(self, stage: int) -> F32:
        """f32[n] that a run starts from: the given model's values, or drawn from the seed."""
        if self.cut.drawn(stage):
            found = fresh(self.layout(stage), self.seed, stage, self.cut.depth)
        else:
            parts = [p.detach().float().cpu() for p in self.cut.modules[stage].parameters()]
            found = torch.cat([part.reshape(-1) for part in parts]).numpy()
        if self.subspace is not None:
            self.subspace.constrain(found, self.layout(stage))
        return found

    def load(self, stage: int, theta: F32 | NDArray[np.float64]) -> None:
        """Set the weights of a served stage from f32[n] (or f64[n]); the accumulator stays.

        In mode ``diloco`` they are the state that local steps begin from.
        With the codec ``subspace`` the stage computes with their projection (spec 06 §2.5).

        Raises:
            LocalProtocolError: not served, another length, or a value that is not finite.
        """
        served = self._of(stage)
        if theta.shape != (served.values,):
            raise LocalProtocolError(
                f"weights of shape {theta.shape} for stage {stage}", f"it has {served.values}"
            )
        source = torch.from_numpy(np.array(theta)).to(self.device)
        if not bool(torch.isfinite(source).all()):
            raise LocalProtocolError(f"weights of stage {stage}", "a value is not finite")
        served.load(source)

    def module(self, stage: int) -> nn.Module:
        """The module of a served stage, with its weights."""
        return self._of(stage).module

    def theta(self, stage: int) -> NDArray[Any]:
        """The weights that a served stage computes with, in the runtime's type, [n]."""
        parts = [p.detach().reshape(-1) for p in self._of(stage).parameters]
        found: NDArray[Any] = torch.cat(parts).cpu().numpy()
        return found

    def accumulator(self, stage: int) -> F32:
        """The sum of the gradients of a served stage, f32[n], a copy."""
        return self.gradient_sum(stage).astype(np.float32)

    def gradient_sum(self, stage: int) -> NDArray[Any]:
        """The accumulator in the runtime's type, [n], a copy."""
        found: NDArray[Any] = self._of(stage).accumulator.cpu().numpy().copy()
        return found

    def clear(self, stages: Sequence[int]) -> None:
        """Set the accumulators of these stages to zero; those not served have none."""
        for stage in stages:
            if stage in self._served:
                self._served[stage].clear()

    def step(self, stage: int, run_step: int) -> None:
        """Mode ``diloco``: a local step with what was accumulated, which is cleared.

        Args:
            run_step: local steps of the run before it, for the learning rate.

        Raises:
            LocalProtocolError: not served, nothing accumulated, or another mode.
        """
        self._of(stage).step(run_step)

    def delta(self, stage: int) -> F32:
        """Mode ``diloco``: what local steps have changed, θ of the state - θ now, f32[n].

        Raises:
            LocalProtocolError: not served, or another mode.
        """
        found: F32 = self._of(stage).delta().float().cpu().numpy()
        return found

    # -- hops -------------------------------------------------------------------------------

    def run(
        self,
        kind: Kind,
        hop: int,
        inputs: Buffer = b"",
        gradient: Buffer = b"",
        tokens: Buffer = b"",
        sign: int = 0,
    ) -> HopResult:
        """Any hop by its kind. ``sign`` as in ``backward``; the other kinds ignore it."""
        if kind == "backward":
            return self.backward(hop, inputs, gradient, tokens, sign=sign)
        if kind == "generate":
            return self.generate(hop, inputs, tokens)
        if kind == "evaluate":
            return self.evaluate(hop, inputs, tokens)
        return self.forward(hop, inputs, tokens)

    @torch.no_grad()
    def forward(self, hop: int, inputs: Buffer = b"", tokens: Buffer = b"") -> HopResult:
        """Run a hop without gradients; the head answers the loss and no output.

        Args:
            inputs: encoded activation (all hops but the embedding).
            tokens: encoded token ids [batch, time + 1] (embedding and head).

        Raises:
            PeerFault: ``malformed``, ``oversize`` or ``non_finite`` bytes.
            Diverged: the stage computed something that is not finite.
            LocalProtocolError: the stage of this hop is not served.
        """
        module = self._module(hop)
        if hop == 0:
            ids, _ = self._windows(tokens)
            return HopResult(self._activation(hop, self._embed(module, ids), ids))
        x, ids_or_none = self.boundary.decode_activation(inputs)
        if hop <= self.cut.stages:
            return HopResult(self._activation(hop, module(x), ids_or_none))
        loss = self._loss(module, x, tokens)
        return HopResult(b"", self._finite_loss(loss))

    def evaluate(self, hop: int, inputs: Buffer = b"", tokens: Buffer = b"") -> HopResult:
        """As ``forward``, with the weights that the log knows whatever the mode."""
        with self._of(self._stage(hop)).canonical():
            return self.forward(hop, inputs, tokens)

    @torch.no_grad()
    def generate(self, hop: int, inputs: Buffer = b"", tokens: Buffer = b"") -> HopResult:
        """As ``forward`` over all of ``tokens`` [batch, time]; the head answers the logits of the
        last position, fp32 [batch, 1, vocabulary] under a boundary header."""
        with self._of(self._stage(hop)).canonical():
            return self._generated(hop, inputs, tokens)

    def _generated(self, hop: int, inputs: Buffer, tokens: Buffer) -> HopResult:
        module = self._module(hop)
        if hop == 0:
            ids = self._tokens(tokens, self.cut.context)
            return HopResult(self._activation(hop, self._embed(module, ids), ids))
        if hop <= self.cut.stages:
            return self.forward(hop, inputs)
        x, _ = self.boundary.decode_activation(inputs)
        logits = module(x[:, -1:]).float()
        self._check_finite(hop, logits)
        return HopResult(
            pack_header(LOGITS_CODE, tuple(logits.shape)) + logits.cpu().numpy().tobytes()
        )

    def backward(
        self,
        hop: int,
        inputs: Buffer = b"",
        gradient: Buffer = b"",
        tokens: Buffer = b"",
        *,
        sign: int = 1,
    ) -> HopResult:
        """Recompute a hop and send a gradient back through it.

        The head makes its own gradient from the loss of ``tokens``; the embedding answers nothing.

        Args:
            gradient: encoded gradient of the hop's output (all hops but the head).
            sign: +1 adds the gradient of the weights to the accumulator, -1 takes it out, 0 drops
                it. If this raises, the accumulator is as it was.

        Raises:
            PeerFault, Diverged, LocalProtocolError: as ``forward``.
        """
        if sign not in (-1, 0, 1):
            raise LocalProtocolError(f"sign {sign}", "-1, 0 or 1")
        served, module = self._of(self._stage(hop)), self._module(hop)
        with torch.enable_grad():
            x, y, g, loss = self._recomputed(hop, module, inputs, gradient, tokens)
            wanted = served.parameters if x is None else [x, *served.parameters]
            found: Sequence[Tensor | None] = torch.autograd.grad(
                y, wanted, grad_outputs=g, allow_unused=True
            )
        output = b""
        if x is not None:
            gx, found = found[0], found[1:]
            gx = torch.zeros_like(x) if gx is None else gx
            self._check_finite(hop, gx)
            output = self.boundary.encode_gradient(gx)
        self._check_finite(hop, *(part for part in found if part is not None))
        if sign:
            served.add(found, sign)
        return HopResult(output, loss)

    def undo(
        self, hop: int, inputs: Buffer = b"", gradient: Buffer = b"", tokens: Buffer = b""
    ) -> None:
        """Take a backward out of the accumulator again: recompute and subtract.

        The accumulator ends within rounding of never having had it.
        """
        self.backward(hop, inputs, gradient, tokens, sign=-1)

    # -- inside -----------------------------------------------------------------------------

    def _recomputed(
        self, hop: int, module: nn.Module, inputs: Buffer, gradient: Buffer, tokens: Buffer
    ) -> tuple[Tensor | None, Tensor, Tensor | None, float]:
        """(leaf of the input, output, gradient of the output, loss) of a hop with gradients."""
        if hop == 0:
            ids, _ = self._windows(tokens)
            y = self._embed(module, ids)
            return None, y, self._gradient_for(y, gradient), 0.0
        x = self.boundary.decode_activation(inputs)[0].requires_grad_()
        if hop <= self.cut.stages:
            # The gradient's shape is checked before the stage is computed.
            g = self._gradient_for(x, gradient)
            return x, module(x), g, 0.0
        loss = self._loss(module, x, tokens)
        return x, loss, None, self._finite_loss(loss)

    def _gradient_for(self, like: Tensor, gradient: Buffer) -> Tensor:
        g = self.boundary.decode_gradient(gradient)
        if g.shape != like.shape:
            raise PeerFault("malformed", f"a gradient of {tuple(g.shape)} for {tuple(like.shape)}")
        return g

    def _loss(self, module: nn.Module, x: Tensor, tokens: Buffer) -> Tensor:
        _, targets = self._windows(tokens)
        if targets.shape != x.shape[:2]:
            raise PeerFault(
                "malformed", f"targets {tuple(targets.shape)} for activations {tuple(x.shape)}"
            )
        logits = module(x)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def _embed(self, module: nn.Module, ids: Tensor) -> Tensor:
        x: Tensor = module(ids)
        fixed = self.boundary.fixed(ids)
        return x if fixed is None else x + fixed

    def _tokens(self, tokens: Buffer, time_max: int) -> Tensor:
        ids = decode_tokens(tokens, self.batch_max, time_max, self.cut.vocabulary)
        return torch.from_numpy(ids.astype(np.int64)).to(self.device)

    def _windows(self, tokens: Buffer) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [batch, time] each, of encoded tokens [batch, time + 1]."""
        ids = self._tokens(tokens, self.cut.context + 1)
        if ids.shape[1] < 2:
            raise PeerFault("malformed", "one token has no next one")
        return ids[:, :-1], ids[:, 1:]

    def _activation(self, hop: int, y: Tensor, ids: Tensor | None) -> bytes:
        self._check_finite(hop, y)
        return self.boundary.encode_activation(y, ids)

    def _check_finite(self, hop: int, *parts: Tensor) -> None:
        # One number for all parts: each look at a device's numbers waits for the device.
        largest = torch.stack([part.detach().abs().max() for part in parts]).max()
        if not float(largest) <= limits.VALUE_MAGNITUDE_MAX / 2:
            raise Diverged(
                f"hop {hop} computed values that are not finite",
                "weights or inputs are too large",
                "lower the learning rate or return to a checkpoint",
            )

    def _finite_loss(self, loss: Tensor) -> float:
        self._check_finite(self.cut.stages + 1, loss)
        return float(loss.detach())

    def _stage(self, hop: int) -> int:
        if not 0 <= hop <= self.cut.stages + 1:
            raise LocalProtocolError(f"hop {hop}", f"the model has 0 … {self.cut.stages + 1}")
        return stage_of(hop, self.cut.stages)

    def _of(self, stage: int) -> Served:
        found = self._served.get(stage)
        if found is None:
            raise LocalProtocolError(f"stage {stage} is not served", f"served: {self.served}")
        return found

    def _module(self, hop: int) -> nn.Module:
        stage = self._stage(hop)
        module = self._of(stage).module
        if stage != ENDS:
            return module
        part = module.embed if hop == 0 else module.head
        assert isinstance(part, nn.Module)
        return part


def subspace_of(cut: Cut, seed: int, rank: int, codec: str) -> Subspace | None:
    """The basis of a run whose boundary codec is ``subspace``, else None.

    Raises:
        ConfigError: a model whose head is its embedding.
    """
    if codec != "subspace":
        return None
    ends = cut.ends
    shared = {id(p) for p in ends.head.parameters()} & {id(p) for p in ends.embed.parameters()}
    if shared:
        raise ConfigError(
            "boundary codec subspace",
            "a tied head would be kept in the subspace as well",
            "use a model with a head of its own",
        )
    return Subspace(seed, cut.width, rank or max(1, cut.width // 8), cut.vocabulary)


def _check_messages(activation_nbytes: int, batch: int, context: int) -> None:
    """Refuse micro-batches whose tensors no message has room for.

    Raises:
        ConfigError: too many sequences or tokens.
    """
    token_nbytes = len(encode_tokens(np.zeros((1, 1), np.int32))) + 4 * (batch * (context + 1) - 1)
    for what, nbytes, nbytes_max in (
        ("activations", activation_nbytes, limits.ACTIVATION_BYTES_MAX),
        ("tokens", token_nbytes, limits.HOP_INLINE_BYTES_MAX),
    ):
        if nbytes > nbytes_max:
            raise ConfigError(
                f"{what} of a micro-batch of {batch} x {context} tokens",
                f"{nbytes} bytes, at most {nbytes_max}",
                "lower batch_size or the context, and raise micro_batches",
            )
