"""Figures: what is told after a round, what is believed of others, when it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from swarmtrain_peer import figures as module
from swarmtrain_peer.events import EventLog
from swarmtrain_peer.figures import Figures
from swarmtrain_peer.roundclock import RoundClock
from swarmtrain_peer.siterate import SiteRate
from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.messages import RoundKey
from swarmtrain_protocols.node_events import LedgerChanged

ME, OTHER = PeerId(b"\1" * 32), PeerId(b"\2" * 32)
KEY = RoundKey(0, "train/0/0", 4, 1)


class Runtime:
    """The little of a runtime that figures need."""

    def __init__(self, path: Path, *, holds_state: bool = False) -> None:
        path.mkdir(exist_ok=True)
        self.events = EventLog(path / "events.jsonl", ME.hex())
        self.clock = RoundClock()
        self.metrics_listeners: list[Callable[[PeerId, bytes], None]] = []
        self.listeners: list[Callable[[object], None]] = []
        self.link_listeners: list[Callable[[PeerId], None]] = []
        self.transport: Any = SimpleNamespace(stats=self.traffic(0))
        self.rates = SiteRate()
        pace = SimpleNamespace(bytes_per_s=(0.0, 0.0))
        self.node: Any = SimpleNamespace(me=ME, member=SimpleNamespace(pace=pace))
        self.settings: Any = SimpleNamespace(holds_state=holds_state)
        self.told: list[bytes] = []
        self.faults: list[tuple[PeerId, str]] = []

    @staticmethod
    def traffic(nbytes: int) -> dict[str, int]:
        names = ("control_sent", "control_received", "bulk_sent", "bulk_received")
        return {f"{name}_bytes": nbytes * (at + 1) for at, name in enumerate(names)}

    def send_metrics(self, body: bytes, only: PeerId | None = None) -> None:
        assert len(body) <= 4096
        self.told.append(body)

    def peer_fault(self, peer: PeerId, code: str, why: str) -> None:
        self.faults.append((peer, code))

    def changed(self) -> None:
        """Nobody waits in these tests."""


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE_S", 0.0)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def opened(*roots: bytes) -> LedgerChanged:
    people = tuple(
        e.Contributor(who, root, 80.0, 4) for who, root in zip((OTHER, ME), roots, strict=False)
    )
    body = e.RoundOpened(KEY, people, (), (), 1000, "int8", "int8", b"\0" * 32)
    return LedgerChanged(((1, body, True),))


def ended(body: e.EntryBody) -> LedgerChanged:
    return LedgerChanged(((2, body, True),))


def test_a_round_is_told_to_the_log_and_to_the_others(tmp_path: Path, soon: None) -> None:
    async def go() -> None:
        runtime = Runtime(tmp_path)
        figures = Figures(runtime)  # type: ignore[arg-type]
        figures._on_core_event(opened(b"o" * 32, b"m" * 32))
        runtime.clock.sent(b"m" * 32, 900, 0.0, 1.0)
        runtime.transport.stats = runtime.traffic(10)
        figures.report(KEY, "committed", {"samples": 80.0, "compute_s": 2.5})
        figures.report(KEY, "committed", {"samples": 80.0, "compute_s": 2.5})  # told once
        await settle()
        (record,) = runtime.events.query(name="round_figures")
        assert (record["bytes_sent"], record["bytes_received"]) == (40, 60)
        assert (record["round"], record["attempt"], record["bytes_up"]) == (4, 1, 900)
        (body,) = runtime.told
        assert len(body) < 4096
        sent = msgspec.msgpack.decode(body)
        assert sent["kind"] == "round"
        fields = {k: v for k, v in sent.items() if k not in ("kind", "outcome")}
        assert all(record[name] == value for name, value in fields.items())
        # What another member hears is what this one keeps.
        listener = Figures(Runtime(tmp_path / ".."))  # type: ignore[arg-type]
        listener._on_metrics(ME, body)
        mine, theirs = (
            msgspec.json.encode({**one.rows()[0], "mono_s": 0}) for one in (figures, listener)
        )
        assert mine == theirs
        assert figures.bytes_by_attempt() == {("train/0/0", 4, 1): 900}
        assert figures.last_of(ME)["compute_s"] == 2.5
        assert figures.last_of(OTHER) == {}

    asyncio.run(go())


@pytest.mark.parametrize(
    "body",
    [
        b"\xff",
        b"\x82\xa4kind\xa5round\xa7channel\xa1\xff",
        msgspec.msgpack.encode({"kind": "other"}),
        msgspec.msgpack.encode({"kind": "round", "channel": "c", "outcome": "committed"}),
        msgspec.msgpack.encode({"kind": "evaluated", "round": -1, "loss": 1.0}),
        msgspec.msgpack.encode({"kind": "evaluated", "round": 1, "loss": "low"}),
        msgspec.msgpack.encode(
            {"kind": "round", "channel": "c" * 65, "outcome": "x", "round": 0, "attempt": 0}
            | {"bytes_sent": 1, "bytes_received": 1}
        ),
    ],
)
def test_malformed_figures_are_the_senders_fault(tmp_path: Path, body: bytes) -> None:
    runtime = Runtime(tmp_path)
    figures = Figures(runtime)  # type: ignore[arg-type]
    figures._on_metrics(OTHER, body)
    assert runtime.faults == [(OTHER, "bad_metrics")]
    assert (figures.rows(), figures.loss()) == ([], None)


def test_nobody_speaks_in_anothers_name(tmp_path: Path) -> None:
    figures = Figures(Runtime(tmp_path))  # type: ignore[arg-type]
    row = {"kind": "round", "channel": "c", "outcome": "x", "round": 0, "attempt": 0}
    row |= {"bytes_sent": 1, "bytes_received": 1, "id": ME.hex(), "mono_s": -5}
    figures._on_metrics(OTHER, msgspec.msgpack.encode(row))
    assert figures.rows()[0]["id"] == OTHER.hex()
    assert figures.rows()[0]["mono_s"] > 0


def test_losses_are_numbers_and_the_newest_counts(tmp_path: Path) -> None:
    runtime = Runtime(tmp_path)
    figures = Figures(runtime)  # type: ignore[arg-type]
    figures._on_metrics(OTHER, msgspec.msgpack.encode(module.LossBody(5, 2.5)))
    figures._on_metrics(OTHER, msgspec.msgpack.encode(module.LossBody(2, 3.5)))
    figures._on_metrics(OTHER, msgspec.msgpack.encode(module.LossBody(9, float("nan"))))
    assert figures.loss() == 2.5
    assert figures.has_loss(2)
    assert not figures.has_loss(9)
    members = [record["member"] for record in runtime.events.query(name="evaluated")]
    assert members == [OTHER.hex()] * 2


def test_a_newcomer_hears_how_the_run_went(tmp_path: Path) -> None:
    old, new = Runtime(tmp_path / "old"), Runtime(tmp_path / "new")
    known, fresh = Figures(old), Figures(new)  # type: ignore[arg-type]
    known._on_link(OTHER)
    assert old.told == []  # nothing to tell
    for number in range(5, 4005, 5):
        known._on_metrics(OTHER, msgspec.msgpack.encode(module.LossBody(number, 1e4 / number)))
    known._on_link(OTHER)
    fresh._on_metrics(ME, msgspec.msgpack.encode(module.LossBody(4000, 2.0)))
    fresh._on_metrics(ME, old.told[0])
    told = {r["round"]: r["loss"] for r in new.events.query(name="evaluated")}
    assert len(told) == module.HISTORY_MAX
    assert fresh.loss() == told[4000] == 2.0  # what it knew already stays
    assert [told[number] for number in (20, 40, 3980)] == [1e4 / n for n in (20, 40, 3980)]


def test_a_member_without_a_trainer_tells_what_it_carried(tmp_path: Path, soon: None) -> None:
    async def go() -> None:
        runtime = Runtime(tmp_path)
        figures = Figures(runtime)  # type: ignore[arg-type]
        figures._on_core_event(opened(b"o" * 32))
        figures._on_core_event(ended(e.RoundCommitted(KEY, b"r" * 32)))
        await settle()
        assert runtime.told == []  # it had no part in it
        figures._on_core_event(opened(b"o" * 32))
        runtime.clock.received(KEY, 700, 0.0, 1.0)
        figures._on_core_event(ended(e.RoundAborted(KEY, "owner lost")))
        await settle()
        body = msgspec.msgpack.decode(runtime.told[0])
        assert (body["bytes_down"], body["outcome"]) == (700, "aborted")
        assert "compute_s" not in body

    asyncio.run(go())
