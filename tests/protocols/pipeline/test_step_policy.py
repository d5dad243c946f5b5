"""What steps go by."""

from __future__ import annotations

import math

import numpy as np
import pytest

from swarmtrain_protocols.errors import ConfigError
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.pipeline.step_policy import StepPolicy, clip_scale, step_policy_of


def test_run_keys_become_a_policy() -> None:
    keys = RunKeys(stages=3, micro_batches=10, close_fraction=0.75, inner_clip=2.0)
    policy = step_policy_of(keys)
    assert (policy.micro_batches, policy.least, policy.clip) == (10, 8, 2.0)
    assert (policy.scatter_codec, policy.gather_codec) == (keys.codec_scatter, keys.codec_gather)


@pytest.mark.parametrize(("count", "fraction", "least"), [(1, 0.1, 1), (16, 0.9, 15), (4, 1.0, 4)])
def test_the_least_that_closes_a_step(count: int, fraction: float, least: int) -> None:
    assert StepPolicy(count, fraction).least == least


def test_with_skips_one_more_than_those_that_may_leave_out_a_stage() -> None:
    keys = RunKeys(stages=2, micro_batches=8, close_fraction=0.25, skip_fraction=0.5)
    assert (step_policy_of(keys).skips, step_policy_of(keys).least) == (4, 5)
    alone = RunKeys(stages=2, micro_batches=1, skip_fraction=0.5)
    assert (step_policy_of(alone).skips, step_policy_of(alone).least) == (0, 1)


def test_a_plan_that_fits_in_no_message_is_a_wrong_key() -> None:
    with pytest.raises(ConfigError, match="micro_batches"):
        step_policy_of(RunKeys(stages=100, micro_batches=4096))
    assert step_policy_of(RunKeys(micro_batches=4096)).micro_batches == 4096, "no pipeline"


def test_the_gradient_is_clipped_once_by_its_norm_over_all_stages() -> None:
    parts = [np.array([3.0, 0.0]), np.array([0.0, 4.0]), np.array([12.0])]
    norms = [float(np.sum(p * p)) for p in parts]
    assert clip_scale(norms, 1.0) == float(np.float32(1 / 13))
    assert clip_scale(norms, 13.0) == clip_scale(norms, 0.0) == clip_scale([], 1.0) == 1.0
    whole = np.concatenate(parts) * clip_scale(norms, 6.5)
    assert np.linalg.norm(whole) == pytest.approx(6.5)
    assert math.isfinite(clip_scale([2.0**240] * 100, 1.0)) and clip_scale([2.0**240], 1.0) > 0
