"""What a demo is asked for, and the run that follows from it."""

from __future__ import annotations

from dataclasses import dataclass

from swarmtrain_protocols.manifest import RunKeys

INNER_STEPS = 20
STEPS = 400
MICRO_BATCHES = 8
INNER_STEPS_STAGES = 10
"""Local steps in a round, where stages step by themselves."""


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """``steps``: inner steps per trainer; a round is INNER_STEPS of them.

    With ``stages`` the model is cut into that many and the peers serve them together; ``steps`` are
    those of the whole pipeline, each agreed in the log. In ``pipeline_mode`` "diloco" each member
    steps its stages by itself, and a stage's members meet every INNER_STEPS_STAGES of them.
    """

    peers: int = 3
    steps: int = STEPS
    overlap: str = "auto"
    codec: str = "int8"
    chaos: bool = False
    dashboard: bool = True
    seed: int = 1234
    stages: int = 0
    pipeline_mode: str = "sync"

    @property
    def stepwise(self) -> bool:
        """All stages step together: what is committed is steps."""
        return self.stages > 0 and self.pipeline_mode == "sync"

    @property
    def inner_steps(self) -> int:
        """Local steps in a round."""
        return INNER_STEPS_STAGES if self.stages else INNER_STEPS

    @property
    def rounds(self) -> int:
        """What the run commits: rounds, or steps of a pipeline; every stage has its own rounds."""
        return self.steps if self.stepwise else max(1, self.steps // self.inner_steps)

    @property
    def commits(self) -> int:
        """Entries of the log that commit something."""
        return self.rounds * (self.stages + 1) if self.stages and not self.stepwise else self.rounds

    def run_keys(self) -> RunKeys:
        """The run: it begins with all members, and goes on with those that are there."""
        if self.stages:
            return RunKeys(
                name="demo",
                seed=self.seed,
                model={"layers": self.stages},
                stages=self.stages,
                micro_batches=MICRO_BATCHES,
                pipeline_mode=self.pipeline_mode,
                inner_steps=self.inner_steps,
                replicas_min=2 if self.peers >= 2 * self.stages else 1,
                total_steps=self.steps,
                inner_warmup_steps=min(50, self.steps // 5),
                max_rounds=self.rounds,
                start_peers=self.peers,
                overlap="off",
                codec_scatter=self.codec,
                codec_gather=self.codec,
            )
        return RunKeys(
            name="demo",
            seed=self.seed,
            inner_steps=INNER_STEPS,
            total_steps=self.rounds * INNER_STEPS,
            inner_warmup_steps=min(50, self.steps // 5),
            max_rounds=self.rounds,
            start_peers=self.peers,
            overlap=self.overlap,
            codec_scatter=self.codec,
            codec_gather=self.codec,
        )
