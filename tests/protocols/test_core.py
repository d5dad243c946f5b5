"""The contract of cores: effects are plain values, compared by what they say."""

from __future__ import annotations

import dataclasses
import math

import pytest

from swarmtrain_protocols import core
from swarmtrain_protocols.core import CancelFetch, Core, Emit, Fetch, PeerId, Persist, short_id
from swarmtrain_protocols.messages.session import Ping


def test_effects_are_values_that_cannot_be_changed() -> None:
    effects = [
        value
        for value in vars(core).values()
        if isinstance(value, type) and dataclasses.is_dataclass(value)
    ]
    assert {effect.__name__ for effect in effects} >= {
        "Send",
        "Connect",
        "Disconnect",
        "Persist",
        "Fetch",
        "CancelFetch",
        "Emit",
    }
    persist = Persist(b"record")
    assert persist == Persist(b"record", reset=False) != Persist(b"record", reset=True)
    assert CancelFetch(1) != CancelFetch(2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        persist.record = b"other"  # type: ignore[misc]
    for effect in effects:
        assert not hasattr(effect, "__dict__") or "__slots__" in vars(effect)


class Echo:
    """The smallest core: answers every message once a second has passed."""

    def __init__(self) -> None:
        self._due = math.inf
        self._effects: list[core.Effect] = []

    def receive(self, now: float, peer: PeerId, message: Ping) -> None:
        self._due = now + 1.0
        self._effects.append(Emit((peer, message)))

    def tick(self, now: float) -> None:
        if now >= self._due:
            self._effects.append(Fetch(1, PeerId(bytes(32)), bytes(32), 0, 1, "purpose"))
            self._due = math.inf

    def deadline(self) -> float:
        return self._due

    def drain(self) -> list[core.Effect]:
        effects, self._effects = self._effects, []
        return effects


def test_a_core_is_four_calls() -> None:
    echo: Core = Echo()
    assert echo.deadline() == math.inf
    echo.receive(5.0, PeerId(bytes(32)), Ping(1))
    assert echo.deadline() == 6.0
    echo.tick(5.5)
    assert [type(effect) for effect in echo.drain()] == [Emit]
    echo.tick(echo.deadline())
    assert [type(effect) for effect in echo.drain()] == [Fetch]
    assert echo.drain() == []


def test_short_ids_are_for_people() -> None:
    assert short_id(bytes.fromhex("00ff" * 16)) == "00ff00ff"
