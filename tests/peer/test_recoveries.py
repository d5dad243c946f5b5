"""Lost stages and how they came back."""

from __future__ import annotations

import pytest

from swarmtrain_peer import host
from swarmtrain_peer.recoveries import RECOVERIES_KEPT, Recoveries
from swarmtrain_protocols import entries as e
from swarmtrain_protocols.node_events import LedgerChanged
from tests.protocols.rounds_kit import A, B


def heard(book: Recoveries, *bodies: e.EntryBody, accepted: bool = True) -> None:
    book.watch(LedgerChanged(tuple((1, body, accepted) for body in bodies)))


def back(stage: int, choice: int = 1) -> e.StageRecovered:
    return e.StageRecovered(
        stage, 7, B, ("average", "copy-left"), (2.5, 2.25), choice, (), b"r" * 32
    )


def test_a_recovery_from_loss_to_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    book, now = Recoveries(), [100.0]
    monkeypatch.setattr(host, "wall_s", lambda: now[0])
    heard(book, e.StageLost(2, 7, A, "gone"))
    (one,) = book.documents()
    assert (one["stage"], one["host"], one["choice"]) == (2, A.hex(), None)
    now[0] = 105.0
    heard(book, e.StageLost(2, 7, B, "the host is gone"), e.StageLost(1, 7, A, "gone"))
    now[0] = 112.0
    heard(book, back(2), accepted=False)
    heard(book, back(2))
    first, second = book.documents()
    assert (first["host"], first["lost_wall_s"], first["back_wall_s"]) == (B.hex(), 100.0, 112.0)
    assert (first["choice"], first["loss"]) == ("copy-left", 2.25)
    assert first["candidates"] == [
        {"name": "average", "loss": 2.5},
        {"name": "copy-left", "loss": 2.25},
    ]
    assert (second["stage"], second["choice"]) == (1, None)


def test_what_was_lost_before_is_not_made_up_and_memory_is_bounded() -> None:
    book = Recoveries()
    heard(book, back(3))
    assert book.documents() == []
    for number in range(2 * RECOVERIES_KEPT):
        heard(book, e.StageLost(number % 5, number, A, "gone"), back(number % 5, 0))
    assert len(book.documents()) == RECOVERIES_KEPT
    assert all(one["choice"] == "average" for one in book.documents())
