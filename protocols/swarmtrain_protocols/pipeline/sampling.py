"""Which token comes next: greedy, or drawn by temperature, top-k and top-p, from a seed (spec 11).

The draw at a position is a pure function of (logits, settings, position), so a generation that goes
on at another worker, or begins again, says the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swarmtrain_protocols import limits
from swarmtrain_protocols.codecs.base import F32
from swarmtrain_protocols.codecs.boundary import (
    HEADER,
    Bounds,
    Buffer,
    encode_tokens,
    get_boundary_codec,
)
from swarmtrain_protocols.errors import ConfigError, LocalProtocolError, PeerFault


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen.

    ``temperature`` divides logits; 0 is greedy. ``top_k``: only the k likeliest; 0: all.
    ``top_p``: of those, only the likeliest that together reach this probability, at least one.

    Raises:
        ConfigError: a setting out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature {self.temperature}", "0 (greedy) or more")
        if self.top_k < 0:
            raise ConfigError(f"top_k {self.top_k}", "0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p}", "more than 0, at most 1")
        if not 0 <= self.seed < 1 << 64:
            raise ConfigError(f"seed {self.seed}", "0 to 2^64 - 1")


def decode_logits(data: Buffer, batch_max: int, vocabulary: int) -> F32:
    """Logits f32 [batch, vocabulary] as the head answers them.

    Raises:
        PeerFault: ``malformed``, ``oversize`` or ``non_finite``.
    """
    found = get_boundary_codec("fp32").decode(data, Bounds(batch_max, 1, vocabulary))
    return found[:, 0].astype(np.float32)


def encode_context(tokens: Sequence[int]) -> bytes:
    """Token ids of one sequence, in order, as a request carries them: i32 [1, time]."""
    return encode_tokens(np.array([tokens], np.int32))


def last_logits(data: Buffer, vocabulary: int = 0) -> F32:
    """The one row of logits f32 [vocabulary] of an answer; 0: as many as the answer says.

    Raises:
        PeerFault: ``malformed``, ``oversize`` or ``non_finite``.
    """
    if not vocabulary:
        view = memoryview(data).cast("B")
        if view.nbytes < HEADER.size:
            raise PeerFault("malformed", f"logits of {view.nbytes} bytes")
        vocabulary = int(HEADER.unpack_from(view)[-1])
        if vocabulary > limits.VOCABULARY_MAX:
            raise PeerFault("oversize", f"logits of {vocabulary} tokens")
    row: F32 = decode_logits(data, 1, vocabulary)[0]
    return row


def next_token(logits: F32, sampling: Sampling, position: int) -> int:
    """The token at ``position`` (0 is the first token of the prompt), from finite f32 [vocabulary].

    Ties go to the lower token id.

    Raises:
        LocalProtocolError: not one row of finite logits.
    """
    if logits.ndim != 1 or not logits.size or not bool(np.isfinite(logits).all()):
        raise LocalProtocolError(f"logits of shape {logits.shape}", "one finite row is needed")
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    scores = logits.astype(np.float64)
    order = np.argsort(-scores, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    # Differences first: a tiny temperature would overflow the quotient of a large logit.
    weights = np.exp((scores[order] - scores[order[0]]) / sampling.temperature)
    reached = np.cumsum(weights / weights.sum())
    if sampling.top_p < 1.0:
        kept = int(np.searchsorted(reached, sampling.top_p)) + 1
        order, weights = order[:kept], weights[:kept]
        reached = np.cumsum(weights / weights.sum())
    key = np.array([sampling.seed, position], np.uint64)
    drawn = float(np.random.Philox(key=key).random_raw(1)[0] >> np.uint64(11)) * 2.0**-53
    place = int(np.searchsorted(reached, drawn, side="right"))
    return int(order[min(place, order.size - 1)])
