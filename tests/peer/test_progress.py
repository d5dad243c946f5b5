"""Who keeps up with the log."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from swarmtrain_peer.progress import is_behind

NAME = "train/1/0"


@pytest.mark.parametrize(
    ("round_", "known", "behind"),
    [(7, True, False), (6, True, False), (5, True, True), (8, True, True), (7, False, True)],
)
def test_the_step_that_is_being_applied_is_no_lag(round_: int, known: bool, behind: bool) -> None:
    track = SimpleNamespace(round=round_, state_hash=b"h" * 32 if known else None)
    node: Any = SimpleNamespace(
        catchup=SimpleNamespace(tracks={NAME: track}),
        ledger=SimpleNamespace(channels={NAME: SimpleNamespace(round=7)}),
    )
    assert is_behind(node, NAME) is behind
    assert is_behind(node, "train/2/0"), "a state that is not here"
