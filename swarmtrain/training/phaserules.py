"""What the run prescribes to the phases of a trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from swarmtrain.training.port import Document
from swarmtrain_protocols.errors import ConfigError
from swarmtrain_protocols.overlap import MODES, Mode


@dataclass(frozen=True, slots=True)
class Rules:
    """The run keys that shape a phase; ``wait_s_max`` bounds one wait in seconds.

    ``mode``, ``lr`` and ``beta`` are those of the round in which this trainer attached; with each θ
    the peer process says those of its round.
    """

    mode: Mode
    lr: float
    beta: float
    inner_steps: int
    extra_steps_max: int
    delay: int
    mix: float
    max_base_age: int
    wait_s_max: float

    @classmethod
    def from_run(cls, run: Document, wait_s_max: float) -> Rules:
        """From the run keys of ``Attached.run``, in which nothing is ``auto`` any more.

        Raises:
            ConfigError: keys that were not resolved or do not go together.
        """
        mode = run["overlap"]
        if mode not in MODES or run.get("outer_lr") is None or run.get("outer_momentum") is None:
            raise ConfigError("run keys", "overlap and the outer step are not resolved")
        if run.get("delay", 0) and mode != "off":
            raise ConfigError(
                f"run key overlap = {mode}",
                "delay has a meaning only with overlap off",
                "set overlap = off or delay = 0",
            )
        steps = int(run["inner_steps"])
        return cls(
            cast(Mode, mode),
            float(run["outer_lr"]),
            float(run["outer_momentum"]),
            steps,
            int(steps * float(run.get("max_extra_steps_factor", 2.0))),
            int(run.get("delay", 0)),
            float(run.get("mix", 0.5)),
            int(run.get("max_base_age_rounds", 2)),
            wait_s_max,
        )
