"""A trainer that answers prompts by θ, whatever its own model has become meanwhile."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
import torch

from swarmtrain.training.model import BYTES, ByteGPT, Sizes
from swarmtrain.training.speaker import Judge, Speaker
from swarmtrain_protocols.errors import ConfigError

SIZES = Sizes(d_model=16, layers=1, heads=2, context=8)


class Swarm:
    """θ of rounds: models of different seeds."""

    def __init__(self, seed: int = 1) -> None:
        self.rounds: tuple[int, ...] = (0,)
        self.seed = seed
        self.reads = 0
        self.handlers: dict[str, Any] = {}
        self.told: list[tuple[str, dict[str, Any]]] = []

    def shown(self) -> tuple[int, ...]:
        return self.rounds

    def theta(self) -> tuple[int, Any]:
        self.reads += 1
        return min(self.rounds, default=0), dict(ByteGPT(SIZES, self.seed).state_dict())

    def state_dict(self, vectors: Any) -> Any:
        return vectors

    def on(self, name: str, callback: Any) -> None:
        self.handlers[name] = callback

    def tell(self, call: str, args: dict[str, Any]) -> None:
        self.told.append((call, args))

    def ask(self, tokens: list[int], wanted: int = 0) -> dict[str, Any]:
        self.handlers["generate"]({"job": 7, "wanted": wanted, "tokens": tokens})
        call, args = self.told[-1]
        assert call == "logits"
        return args


def make(swarm: Any) -> Speaker:
    judge = Judge(swarm, ByteGPT(SIZES, 99))
    return Speaker(swarm, judge, context=SIZES.context, vocabulary=BYTES)


def test_it_offers_at_once_and_to_every_new_peer_process() -> None:
    swarm = Swarm()
    make(swarm)
    swarm.handlers["peer_attached"]({"session": 2})
    assert swarm.told == [("generates", {"context": 8, "vocabulary": 256})] * 2


def test_logits_are_those_of_theta_after_the_last_token() -> None:
    swarm = Swarm()
    make(swarm)
    swarm.rounds, swarm.seed = (4,), 2
    answer = swarm.ask([1, 2, 3], wanted=4)
    found = np.frombuffer(base64.b64decode(answer["logits"]), "<f4")
    with torch.no_grad():
        expected = ByteGPT(SIZES, 2)(torch.tensor([[1, 2, 3]]))[0, -1].numpy()
    assert np.array_equal(found, expected)
    assert (answer["job"], answer["wanted"], answer["round"]) == (7, 4, 4)
    assert 0 < answer["service_s"] < 60


def test_weights_are_taken_up_once_a_round() -> None:
    swarm = Swarm()
    make(swarm)
    first = swarm.ask([1])["logits"]
    assert swarm.ask([1])["logits"] == first and swarm.reads == 1
    swarm.rounds, swarm.seed = (1, 0), 5
    answer = swarm.ask([1])
    assert swarm.reads == 2 and answer["logits"] != first
    assert answer["round"] == 1, "the round of the first fragment"


def test_what_the_model_cannot_do_is_an_answer_too() -> None:
    swarm = Swarm()
    make(swarm)
    answer = swarm.ask([1] * 9)
    assert "logits" not in answer and answer["error"]
    assert swarm.ask([1])["logits"]


def test_a_model_of_other_parameters_is_refused() -> None:
    judge = Judge(Swarm(), torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="lacks"):
        judge.load()


def test_offline_the_weights_are_read_each_time() -> None:
    swarm = Swarm()
    swarm.rounds = ()
    judge = Judge(swarm, ByteGPT(SIZES, 1))  # type: ignore[arg-type]
    assert judge.load() == judge.load() == (0,)
    assert swarm.reads == 2
