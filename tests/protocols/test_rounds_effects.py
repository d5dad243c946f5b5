"""Effects and purposes are values: equal by content, usable as keys, never changed."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from swarmtrain_protocols.rounds import effects as fx
from tests.protocols.rounds_kit import TRAIN, hash_of, key

KINDS = [kind for _, kind in inspect.getmembers(fx, dataclasses.is_dataclass)]


def test_purposes_of_fetches_are_keys() -> None:
    one = fx.ContributionPart(key(), 1, 2)
    assert one == fx.ContributionPart(key(), 1, 2)
    assert len({one, fx.ContributionPart(key(), 1, 2), fx.ContributionPart(key(), 1, 3)}) == 2
    assert fx.Snapshot(TRAIN, 1, hash_of("x"), 3) != fx.Snapshot(TRAIN, 2, hash_of("x"), 3)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_effect_cannot_be_changed_and_says_what_it_is(kind: type) -> None:
    values = {field.name: None for field in dataclasses.fields(kind)}
    effect = kind(**values)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(effect, next(iter(values)), 1)
    assert kind.__doc__ and not kind.__doc__.startswith(kind.__name__ + "(")
