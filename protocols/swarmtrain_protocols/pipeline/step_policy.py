"""What the leader of steps goes by: run keys, its patience, and the factor that clips."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import ConfigError
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.pipeline.paths import path_rule_of


@dataclass(frozen=True, slots=True)
class StepPolicy:
    """Run keys that steps go by, and the patience that is not one of them."""

    micro_batches: int = 16
    close_fraction: float = 0.9
    clip: float = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""
    scatter_codec: str = "fp32"
    gather_codec: str = "fp32"
    lease_ttl_s: float = 3.0
    step_timeout_s: float = 0.0
    """After it a step may close without stragglers; 0: three times the median of past steps."""
    answer_timeout_s: float = 30.0
    """For answers to a query, and at least for a plan."""
    skips: int = 0
    """So many micro-batches of a step may leave out a stage."""

    @property
    def least(self) -> int:
        """Micro-batches without which no step is closed; one of them leaves out no stage."""
        return max(self.skips + 1, math.ceil(self.close_fraction * self.micro_batches))


def step_policy_of(keys: RunKeys) -> StepPolicy:
    """The policy that a run's keys ask for.

    Raises:
        ConfigError: a plan for so many micro-batches and stages does not fit into a message.
    """
    if keys.stages and keys.micro_batches * (keys.stages + 2) > limits.PLAN_OWNERS_MAX:
        raise ConfigError(
            f"run key micro_batches = {keys.micro_batches}",
            f"with {keys.stages} stages at most {limits.PLAN_OWNERS_MAX // (keys.stages + 2)}",
            "lower micro_batches and raise batch_size",
        )
    return StepPolicy(
        micro_batches=keys.micro_batches,
        close_fraction=keys.close_fraction,
        clip=keys.inner_clip,
        scatter_codec=keys.codec_scatter,
        gather_codec=keys.codec_gather,
        step_timeout_s=keys.round_timeout_s,
        skips=path_rule_of(keys).skips,
    )


def clip_scale(square_norms: list[float], clip: float) -> float:
    """Factor that brings the norm of the whole gradient down to ``clip``; an fp32 value, <= 1."""
    total = 0.0
    for value in square_norms:  # by stage, so that every leader gets the same
        total += value
    norm = math.sqrt(total)
    if not clip or norm <= clip:
        return 1.0
    scale: float = struct.unpack("<f", struct.pack("<f", clip / norm))[0]
    return scale
