"""A trainer that computes logits for its peer process: offers, jobs, answers, and its end."""

from __future__ import annotations

import asyncio
import base64
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from swarmtrain_peer.token_desk import TokenDesk
from swarmtrain_protocols.core import Emit, PeerId
from swarmtrain_protocols.errors import ConfigError, LocalProtocolError
from swarmtrain_protocols.messages.pipeline import EMPTY, Tensor
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.generation import TextModel
from swarmtrain_protocols.pipeline.sampling import encode_context, last_logits
from tests.peer.test_writer import Connection

SIZES = {"context": 8, "vocabulary": 5}
ROW = np.arange(5, dtype=np.float32)


class Pipeline:
    """Remembers what the desk tells the node."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def set_answers(self, now: float, answers: bool) -> None:
        self.told.append(("answers", answers))

    def answered(self, now: float, job: int, output: Tensor, service_s: float) -> None:
        self.told.append(("done", job, output, service_s))

    def not_answered(self, now: float, job: int, code: str, reason: str) -> None:
        self.told.append(("failed", job, code))


class World:
    def __init__(self) -> None:
        self.pipeline = Pipeline()
        self.runtime: Any = SimpleNamespace(
            driver=SimpleNamespace(run=lambda call, *args: call(0.0, *args), stages=None),
            node=SimpleNamespace(pipeline=self.pipeline),
            transport=None,
            data=SimpleNamespace(register=lambda blob: None, drop=lambda root: None),
        )
        self.desk = TokenDesk(self.runtime)
        self.trainer: Any = Connection()

    def offer(self, **changes: Any) -> None:
        asyncio.run(self.desk.offer({**SIZES, **changes}, self.trainer))

    def answer(self, job: int = 1, **changes: Any) -> None:
        args = {
            "job": job,
            "wanted": 3,
            "round": 3,
            "logits": base64.b64encode(ROW.tobytes()).decode(),
            "service_s": 0.25,
            **changes,
        }
        asyncio.run(self.desk.logits(args, self.trainer))

    def compute(self, *tokens: int, job: int = 1) -> None:
        text = encode_context(tokens)
        effect = px.Compute(
            job, PeerId(bytes(32)), 0, 0, "generate", 3, 9, EMPTY, EMPTY, text, False
        )
        assert self.desk.execute(effect)

    def told(self) -> list[tuple[Any, ...]]:
        found, self.pipeline.told = self.pipeline.told, []
        return found


def test_the_trainer_is_pushed_a_job_and_its_logits_become_a_tensor() -> None:
    world = World()
    assert world.runtime.driver.stages is world.desk
    world.offer()
    assert world.desk.model == TextModel(8, 5) and world.told() == [("answers", True)]
    world.compute(4, 0, 2)
    assert world.trainer.pushes == [
        {"event": "generate", "job": 1, "wanted": 3, "tokens": [4, 0, 2]}
    ]
    world.answer()
    ((kind, job, tensor, service_s),) = world.told()
    assert (kind, job, service_s) == ("done", 1, 0.25)
    assert last_logits(world.desk.tensors.data_of(tensor), 5).tolist() == ROW.tolist()


def test_large_logits_are_kept_to_be_fetched_and_forgotten_some_rounds_later() -> None:
    world = World()
    world.offer(vocabulary=20_000)
    rows = [np.full(20_000, n, np.float32).tobytes() for n in range(2)]
    world.answer(logits=base64.b64encode(rows[0]).decode())
    (_, (_, _, tensor, _)) = world.told()
    assert not tensor.data and len(world.desk.tensors.data_of(tensor)) == tensor.nbytes
    world.answer(round=5, wanted=5, logits=base64.b64encode(rows[1]).decode())
    with pytest.raises(LocalProtocolError, match="gone"):
        world.desk.tensors.data_of(tensor)


def test_weights_of_another_round_answer_nothing() -> None:
    world = World()
    world.offer()
    world.told()
    world.answer(round=4)
    world.answer(round=2)
    world.answer(error="CUDA out of memory")
    assert [one[2] for one in world.told()] == ["stale", "not_ready", "failed"]


@pytest.mark.parametrize("tokens", [range(9), (5,), (-1,)])
def test_tokens_that_the_model_cannot_read_are_refused(tokens: Any) -> None:
    world = World()
    world.offer()
    world.told()
    world.compute(*tokens)
    assert world.told() == [("failed", 1, "malformed")] and world.trainer.pushes == []


def test_without_a_trainer_nobody_is_asked() -> None:
    world = World()
    world.compute(1)
    assert world.told() == [("failed", 1, "not_ready")]
    world.offer()
    for callback in world.trainer.closing:
        callback()
    assert world.told() == [("answers", True), ("answers", False)] and world.desk.model is None
    world.answer()
    assert world.told() == [], "an answer of a trainer that is gone"


def test_a_trainer_that_is_replaced_closes_without_effect() -> None:
    world = World()
    world.offer()
    first, world.trainer = world.trainer, Connection()
    world.offer()
    world.told()
    for callback in first.closing:
        callback()
    assert world.told() == [] and world.desk.model is not None


def test_values_that_are_none_are_refused() -> None:
    world = World()
    for changes in ({"context": 0}, {"vocabulary": 0}, {"vocabulary": 1 << 30}):
        with pytest.raises(ConfigError):
            world.offer(**changes)
    world.offer()
    for logits in ("AAAA", "no base64", "ä"):
        with pytest.raises(LocalProtocolError):
            world.answer(logits=logits)


def test_effects_of_pipelines_are_not_for_it() -> None:
    assert not World().desk.execute(Emit("x"))
