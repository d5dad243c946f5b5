"""Random swarms lose stages in random trouble: what comes back is checked, and that steps go on."""

from __future__ import annotations

import os
from collections import Counter

from swarmtrain_protocols.testing.pipeline_losses import run_losses

SEEDS = max(6, int(os.environ.get("SWARMTRAIN_SIM_SEEDS", "0")) // 8)
FIRST = (62,)
"""In this one a worker comes back late, with a state that was given up for a rebuilt one."""


def test_stages_come_back_in_any_weather_and_steps_go_on() -> None:
    seen: Counter[str] = Counter()
    for seed in (*FIRST, *range(SEEDS - len(FIRST))):
        swarm = run_losses(seed)
        assert len(swarm.steps.committed) >= 2, seed
        seen += swarm.world.seen
    lost, back = seen["entry:StageLost"], seen["entry:StageRecovered"]
    assert lost >= SEEDS // 4 and back >= SEEDS // 5
    assert back > seen["recovered:kept"], "not only states that came back themselves"
