"""Who holds which stage: a node follows what the log assigns to it, leaders count those who do."""

from __future__ import annotations

import math
import random

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import CancelFetch, Effect, Fetch, PeerId, Send
from swarmtrain_protocols.ledger import load_snapshot
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.messages.member import SnapshotOffer, SnapshotQuery, StateReport
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.catchup import CatchUp
from swarmtrain_protocols.rounds.fetches import Fetches
from swarmtrain_protocols.rounds.lobby import REPORT_WAIT_S, Lobbies
from swarmtrain_protocols.rounds.loss import DATA_LOSS_S, LossWatch
from swarmtrain_protocols.rounds.member import RoundMember
from swarmtrain_protocols.rounds.policy import RoundPolicy
from tests.protocols.pipeline.stage_kit import StageLog, state_hash
from tests.protocols.rounds_kit import (
    CHUNK,
    IDS,
    RINGS,
    VALUES,
    A,
    B,
    C,
    D,
    events,
    hash_of,
    of_kind,
    sent,
    take,
)

LEADER = IDS[7]
ONE, TWO = stage_channel(1), stage_channel(2)
KEYS = RunKeys(stages=2, outer_lr=0.5, outer_momentum=0.25)


class Seat:
    """Peer C in a pipeline of two block stages; A serves stage 1, B stage 2, D the ends."""

    def __init__(self, *stages: int, mode: str = "sync") -> None:
        self.log = StageLog(A, B, C, D, mode=mode)
        for member, served in ((A, (1,)), (B, (2,)), (D, (0,))):
            self.log.assign(member, *served)
        if stages:
            self.log.assign(C, *stages)
        self.out: list[Effect] = []
        self.fetches = Fetches(self.out)
        self.member = RoundMember(
            keyring=RINGS[IDS.index(C)],
            rng=random.Random(1),
            ledger=self.log.ledger,
            fetches=self.fetches,
            out=self.out,
            max_base_age_rounds=2,
        )
        self.catchup = CatchUp(
            me=C,
            rng=random.Random(2),
            ledger=self.log.ledger,
            fetches=self.fetches,
            out=self.out,
            member=self.member,
            connected=lambda: [A, B, D],
            keys=KEYS,
            chunk_values=CHUNK,
        )
        self.catchup.active = True
        self.catchup.leader = LEADER

    def take(self) -> list[Effect]:
        return take(self.out)

    def reconcile(self, now: float = 0.0) -> list[Effect]:
        self.catchup.reconcile(now)
        return self.take()

    def restore(self, channel: str, stage: int, round_number: int) -> list[Effect]:
        self.catchup.restore(channel, round_number, state_hash(stage, round_number))
        return self.reconcile()


def asked(effects: list[Effect]) -> list[tuple[bytes, str]]:
    return [(peer, message.channel) for peer, message in sent(effects, SnapshotQuery)]


def test_a_node_asks_only_for_the_stages_it_serves_and_their_holders_first() -> None:
    seat = Seat(1)
    effects = seat.reconcile()
    assert [channel for _, channel in asked(effects)] == [ONE] * 3
    assert asked(effects)[0] == (A, ONE), "who serves the stage is asked first"
    assert list(seat.catchup.tracks) == [ONE] == seat.catchup.followed()
    assert seat.catchup.follows(ONE) and not seat.catchup.follows(TWO)
    seat = Seat()
    assert seat.reconcile() == [] and seat.catchup.followed() == []
    assert seat.catchup.deadline() == math.inf


def test_a_newly_assigned_stage_is_fetched_and_reported() -> None:
    seat = Seat()
    seat.reconcile()
    seat.log.assign(C, 2)
    assert {channel for _, channel in asked(seat.reconcile(1.0))} == {TWO}
    offer = SnapshotOffer(TWO, (0,), (state_hash(2, 0),))
    seat.catchup.offered(1.1, PeerId(B), offer)
    (wanted,) = of_kind(seat.take(), fx.PrepareSnapshot)
    seat.catchup.prepared(1.15, TWO, wanted.snapshot.root, (), False)
    fetches = of_kind(seat.take(), Fetch)
    assert fetches[0].purpose == fx.Snapshot(TWO, 0, state_hash(2, 0), VALUES)
    for fetch in fetches:
        seat.fetches.finished(1.2, fetch.ticket, None)
    (install,) = of_kind(seat.take(), fx.InstallSnapshot)
    assert install.snapshot.channel == TWO
    seat.catchup.applied(1.3, TWO, 0, state_hash(2, 0))
    assert [m for _, m in sent(seat.take(), StateReport)] == [
        StateReport(0, TWO, 0, state_hash(2, 0), True, False)
    ]


def test_a_stage_that_others_serve_is_dropped_once_they_are_further() -> None:
    seat = Seat(1)
    seat.restore(ONE, 1, 0)
    seat.member.in_place[ONE, 0] = hash_of("result 1/0")
    seat.log.assign(C, 2)
    effects = seat.reconcile()
    assert of_kind(effects, fx.DropState) == [], "it may be the only copy: nobody is beyond it"
    seat.catchup.announce()
    assert sent(seat.take(), StateReport) == [], "but this node counts as a holder no more"
    seat.log.step(A, B, D)
    effects = seat.reconcile(1.0)
    assert of_kind(effects, fx.DropState) == [fx.DropState(ONE)]
    assert of_kind(effects, fx.ApplyResult) == []
    assert ONE not in seat.catchup.tracks and seat.member.in_place == {}
    assert of_kind(seat.reconcile(9.0), fx.DropState) == []


def test_a_download_ends_with_the_assignment() -> None:
    seat = Seat(1)
    seat.reconcile()
    seat.catchup.offered(0.1, PeerId(A), SnapshotOffer(ONE, (0,), (state_hash(1, 0),)))
    tickets = [x.ticket for x in of_kind(seat.take(), Fetch)]
    seat.log.assign(C)
    effects = seat.reconcile(0.2)
    assert [x.ticket for x in of_kind(effects, CancelFetch)] == tickets
    assert of_kind(effects, fx.DropState) == [fx.DropState(ONE)]
    seat.catchup.offered(0.3, PeerId(A), SnapshotOffer(ONE, (0,), (state_hash(1, 0),)))
    assert seat.take() == []


def test_a_busy_state_is_dropped_when_the_work_is_done() -> None:
    seat = Seat(1)
    seat.restore(ONE, 1, 0)
    seat.log.step(A, B, D)
    seat.member.in_place[ONE, 0] = hash_of("result 1/0")
    assert of_kind(seat.reconcile(), fx.ApplyResult) != []
    seat.log.assign(C)
    seat.log.step(A, B, D)
    assert of_kind(seat.reconcile(), fx.DropState) == []
    seat.catchup.applied(1.0, ONE, 1, state_hash(1, 1))
    effects = seat.take()
    assert of_kind(effects, fx.DropState) == [fx.DropState(ONE)]
    assert sent(effects, StateReport) == []


def test_a_step_is_applied_with_its_scale_and_the_stage_s_recovery() -> None:
    seat = Seat(1)
    seat.restore(ONE, 1, 0)
    plain = ((2, 5),)
    model = seat.log.ledger.model
    assert model is not None
    seat.log.ledger.model = e.ModelDefined(
        model.schema_hash,
        tuple(e.ChannelLayout(item.channel, item.values, plain) for item in model.layout),
        model.roots,
        model.author,
    )
    seat.log.step(A, B, D, scale=0.5)
    seat.member.in_place[ONE, 0] = hash_of("result 1/0")
    root = hash_of("result 1/0")
    assert of_kind(seat.reconcile(), fx.ApplyResult) == [
        fx.ApplyResult(ONE, 0, root, 0.5, -1, plain)
    ]
    seat.catchup.applied(1.0, ONE, 1, hash_of("dead"))
    seat.log.ok(e.StageLost(1, 1, A, "test"))
    back = state_hash(1, 1)
    seat.log.ok(e.StageRecovered(1, 1, A, ("fresh",), (3.0,), 0, (), back))
    seat.take()
    effects = seat.reconcile(2.0)
    assert [x.reason for x in events(effects, fx.Resync)] != [], "this state is of the dead stage"
    seat.catchup.restore(ONE, 1, back)
    seat.log.step(A, B, D)
    seat.member.in_place[ONE, 1] = hash_of("result 1/1")
    assert of_kind(seat.reconcile(3.0), fx.ApplyResult) == [
        fx.ApplyResult(ONE, 1, hash_of("result 1/1"), 1.0, 1, plain)
    ]


def test_a_step_that_the_log_has_forgotten_cannot_be_applied() -> None:
    """Its scale is not known any more, so the result alone is of no use."""
    seat = Seat(1)
    seat.log.step(A, B, D)
    seat.log.ledger.channels[ONE].history.clear()
    seat.member.in_place[ONE, 0] = hash_of("result 1/0")
    effects = seat.restore(ONE, 1, 0)
    assert of_kind(effects, fx.ApplyResult) == []
    assert [x.reason for x in events(effects, fx.Resync)] == [
        "round 0 is no longer in the log's history"
    ]


def test_stages_in_diloco_take_the_outer_step() -> None:
    seat = Seat(1, mode="diloco")
    seat.restore(ONE, 1, 0)
    channel = seat.log.ledger.channels[ONE]
    key = seat.log.ledger.next_key(ONE)
    assert key is not None
    parts = (e.Part(0, 3, A, A),)
    given = (e.Contributor(A, hash_of("given"), 1.0, 0),)
    opened = e.RoundOpened(key, given, parts, (A,), VALUES, "fp32", "fp32", state_hash(1, 0))
    seat.log.ok(opened)
    seat.log.ok(e.RoundSet(key, (e.Coefficient(0, 1.0),)))
    seat.log.ok(e.RoundCommitted(key, hash_of("result"), (A,)))
    assert channel.round == 1
    seat.member.in_place[ONE, 0] = hash_of("result")
    assert of_kind(seat.reconcile(), fx.ApplyResult) == [
        fx.ApplyResult(ONE, 0, hash_of("result"), lr=0.5, momentum=0.25)
    ]


# --- the leader's view ---------------------------------------------------------------------------


def report(channel: str, stage: int, number: int = 0) -> StateReport:
    return StateReport(0, channel, number, state_hash(stage, number), True, True)


def test_only_those_who_serve_a_stage_count_as_its_holders() -> None:
    log = StageLog(A, B, C, mode="diloco")
    log.assign(A, 1)
    log.assign(B, 1, 2)
    lobbies = Lobbies(RoundPolicy(), 0.0)
    lobbies.reconcile(log.ledger)
    for peer in (A, B, C):
        lobbies.reported(log.ledger, PeerId(peer), report(ONE, 1))
    assert sorted(lobbies.rooms[ONE].reports) == sorted((A, B))
    now = REPORT_WAIT_S + 1
    expected, _ = lobbies.expected(now, log.ledger, ONE, sorted((A, B, C)))
    assert expected == sorted((A, B))
    before_reports = lobbies.expected(0.0, log.ledger, ONE, sorted((A, B, C)))
    assert before_reports[0] == sorted((A, B)), "nobody waits for members without the stage"
    log.assign(B, 2)
    lobbies.reconcile(log.ledger)
    assert list(lobbies.rooms[ONE].reports) == [A]


def test_a_lost_stage_rewinds_nothing() -> None:
    """What would be data loss in a run of whole models is a stage lost, and others keep theirs."""
    for log in (StageLog(A, B), StageLog(A, B, mode="diloco")):
        watch = LossWatch()
        channel = log.ledger.channels[ONE]
        channel.round = 3
        reports = {stage_channel(s): [report(stage_channel(s), s)] for s in range(3)}
        for now in (0.0, DATA_LOSS_S + 1, 3 * DATA_LOSS_S):
            assert watch.check(now, log.ledger, reports) is None
        assert watch.deadline() == math.inf


def test_assignments_survive_in_snapshots_of_the_ledger() -> None:
    log = StageLog(A, B)
    log.assign(A, 0, 2)
    again = load_snapshot(log.ledger.snapshot())
    assert again.follows(A, TWO) and not again.follows(A, ONE) and not again.follows(B, TWO)
    assert again.follows(B, "group/x"), "groups are everybody's"


def test_nothing_is_sent_about_stages_of_others() -> None:
    seat = Seat(1)
    for stage in (1, 2):
        seat.catchup.restore(stage_channel(stage), 0, state_hash(stage, 0))
    seat.catchup.announce()
    told = [x for x in seat.take() if isinstance(x, Send)]
    assert [m.channel for _, m in sent(told, StateReport)] == [ONE]
