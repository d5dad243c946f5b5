"""Shards at the peer process: what its trainer is told, what people see, whose data are refused."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from swarmtrain_peer.shard_desk import ShardDesk, claiming
from swarmtrain_protocols import entries as e
from swarmtrain_protocols.errors import ConfigError, LocalProtocolError, RunMismatch
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.messages.common import Span
from swarmtrain_protocols.messages.member import Propose
from swarmtrain_protocols.node_events import LedgerChanged
from swarmtrain_protocols.rounds.offer import Offer
from swarmtrain_protocols.shards import data_state
from tests.protocols.rounds_kit import A, B, Log

DIGEST = "ab" * 32


class Connection:
    """A trainer's end: what it was pushed."""

    def __init__(self) -> None:
        self.pushed: list[dict[str, Any]] = []
        self.gone: Callable[[], None] = lambda: None

    def push(self, document: dict[str, Any]) -> None:
        self.pushed.append(document)

    def on_close(self, callback: Callable[[], None]) -> None:
        self.gone = callback


class Runtime:
    """A ledger, a log that takes what is proposed, and events that are kept."""

    def __init__(self, shards: int = 10) -> None:
        self.log = Log(A, B)
        self.log.ledger.data = data_state(shards, 5)
        self.listeners: list[Callable[[object], None]] = []
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.manifest = SimpleNamespace(keys=RunKeys(shards=shards))
        self.node = SimpleNamespace(
            me=A, ledger=self.log.ledger, log=SimpleNamespace(leader=A), propose="propose"
        )
        self.events = SimpleNamespace(emit=lambda name, **fields: self.told.append((name, fields)))
        self.driver = SimpleNamespace(run=self._run)

    def _run(self, call: object, request: Propose) -> None:
        assert call == "propose"
        self.add(e.decode_body(request.body))

    def add(self, body: e.EntryBody) -> None:
        accepted = self.log.add(body)
        event = LedgerChanged(((self.log.ledger.index, body, accepted),))
        for listener in self.listeners:
            listener(event)

    async def until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        return condition()


def desk(runtime: Runtime) -> ShardDesk:
    return ShardDesk(runtime)  # type: ignore[arg-type]


def say(shards: ShardDesk, connection: Connection, samples: int = 100, digest: str = DIGEST) -> Any:
    args = {"samples": samples, "digest": digest}
    return asyncio.run(shards.data(args, connection))  # type: ignore[arg-type]


def test_the_first_trainers_data_are_logged_and_leases_are_pushed_as_they_change() -> None:
    runtime, connection = Runtime(), Connection()
    shards = desk(runtime)
    found = say(shards, connection)
    assert found == {"generation": 0, "round": 0, "held": [[0, 20]], "listed": []}
    assert connection.pushed[-1] == {"event": "leases", **found}
    before = len(connection.pushed)
    runtime.add(e.NoOp())
    assert len(connection.pushed) == before, "nothing has changed"
    runtime.add(e.MemberLeft(A, "lost"))
    assert connection.pushed[-1]["held"] == []
    connection.gone()
    runtime.add(e.MemberLeft(B, "lost"))
    assert len(connection.pushed) == before + 1
    assert shards.document()["shards_free"] == 4


def test_other_data_than_the_runs_are_refused() -> None:
    runtime, connection = Runtime(), Connection()
    shards = desk(runtime)
    say(shards, connection)
    with pytest.raises(RunMismatch, match="not the data"):
        say(shards, connection, digest="cd" * 32)
    with pytest.raises(RunMismatch, match="101 samples here"):
        say(shards, connection, samples=101)
    with pytest.raises(ConfigError, match="cannot be dealt"):
        say(shards, connection, samples=0)
    with pytest.raises(ConfigError, match="not dealt"):
        say(desk(Runtime(shards=0)), connection)


def test_people_see_epochs_shards_and_who_holds_them() -> None:
    runtime = Runtime(shards=4)
    shards = desk(runtime)
    assert shards.document()["samples"] is None and shards.document()["epochs"] == 0.0
    say(shards, Connection(), samples=40)
    found = shards.document()
    assert (found["shards"], found["epoch"], found["shards_done"]) == (4, 0, 0)
    assert found["shards_held"] == 4 and found["digest"] == DIGEST
    assert shards.of_member(A)["shards"] == [0, 1] and shards.of_member(A)["samples_left"] == 20
    assert shards.of_member(b"?" * 32) == {"shards": [], "samples_left": 0, "samples_last": None}
    runtime.add(e.MemberLeft(B, "lost"))
    assert ("shards_returned", {"peer": B.hex(), "shards": 2}) in runtime.told
    data = runtime.log.ledger.data
    for number in range(1, 9):
        claims = data.held(A)[:1]
        data.opened([(A, claims)])
        data.decided([A], number)
        data.deal([A])
        runtime.add(e.NoOp())
    finished = [fields for name, fields in runtime.told if name == "epoch_finished"]
    assert finished[0]["epoch"] == 0 and finished[0]["counted"] >= 40
    assert shards.document()["epochs"] == data.counted / 40 >= 1


def test_claims_of_a_hand_over() -> None:
    offer = Offer("train/0/0", b"r", 8, "fp32", 4.0, 0, 0)
    assert claiming(offer, {}).claims == ()
    assert claiming(offer, {"claims": [[3, 4]]}).claims == (Span(3, 4),)
    for wrong in ([[1]], [["x", 2]], [3]):
        with pytest.raises(LocalProtocolError):
            claiming(offer, {"claims": wrong})


def test_what_was_returned_goes_along_with_its_samples() -> None:
    offer = claiming(Offer("train/0/0", b"r", 8, "fp32", 4.0, 0, 0), {"carried": 6.0, "age": 2})
    assert (offer.samples, offer.age) == (10.0, 2)
    for wrong in ({"carried": -1.0}, {"carried": math.nan}, {"carried": "x"}, {"age": -1}):
        with pytest.raises(LocalProtocolError):
            claiming(Offer("train/0/0", b"r", 8, "fp32", 4.0, 0, 0), wrong)
