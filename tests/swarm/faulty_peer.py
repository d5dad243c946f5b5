"""A peer process with bad luck: replies get lost, requests come twice, its trainer is killed.

``python tests/swarm/faulty_peer.py SITE_DIR`` is ``python -m swarmtrain_peer`` with a layer around
the desk that hands messages to the node, and around the methods that mark the phases of a step.
Nothing of the product knows about it. ``faults.json`` in the site's folder says what is to happen;
what has happened is appended to ``faults.log``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swarmtrain_peer import stage_life
from swarmtrain_peer.process import main
from swarmtrain_peer.stage_desk import StageDesk
from swarmtrain_protocols.core import Effect, PeerId
from swarmtrain_protocols.dataplane import DataPlane
from swarmtrain_protocols.messages.pipeline import HopReply, HopRequest
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.sums import Sums

PHASES = ("forward", "backward", "query", "handover", "exchange")


class Luck:
    """``every``: a trainer dies once in so many steps, at the sites and phases in turn."""

    def __init__(self, folder: Path) -> None:
        plan = json.loads((folder / "faults.json").read_text())
        self.folder = folder
        self.lost, self.doubled = plan["lost"], plan["doubled"]
        self.every, self.place, self.sites = plan["every"], plan["place"], plan["sites"]
        self.random = random.Random(f"{plan['seed']} {self.place}")
        self.step = 0
        self.struck: dict[int, None] = {}

    def note(self, what: str) -> None:
        with open(self.folder / "faults.log", "a", encoding="utf-8") as file:
            file.write(f"{self.step} {what}\n")

    def reached(self, phase: str) -> None:
        """The site is about to do something: perhaps its trainer dies of it."""
        turn = self.step // self.every
        mine = turn % self.sites == self.place and turn % len(PHASES) == PHASES.index(phase)
        if not turn or not mine or turn in self.struck:
            return
        try:
            os.kill(int((self.folder / "trainer.pid").read_text()), signal.SIGKILL)
        except (OSError, ValueError):
            return
        self.struck[turn] = None
        self.note(f"killed {phase}")


class UnluckyDesk(StageDesk):
    """Loses and doubles what arrives from other peers."""

    luck: Luck

    def arrived(self, peer: PeerId, message: HopRequest | HopReply) -> None:
        luck = self.luck
        luck.step = message.id.step
        if isinstance(message, HopReply) and luck.random.random() < luck.lost:
            luck.note("lost")
            return
        super().arrived(peer, message)
        if isinstance(message, HopRequest) and luck.random.random() < luck.doubled:
            luck.note("doubled")
            super().arrived(peer, message)

    def execute(self, effect: Effect) -> bool:
        if isinstance(effect, px.Compute) and effect.kind in ("forward", "backward"):
            self.luck.step = effect.step
            self.luck.reached(effect.kind)
        elif isinstance(effect, px.HandOver):
            self.luck.reached("handover")
        return super().execute(effect)


def _before(owner: Any, name: str, call: Callable[[], None]) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **named: Any) -> Any:
        call()
        return original(*args, **named)

    setattr(owner, name, wrapped)


def run(folder: str) -> int:
    """The peer process, with its luck."""
    luck = UnluckyDesk.luck = Luck(Path(folder))
    stage_life.StageDesk = UnluckyDesk  # type: ignore[misc]
    _before(Sums, "_answer", lambda: luck.reached("query"))
    _before(DataPlane, "reduce", lambda: luck.reached("exchange"))
    return main([folder])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1]))
