"""How a pipeline stands: coverage by links, occupancy as told, trouble in words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from swarmtrain_peer import host
from swarmtrain_peer.stage_board import HEARD_S, StageBoard
from swarmtrain_peer.stage_work import StageRow, StagesBody
from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.messages import pipeline as m
from swarmtrain_protocols.node_events import LedgerChanged
from swarmtrain_protocols.pipeline import effects as px
from tests.protocols.pipeline.stage_kit import StageLog
from tests.protocols.rounds_kit import A, B, C, hash_of

ME = A


class Runtime:
    """What a board needs: a ledger, links, a worker and a driver."""

    def __init__(self, *, replicas_min: int = 2) -> None:
        self.log = StageLog(A, B, C)
        self.links: list[bytes] = [B, C]
        self.told: list[bytes] = []
        self.listeners: list[Any] = []
        keys = RunKeys(stages=2, model={"layers": 2}, replicas_min=replicas_min, micro_batches=4)
        self.manifest: Any = SimpleNamespace(keys=keys)
        reports = (m.StageReport(1, 0, True, 0.25),)
        worker = SimpleNamespace(values_max=1, report=lambda: m.WorkerReport(0, reports, 1, 3))
        driver = SimpleNamespace(active=True, batches={0: None, 5: None})
        self.node: Any = SimpleNamespace(
            me=PeerId(ME),
            ledger=self.log.ledger,
            linked=lambda: [PeerId(one) for one in self.links],
            pipeline=SimpleNamespace(worker=worker, driver=driver),
            catchup=SimpleNamespace(
                tracks={"train/1/0": SimpleNamespace(round=0, state_hash=hash_of("state"))}
            ),
        )

    def send_metrics(self, body: bytes, only: PeerId | None = None) -> None:
        self.told.append(body)


class Board:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 50.0
        monkeypatch.setattr(host, "mono_s", lambda: self.now)
        self.runtime = Runtime()
        self.log = self.runtime.log
        self.board = StageBoard(self.runtime)  # type: ignore[arg-type]
        self.log.assign(A, 0, 1)
        self.log.assign(B, 0, 1)
        self.log.assign(C, 0, 2)

    def stage(self, number: int) -> dict[str, Any]:
        found: dict[str, Any] = self.board.document()["coverage"][number]
        return found

    def hear(self, member: bytes, *rows: StageRow, **changes: Any) -> None:
        self.board.heard(member, StagesBody(0, list(rows), **changes))


@pytest.fixture
def kit(monkeypatch: pytest.MonkeyPatch) -> Board:
    return Board(monkeypatch)


def test_coverage_counts_members_in_reach(kit: Board) -> None:
    assert [(s["present"], s["state"]) for s in kit.board.document()["coverage"]] == [
        (3, "ok"),
        (2, "ok"),
        (1, "endangered"),
    ]
    (text,) = kit.board.document()["trouble"]
    assert text == "stage 2 is endangered: 1 member in reach, at least 2 wanted"
    kit.runtime.links = [B]
    assert kit.stage(2)["state"] == "unserved"
    assert [one["present"] for one in kit.stage(0)["members"]] == [
        one in (A, B) for one in sorted((A, B, C))
    ]
    assert "nobody in reach serves stage 2" in kit.board.document()["trouble"][0]


def test_a_lost_stage_says_who_rebuilds_it(kit: Board) -> None:
    kit.log.ok(e.StageLost(2, 0, B, "gone"))
    document = kit.board.document()
    assert (document["phase"], document["era"]) == ("recovering", 1)
    assert (kit.stage(2)["state"], kit.stage(2)["host"]) == ("lost", B.hex())
    name = kit.log.ledger.members[B].name
    assert document["trouble"] == [
        f"stage 2 is lost: {name} rebuilds it, and nothing commits until it is back"
    ]
    kit.log.ok(e.StageRecovered(2, 0, B, ("mean",), (1.0,), 0, (), hash_of("new")))
    assert (kit.stage(2)["state"], kit.stage(2)["generation"]) == ("endangered", 1)


def test_occupancy_is_what_members_tell_and_grows_old(kit: Board) -> None:
    kit.hear(A, StageRow(0, 4, True, 0.1, 2.0), StageRow(1, 4, True, 0.5, 1.0), queued=7)
    kit.hear(B, StageRow(1, 4, False, 0.3, 3.0), drives=True)
    one = kit.stage(1)
    assert (one["busy"], one["micro_batches_per_s"], one["ready"]) == (0.4, 4.0, 1)
    mine = kit.board.of_member(A)
    assert (mine["busy"], mine["queued"]) == (0.6, 7)
    assert [row["stage"] for row in mine["stages"]] == [0, 1]
    assert kit.board.document()["drivers"] == [B.hex()]
    kit.now += HEARD_S + 1
    assert kit.stage(1)["busy"] == 0.0
    assert kit.board.of_member(A)["busy"] is None
    assert kit.board.document()["drivers"] == []


def test_figures_of_strangers_are_not_kept(kit: Board) -> None:
    kit.hear(b"x" * 32, StageRow(1, 4, True, 1.0, 9.0), drives=True)
    assert kit.board.document()["drivers"] == []


def test_own_work_is_told_once_a_second(kit: Board) -> None:
    kit.board.work.worked(kit.now + 1.0, 1, 1, "backward", 0.5)
    kit.now += 2.0
    kit.board.tell("cpu")
    kit.board.tell("cpu")
    (data,) = kit.runtime.told
    body = msgspec.msgpack.decode(data, type=StagesBody)
    assert body.rows == [StageRow(1, 0, True, 0.25, 0.5, 0.25)]
    assert (body.queued, body.drives, body.driving, body.device) == (3, True, 2, "cpu")
    kit.now += 1.0
    kit.board.tell("cpu")
    assert len(kit.runtime.told) == 2


def test_times_of_hops_are_those_that_this_site_saw(kit: Board) -> None:
    (listener,) = kit.runtime.listeners
    for seconds in range(1, 101):
        listener(px.HopDone(PeerId(B), 1, seconds % 2 == 0, seconds / 100, "ok"))
    listener(px.HopDone(PeerId(B), 1, False, 0.0, "busy"))
    assert kit.stage(1)["hop_s"] == {"p50": 0.51, "p95": 0.96}
    assert kit.stage(2)["hop_s"] is None
    assert kit.board.document()["hops_refused"] == 1


def test_before_there_is_a_model_nothing_is_covered(kit: Board) -> None:
    kit.log.ledger.channels.clear()
    document = kit.board.document()
    assert (document["phase"], document["coverage"]) == ("no model yet", [])


def test_before_there_are_enough_workers_it_says_so(kit: Board) -> None:
    kit.log.ledger.pipeline.assigned.clear()
    kit.hear(B, StageRow(0))
    document = kit.board.document()
    assert document["phase"] == "gathering"
    assert {one["state"] for one in document["coverage"]} == {"waiting"}
    assert document["trouble"] == ["waiting for workers: 1 of 1 so far, then stages are given out"]
    kit.log.step(A, B)
    assert kit.stage(0)["state"] == "unserved", "they had been given out"


def test_stages_that_step_by_themselves_are_as_fast_as_the_slowest(kit: Board) -> None:
    kit.log.ledger.pipeline.mode = "diloco"
    kit.hear(A, StageRow(0, 4, True, 0.1, 2.0), StageRow(1, 4, True, 0.5, 3.0))
    kit.hear(C, StageRow(0, 4, True, 0.1, 1.5), StageRow(2, 4, True, 0.3, 1.25))
    document = kit.board.document()
    assert document["micro_batches_per_s"] == 1.25
    assert document["step_s"] is None


def test_whose_work_is_in_the_newest_step_is_there_without_a_link(
    kit: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "wall_s", lambda: 1000.0 + kit.now)
    kit.runtime.links = []
    assert kit.stage(2)["state"] == "unserved"
    (listener,) = kit.runtime.listeners
    for body in (kit.log.closing(C), kit.log.outcome()):
        kit.log.ok(body)
        listener(LedgerChanged(((kit.log.ledger.index, body, True),)))
    assert kit.stage(2)["present"] == 1
    kit.now += HEARD_S + 1
    assert kit.stage(2)["present"] == 0
