"""What a node tells the layer above: plain values."""

from __future__ import annotations

import dataclasses

import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.node_events import JoinFailed, LedgerChanged


def test_events_are_values() -> None:
    change = LedgerChanged(((3, e.NoOp(), True),))
    assert change == LedgerChanged(((3, e.NoOp(), True),))
    assert JoinFailed("banned", "why") != JoinFailed("banned", "other")
    with pytest.raises(dataclasses.FrozenInstanceError):
        change.entries = ()  # type: ignore[misc]
