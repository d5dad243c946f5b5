"""Small models and token batches for tests of stages."""

from __future__ import annotations

from typing import Any

import numpy as np

from swarmtrain.training.stages.runtime import StageRuntime
from swarmtrain_protocols.codecs.boundary import I32

DECODER = {"d_model": 32, "layers": 4, "heads": 4, "kv_heads": 2, "context": 16, "vocabulary": 40}
BYTE_GPT = {"d_model": 32, "layers": 4, "heads": 4, "context": 16}


def keys(**changes: Any) -> dict[str, Any]:
    """Run keys of a decoder in four stages."""
    base = {
        "preset": "decoder-tiny",
        "model": DECODER,
        "stages": 4,
        "seed": 7,
        "batch_size": 3,
        "boundary_codec": "fp32",
    }
    return {**base, **changes}


def byte_gpt(**changes: Any) -> dict[str, Any]:
    """Run keys of a ByteGPT in four stages."""
    return keys(**{"preset": "lm-tiny", "model": BYTE_GPT, **changes})


def whole(given: dict[str, Any], dtype: str = "float32") -> StageRuntime:
    """A runtime that serves every stage."""
    return StageRuntime.build(given, range(given["stages"] + 1), dtype=dtype)


def tokens(number: int, batch: int = 3, time: int = 17, vocabulary: int = 40) -> I32:
    """i32 [batch, time], another for every number."""
    rng = np.random.default_rng([42, number])
    return rng.integers(0, vocabulary, (batch, time), dtype=np.int32)


def away_from_start(theta: np.ndarray[Any, Any], stage: int) -> np.ndarray[Any, Any]:
    """Weights in which every tensor matters: θ⁰ has gains of one and tiny outputs."""
    rng = np.random.default_rng([9, stage])
    noise = rng.standard_normal(theta.shape).astype(np.float32)
    return (theta + np.float32(0.05) * noise).astype(np.float32)
