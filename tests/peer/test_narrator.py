"""What entries of the log become in a site's event log."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from swarmtrain_peer.events import EventLog, read_events
from swarmtrain_peer.narrator import Narrator
from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.dht.events import DhtCrowded, DhtRejoined
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.node_events import LedgerChanged

KEY, ROOT = b"k" * 32, b"r" * 32


def told(tmp_path: Path, *bodies: Any, accepted: bool = True) -> list[dict[str, Any]]:
    log = EventLog(tmp_path / "events.jsonl", "me")
    ledger = Ledger()
    ledger.pipeline.loss, ledger.pipeline.micro_batches = 2.5, 16
    node: Any = SimpleNamespace(ledger=ledger)
    entries = tuple((n, body, accepted) for n, body in enumerate(bodies))
    Narrator(log).tell(node, LedgerChanged(entries))
    log.close()
    return list(read_events(tmp_path / "events.jsonl"))


def test_the_life_of_a_stage(tmp_path: Path) -> None:
    contributor = e.Contributor(KEY, ROOT, 3.0, 7)
    part = e.Part(0, 1, KEY, KEY)
    sums = tuple(e.StageSum(s, (contributor,), (part,), (KEY,), ROOT) for s in range(2))
    outcomes = tuple(e.StageOutcome(s, ROOT, 4.0, (KEY,)) for s in range(2))
    found = told(
        tmp_path,
        e.StageAssigned(KEY, (0, 2), "join"),
        e.StepClosed(0, 7, 0, ROOT, 16, 2.5, "fp32", "fp32", sums),
        e.StepOutcome(0, 7, 0, (), 1.0, "holders differ"),
        e.StepOutcome(0, 7, 1, outcomes, 0.25, ""),
        e.StageLost(2, 8, KEY, "nobody"),
        e.StageRecovered(2, 8, KEY, ("snapshot", "left"), (2.0, 3.0), 0, (ROOT, ROOT), ROOT),
    )
    assert [record["name"] for record in found] == [
        "stage_assigned",
        "step_closed",
        "step_aborted",
        "step_committed",
        "stage_lost",
        "stage_recovered",
    ]
    assert found[0]["stages"] == [0, 2] and found[0]["peer"] == KEY.hex()
    assert (found[1]["step"], found[1]["micro_batches"], found[1]["contributors"]) == (7, 16, 1)
    assert (found[2]["attempt"], found[2]["reason"]) == (0, "holders differ")
    assert (found[3]["attempt"], found[3]["loss"], found[3]["scale"]) == (1, 2.5, 0.25)
    assert found[5]["choice"] == "snapshot" and found[5]["losses"] == [2.0, 3.0]


def test_a_log_that_is_replayed_tells_of_each_step_its_own_loss(tmp_path: Path) -> None:
    """The ledger is behind the last entry when the first one is told."""
    outcome = (e.StageOutcome(0, ROOT, 4.0, (KEY,)),)
    bodies: list[Any] = []
    for step, loss in enumerate((5.5, 5.25, -1.0)):
        bodies.append(e.StepClosed(0, step, 0, ROOT, 6 + step, loss, "fp32", "fp32", ()))
        bodies.append(e.StepOutcome(0, step, 0, outcome, 1.0, ""))
    found = [r for r in told(tmp_path, *bodies) if r["name"] == "step_committed"]
    assert [(r["micro_batches"], r["loss"]) for r in found] == [(6, 5.5), (7, 5.25), (8, None)]


def test_the_dht_tells_of_crowds_and_of_those_found_back(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", "me")
    node: Any = SimpleNamespace(ledger=Ledger())
    for event in (DhtCrowded(b"k" * 20), DhtRejoined(PeerId(KEY))):
        Narrator(log).tell(node, event)
    log.close()
    crowded, rejoined = read_events(tmp_path / "events.jsonl")
    assert (crowded["name"], crowded["key"]) == ("dht_crowded", (b"k" * 20).hex())
    assert (rejoined["name"], rejoined["peer"]) == ("dht_rejoined", KEY.hex())


def test_refused_entries_are_not_told(tmp_path: Path) -> None:
    assert told(tmp_path, e.RunEnded("done"), accepted=False) == []
