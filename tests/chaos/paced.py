"""The preset trainer on a slower device: each inner step takes a while longer than it would.

``python -m tests.chaos.paced PAUSE_S SITE_FOLDER OPTIONS`` is ``python -m
swarmtrain.training.trainer`` otherwise. Eight of them on two cores leave room for the rest.
"""

from __future__ import annotations

import os
import sys
import time

from swarmtrain.training import trainer
from swarmtrain.training.data import I64


def main(arguments: list[str]) -> int:
    """Train with pauses; returns the exit code."""
    pause_s = float(arguments[0])

    class Paced(trainer.PresetTrainer):
        def _step(self, tokens: I64, targets: I64) -> None:
            time.sleep(pause_s)  # tidy: allowed because it stands for a slower device
            super()._step(tokens, targets)

    trainer.PresetTrainer = Paced  # type: ignore[misc]
    if os.nice(0) == 0:
        os.nice(trainer.NICENESS)
    return trainer.main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
