"""What the desk of a stage's trainer does with the cores' effects."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from swarmtrain_peer import stage_link as sl
from swarmtrain_peer.stage_desk import StageDesk
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.messages.pipeline import StepKey
from swarmtrain_protocols.pipeline import effects as px


class Port:
    """Takes commands; their answers come when the test says so."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.answers: list[Callable[..., None]] = []

    def submit(self, command: sl.Command, payload: object, answer: Callable[..., None]) -> None:
        self.sent.append(command)
        self.answers.append(answer)


KEY = StepKey(0, 1, 0)


def test_what_was_asked_of_a_trainer_that_is_lost_never_reaches_the_next_one() -> None:
    worker = SimpleNamespace(life=3)
    desk: Any = object.__new__(StageDesk)  # no swarm around it
    desk._runtime = SimpleNamespace(node=SimpleNamespace(pipeline=SimpleNamespace(worker=worker)))
    desk._port, desk._local = Port(), False
    asked = (px.ClearGradients((0,), 3), px.HandOver(0, KEY, "fp32", 3), px.LocalStep(0, 7, 3))
    for effect in asked:
        assert desk.execute(effect)
    sent, desk._port.sent = desk._port.sent, []
    assert sent == [sl.Clear((0,)), sl.Gradient(0), sl.Step(0, 7)]
    worker.life = 4
    for effect in asked:
        assert desk.execute(effect), "it is taken, and dropped"
    assert desk._port.sent == []


@pytest.mark.parametrize(
    ("life", "pledged", "told", "dropped"),
    [(3, b"", 1, 0), (4, b"", 0, 1), (4, b"another", 0, 1), (4, b"gradient", 0, 0)],
    ids=["in time", "its trainer died", "another one is pledged", "its successor made the same"],
)
def test_what_was_encoded_when_its_trainer_died_is_not_handed_over(
    life: int, pledged: bytes, told: int, dropped: int
) -> None:
    root = b"gradient"
    calls: list[tuple[Any, ...]] = []
    encoding: list[tuple[Callable[[], Blob], Callable[[Blob], None]]] = []
    worker = SimpleNamespace(life=3)
    pipeline = SimpleNamespace(worker=worker, handed_over="handed_over")
    offer = SimpleNamespace(root=pledged) if pledged else None
    desk: Any = object.__new__(StageDesk)  # no swarm around it
    desk._runtime = SimpleNamespace(
        node=SimpleNamespace(
            pipeline=pipeline, member=SimpleNamespace(undecided=lambda channel: offer)
        ),
        data=SimpleNamespace(
            encode=lambda values, codec: SimpleNamespace(root=root, sum=values.sum()),
            drop=lambda dropped_root: calls.append(("drop", dropped_root)),
        ),
        driver=SimpleNamespace(
            offload=lambda work, done, **kwargs: encoding.append((work, done)),
            run=lambda method, *args: calls.append((method, *args)),
        ),
    )
    desk._port, desk._local = Port(), False
    assert desk.execute(px.HandOver(0, KEY, "fp32", 3))
    (answer,) = desk._port.answers
    answer(sl.Done(), bytearray(np.ones(4, "<f4").tobytes()))
    ((work, done),) = encoding
    worker.life = life
    done(work())
    assert calls == told * [("handed_over", 0, KEY, root)] + dropped * [("drop", root)]
