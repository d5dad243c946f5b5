"""What the desk of a stage's trainer does with the cores' effects."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from swarmtrain_peer import stage_link as sl
from swarmtrain_peer.stage_desk import StageDesk
from swarmtrain_protocols.messages.pipeline import StepKey
from swarmtrain_protocols.pipeline import effects as px


class Port:
    """Takes commands and answers none."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def submit(self, command: sl.Command, payload: object, answer: object) -> None:
        self.sent.append(command)


def test_what_was_asked_of_a_trainer_that_is_lost_never_reaches_the_next_one() -> None:
    worker = SimpleNamespace(life=3)
    desk: Any = object.__new__(StageDesk)  # no swarm around it
    desk._runtime = SimpleNamespace(node=SimpleNamespace(pipeline=SimpleNamespace(worker=worker)))
    desk._port, desk._local = Port(), False
    key = StepKey(0, 1, 0)
    asked = (px.ClearGradients((0,), 3), px.HandOver(0, key, "fp32", 3), px.LocalStep(0, 7, 3))
    for effect in asked:
        assert desk.execute(effect)
    sent, desk._port.sent = desk._port.sent, []
    assert sent == [sl.Clear((0,)), sl.Gradient(0), sl.Step(0, 7)]
    worker.life = 4
    for effect in asked:
        assert desk.execute(effect), "it is taken, and dropped"
    assert desk._port.sent == []
