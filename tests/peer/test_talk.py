"""Hearing a text: pieces in order, typed ends, and a peer process that goes away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from swarmtrain_peer import talk
from swarmtrain_peer.control import ControlClosed, ControlTimeout, error_to_dict
from swarmtrain_peer.talk import Talk
from swarmtrain_protocols.errors import NoWorker, RunOver

Document = dict[str, Any]


class Client:
    """Pushes ``pushes`` while the call is made."""

    def __init__(self, *pushes: Document) -> None:
        self.pushes = pushes
        self.asked: list[tuple[str, Document | None]] = []
        self.hear: Callable[[Document], None] = lambda push: None
        self.end: Callable[[], None] = lambda: None

    def call(self, name: str, args: Document | None = None, timeout_s: float = 30.0) -> Document:
        self.asked.append((name, args))
        for push in self.pushes:
            self.hear(push)
        return {"begun": True}

    def subscribe(self, callback: Callable[[Document], None]) -> None:
        self.hear = callback

    def on_close(self, callback: Callable[[], None]) -> None:
        self.end = callback


def said(**fields: Any) -> Document:
    return {"event": "generated", **fields}


def test_pieces_come_in_order_and_other_pushes_are_not_for_it() -> None:
    client = Client(said(token=1), {"event": "event"}, said(token=2), said(finish="stop"))
    found = Talk(client, {"prompt": "a"})
    assert found.begun == {"begun": True} and client.asked == [("generate", {"prompt": "a"})]
    assert list(found.pieces()) == [said(token=1), said(token=2), said(finish="stop")]


def test_an_error_after_some_pieces_keeps_its_type() -> None:
    error = error_to_dict(RunOver("the run is over", "max_rounds"))
    pieces = Talk(Client(said(token=1), said(error=error)), {}).pieces()
    assert next(pieces) == said(token=1)
    with pytest.raises(RunOver, match="max_rounds"):
        next(pieces)


def test_a_refusal_is_raised_at_once() -> None:
    class Refuses(Client):
        def call(self, name: str, args: Any = None, timeout_s: float = 30.0) -> Document:
            raise NoWorker("the run has no model yet")

    with pytest.raises(NoWorker):
        Talk(Refuses(), {})


def test_a_peer_process_that_goes_away_is_noticed() -> None:
    client = Client(said(token=1))
    found = Talk(client, {})
    client.end()
    pieces = found.pieces()
    assert next(pieces) == said(token=1)
    with pytest.raises(ControlClosed):
        next(pieces)


def test_silence_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(talk, "PIECE_TIMEOUT_S", 0.01)
    with pytest.raises(ControlTimeout, match=r"0\.03"):
        next(Talk(Client(), {"timeout_s": 0.02}).pieces())
