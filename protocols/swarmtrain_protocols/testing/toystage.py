"""A model in stages without a model: activations are digests, gradients count micro-batches.

Every output is a digest of everything that goes into it, weights included, so that one wrong byte
or one stale weight anywhere on the path shows at the end. The gradient of hop h and micro-batch k
is a vector of small integers: a one at the place of (h, k), so that a sum says how often each was
added, and a fingerprint of the tensors it was computed from. Sums of them are exact in fp32.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from swarmtrain_protocols.codecs.base import F32
from swarmtrain_protocols.pipeline.hops import stage_of

FINGERPRINT = 4
ACTIVATION_BYTES = 24
LOSS_MAX = 4.0

I64: TypeAlias = npt.NDArray[np.int64]


def digest(*parts: bytes | int | str) -> bytes:
    """32 bytes of everything given, unambiguous."""
    state = hashlib.blake2b(digest_size=32)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        state.update(len(data).to_bytes(4, "little") + data)
    return state.digest()


@dataclass(frozen=True)
class Backward:
    """What a backward gives: gradient of the input, gradient of the weights, the head's loss."""

    output: bytes
    gradient: I64
    loss: float


@dataclass(frozen=True)
class Toy:
    """A model of ``stages`` block stages and ``micro_batches`` per step."""

    seed: int
    stages: int
    micro_batches: int

    @property
    def values(self) -> int:
        """Of each stage: a count per micro-batch and hop of the stage, and the fingerprint."""
        return 2 * self.micro_batches + FINGERPRINT

    def first(self, stage: int) -> F32:
        """Weights of a stage at step 0, f32[values]."""
        data = digest("weights", self.seed, stage) * (1 + self.values // 32)
        drawn = np.frombuffer(data[: self.values], np.uint8).astype(np.float32)
        return np.asarray(drawn / np.float32(64.0), np.float32)

    def tokens(self, step: int, k: int) -> bytes:
        return digest("tokens", self.seed, step, k)[:16]

    @property
    def layout(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Tensors of a block stage, for the arithmetic of ``pipeline.candidates``."""
        return (("block.out.weight", (self.values, 1)),)

    def calibration(self, k: int) -> bytes:
        """Tokens that no step trains on."""
        return digest("calibration", self.seed, k)[:16]

    def place(self, hop: int, k: int) -> int:
        """Where in the gradient of its stage (hop, k) is counted."""
        return k + (self.micro_batches if hop == self.stages + 1 else 0)

    def forward(self, hop: int, theta: F32, inputs: bytes, tokens: bytes) -> bytes:
        return digest("forward", hop, theta.tobytes(), inputs, tokens)[:ACTIVATION_BYTES]

    def backward(
        self, hop: int, k: int, theta: F32, inputs: bytes, gradient: bytes, tokens: bytes
    ) -> Backward:
        mark = digest("backward", hop, k, theta.tobytes(), inputs, gradient, tokens)
        found = np.zeros(self.values, np.int64)
        found[self.place(hop, k)] = 1
        found[-FINGERPRINT:] = [byte % 8 for byte in mark[:FINGERPRINT]]
        loss = int.from_bytes(mark[4:6], "little") / 65536 * LOSS_MAX
        head = hop == self.stages + 1
        return Backward(mark[:ACTIVATION_BYTES] if hop else b"", found, loss if head else 0.0)

    def evaluate(self, tokens: bytes, thetas: dict[int, F32]) -> float:
        """Loss of a forward through all stages that is no part of a step."""
        x = b""
        for hop in range(self.stages + 1):
            x = self.forward(hop, thetas[hop], x, tokens if hop == 0 else b"")
        return self.loss(thetas[0], x, tokens)

    def loss(self, theta: F32, inputs: bytes, tokens: bytes) -> float:
        """What the head says of an activation that nobody trains on."""
        mark = digest("loss", theta.tobytes(), inputs, tokens)
        return int.from_bytes(mark[:2], "little") / 65536 * LOSS_MAX

    def counts(self, stage: int, total: I64) -> dict[int, dict[int, int]]:
        """How often each micro-batch is in a sum of gradients of ``stage``, by hop."""
        hops = (0, self.stages + 1) if stage == 0 else (stage,)
        return {
            hop: {
                k: int(total[self.place(hop, k)])
                for k in range(self.micro_batches)
                if total[self.place(hop, k)]
            }
            for hop in hops
        }

    def whole(
        self, step: int, k: int, thetas: dict[int, F32], path: tuple[int, ...]
    ) -> tuple[dict[int, I64], float]:
        """The reference: gradients by hop and loss of a micro-batch, computed in one process."""
        tokens, x = self.tokens(step, k), b""
        inputs: dict[int, bytes] = {}
        for hop in path:
            inputs[hop] = x
            theta = thetas[stage_of(hop, self.stages)]
            x = self.forward(hop, theta, x, tokens if hop == 0 else b"")
        gradients: dict[int, I64] = {}
        g, loss = b"", 0.0
        for hop in reversed(path):
            ends = hop in (0, self.stages + 1)
            theta = thetas[stage_of(hop, self.stages)]
            made = self.backward(hop, k, theta, inputs[hop], g, tokens if ends else b"")
            gradients[hop], g = made.gradient, made.output
            loss += made.loss
        return gradients, loss
