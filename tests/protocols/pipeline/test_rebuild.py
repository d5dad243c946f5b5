"""The host of a lost stage: inputs, trials, losses, the choice, and what interrupts it."""

from __future__ import annotations

import math

import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import Effect, Emit, Fetch, PeerId, Send
from swarmtrain_protocols.messages.member import Propose, SnapshotOffer, SnapshotQuery
from swarmtrain_protocols.messages.pipeline import EMPTY, HopReply, HopRequest
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.book import KEPT, stage_channel
from swarmtrain_protocols.pipeline.collect import Collector
from swarmtrain_protocols.pipeline.errands import Errands
from swarmtrain_protocols.pipeline.hops import is_path, stage_of
from swarmtrain_protocols.pipeline.rebuild import (
    AGAIN_S,
    CALIBRATION_BATCHES,
    COLLECT_S,
    TRIAL_S,
    UNSCORED,
    Rebuilder,
)
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.fetches import Fetches
from tests.protocols.pipeline.stage_kit import StageLog, state_hash
from tests.protocols.rounds_kit import VALUES, A, B, C, D, hash_of

STEPS = 3
BATCHES = (b"one", b"two")
NAMES = ("average-plain", "copy-left", "fresh")


class Desk:
    """D is the host of stage 2 of 3; A serves the ends, B stage 1, C stage 3; A leads."""

    def __init__(
        self, *, lost: tuple[int, ...] = (2,), corpus: bool = True, swapped: bool = False
    ) -> None:
        self.log = StageLog(A, B, C, D, blocks=3)
        self.log.assign(A, 0)
        self.log.assign(B, 1)
        self.log.assign(C, 3)
        self.log.assign(D, 2)
        for _ in range(STEPS):
            self.log.step(A, B)
        self.now = 0.0
        self.out: list[Effect] = []
        self.state: dict[str, tuple[int, bytes]] = {}
        self.fetching: dict[str, None] = {}
        self.corpus = BATCHES if corpus else ()
        self.offers = {stage_channel(1): (2, B), stage_channel(3): (1, C)}
        self.names = NAMES
        self.losses = {"average-plain": 2.5, "copy-left": 2.25, "fresh": 3.0}
        self.broken: dict[str, str] = {}
        """Candidates that the shell cannot build, and why."""
        self.trial = ""
        self.tried: list[str] = []
        self.asked: list[HopRequest] = []
        self.fetches = Fetches(self.out)
        ledger = self.log.ledger
        self.collector = Collector(me=PeerId(D), ledger=ledger, fetches=self.fetches, out=self.out)
        self.errands = Errands(
            ledger=ledger,
            out=self.out,
            stages=3,
            workers=lambda hop: [PeerId(k) for k in ledger.pipeline.serving(stage_of(hop, 3))],
            version=lambda: ledger.pipeline.step,
            stage_generation=lambda stage: ledger.pipeline.era,
            hop_timeout_s=lambda hop: 5.0,
        )
        self.host = Rebuilder(
            me=PeerId(D),
            ledger=ledger,
            out=self.out,
            collector=self.collector,
            errands=self.errands,
            connected=lambda: [PeerId(k) for k in (A, B, C)],
            held=self.state.get,
            fetching=lambda channel: channel in self.fetching,
            swapped=swapped,
        )
        self.host.leader = PeerId(A)
        self.host.trainer = True
        for stage in lost:
            self.lose(stage)

    def lose(self, stage: int, host: bytes = D) -> None:
        self.log.ok(e.StageLost(stage, STEPS, host, "test"))
        self.host.reconcile(self.now)

    def take(self) -> list[Effect]:
        taken = list(self.out)
        self.out.clear()
        return taken

    def run(self) -> list[Effect]:
        """Play shell and network until nothing more happens; what is left over is returned."""
        left: list[Effect] = []
        while batch := self.take():
            left += [effect for effect in batch if not self.play(effect)]
        return left

    def play(self, effect: Effect) -> bool:
        host, now = self.host, self.now
        if isinstance(effect, px.NeedCalibration):
            assert effect.count == CALIBRATION_BATCHES
            host.calibration(now, effect.stage, self.corpus)
        elif isinstance(effect, Send) and isinstance(effect.message, SnapshotQuery):
            self.answer_query(effect.peer, effect.message.channel)
        elif isinstance(effect, Send) and isinstance(effect.message, HopRequest):
            self.compute(effect.peer, effect.message)
        elif isinstance(effect, Fetch):
            self.fetches.finished(now, effect.ticket, None)
        elif isinstance(effect, px.BuildCandidates):
            self.built = effect
            host.candidates_built(now, effect.stage, self.names)
        elif isinstance(effect, px.TryCandidate):
            self.try_one(effect)
        else:
            return False
        return True

    def answer_query(self, peer: PeerId, channel: str) -> None:
        number, holder = self.offers.get(channel, (0, b""))
        stage = int(channel.split("/")[1])
        offer = SnapshotOffer(channel, (), ())
        if peer == holder:
            offer = SnapshotOffer(channel, (number,), (state_hash(stage, number),))
        self.collector.offered(self.now, peer, offer)

    def compute(self, peer: PeerId, request: HopRequest) -> None:
        self.asked.append(request)
        assert request.kind == "evaluate" and request.version == STEPS
        stage = stage_of(request.id.hop, 3)
        if stage in self.log.ledger.pipeline.lost():
            assert peer == D and self.host.on_trial(stage)
        loss = self.losses[self.trial] + (0.5 if request.tokens == b"one" else -0.5)
        self.errands.receive(self.now, peer, HopReply(request.id, EMPTY, loss, 0, 0.1))

    def try_one(self, effect: px.TryCandidate) -> None:
        assert effect.round == STEPS
        self.trial = effect.name
        self.tried.append(effect.name)
        if effect.name in self.broken:
            why = self.broken[effect.name]
            self.host.candidate_failed(self.now, effect.stage, effect.name, why)
        else:
            root = hash_of(effect.name)
            self.host.candidate_ready(self.now, effect.stage, effect.name, root)

    def wish(self, effects: list[Effect]) -> e.StageRecovered:
        """The one entry that the host asks the leader for."""
        (wish,) = [
            e.decode_body(x.message.body)
            for x in effects
            if isinstance(x, Send) and isinstance(x.message, Propose)
        ]
        assert isinstance(wish, e.StageRecovered)
        return wish


def notices(effects: list[Effect]) -> list[str]:
    events = [x.event for x in effects if isinstance(x, Emit)]
    return [str(x.fields["why"]) for x in events if isinstance(x, fx.Notice)]


def test_the_candidate_with_the_least_loss_is_asked_for_and_all_losses_are_told() -> None:
    desk = Desk()
    left = desk.run()
    assert desk.tried == list(NAMES)
    wish = desk.wish(left)
    assert wish == e.StageRecovered(
        2,
        STEPS,
        D,
        NAMES,
        (2.5, 2.25, 3.0),
        1,
        (state_hash(1, 2), state_hash(3, 1)),
        hash_of("copy-left"),
    )
    assert notices(left) == []


def test_its_inputs_are_pinned_states_of_the_neighbours_and_their_gradients() -> None:
    desk = Desk()
    desk.log.ledger.pipeline.stages[1].square_norm = 9.0
    desk.run()
    left = fx.Snapshot(stage_channel(1), 2, state_hash(1, 2), VALUES, "rebuild/2")
    right = fx.Snapshot(stage_channel(3), 1, state_hash(3, 1), VALUES, "rebuild/2")
    assert desk.built.inputs == (
        px.CandidateInput("left", left, False),
        px.CandidateInput("right", right, False),
    )
    assert desk.built.norms == (3.0, pytest.approx(2.0))


def test_states_that_are_here_are_used_and_an_older_one_of_the_stage_is_a_candidate() -> None:
    desk = Desk(lost=())
    desk.state[stage_channel(1)] = (STEPS, state_hash(1, STEPS))
    desk.state[stage_channel(2)] = (STEPS - 2, state_hash(2, 1))
    del desk.offers[stage_channel(3)]
    desk.lose(2)
    desk.run()
    mine = fx.Snapshot(stage_channel(1), STEPS, state_hash(1, STEPS), VALUES)
    older = fx.Snapshot(stage_channel(2), 1, state_hash(2, 1), VALUES)
    assert desk.built.inputs == (
        px.CandidateInput("left", mine, True),
        px.CandidateInput("snapshot", older, True),
    )


def test_the_first_block_stage_has_no_left_neighbour_and_the_ends_have_none() -> None:
    for stage, expected in ((1, [stage_channel(2)]), (3, [stage_channel(2)]), (0, [])):
        desk = Desk(lost=())
        desk.offers = {stage_channel(2): (2, D)}
        desk.lose(stage)
        asked = [x.message.channel for x in desk.out if isinstance(x, Send)]  # type: ignore[attr-defined]
        assert sorted(set(asked)) == expected
        desk.run()
        assert desk.tried == list(NAMES)


def test_if_a_neighbour_is_lost_as_well_the_nearest_stage_that_is_there_takes_its_place() -> None:
    desk = Desk(lost=())
    desk.log.ok(e.StageLost(2, STEPS, B, "test"))
    desk.offers = {stage_channel(1): (2, B)}
    desk.log.ledger.pipeline.stages[1].square_norm = 16.0
    desk.lose(3)
    desk.run()
    left = fx.Snapshot(stage_channel(1), 2, state_hash(1, 2), VALUES, "rebuild/3")
    assert desk.built.inputs == (px.CandidateInput("left", left, False),)
    assert desk.built.norms == (4.0, 0.0)


def test_every_batch_goes_through_all_stages_with_this_node_for_the_lost_one() -> None:
    desk = Desk()
    desk.run()
    assert len(desk.asked) == len(NAMES) * len(BATCHES) * 5
    one = [r for r in desk.asked if r.id.micro_batch == desk.asked[0].id.micro_batch]
    assert [r.id.hop for r in one] == [0, 1, 2, 3, 4]
    assert {r.path for r in desk.asked} == {(0, 1, 2, 3, 4)}


def test_the_choice_is_installed_once_the_log_has_it_and_only_then() -> None:
    desk = Desk()
    wish = desk.wish(desk.run())
    assert not [x for x in desk.out if isinstance(x, px.AdoptCandidate)]
    desk.log.ok(wish)
    desk.host.reconcile(1.0)
    assert desk.take() == [
        px.AdoptCandidate(2, "copy-left", STEPS, hash_of("copy-left")),
        px.DropCandidates(2),
    ]
    assert desk.host.deadline() == math.inf and not desk.host.on_trial(2)


def test_it_asks_again_until_the_log_has_an_answer_whoever_leads() -> None:
    desk = Desk()
    wish = desk.wish(desk.run())
    assert desk.host.deadline() == AGAIN_S
    desk.host.leader = PeerId(B)
    desk.host.tick(AGAIN_S)
    (again,) = desk.take()
    assert isinstance(again, Send) and again.peer == B
    assert desk.wish([again]) == wish
    desk.host.leader = None
    desk.host.tick(2 * AGAIN_S)
    assert desk.take() == []


def test_somebody_else_s_choice_ends_the_work() -> None:
    desk = Desk()
    desk.run()
    desk.lose(2, B)
    assert desk.take() == [px.DropCandidates(2)]
    done = e.StageRecovered(2, STEPS, B, ("fresh",), (1.0,), 0, (), hash_of("copy-left"))
    desk.log.ok(done)
    desk.host.reconcile(1.0)
    assert desk.take() == []


# --- the state itself ----------------------------------------------------------------------------


def test_who_has_the_state_itself_says_so_and_builds_nothing() -> None:
    desk = Desk(lost=())
    desk.state[stage_channel(2)] = (STEPS, state_hash(2, STEPS))
    desk.lose(2)
    wish = desk.wish(desk.run())
    assert wish.candidates == (KEPT,) and wish.losses == (UNSCORED,)
    assert wish.root == state_hash(2, STEPS) and desk.tried == []
    desk.log.ok(wish)
    desk.host.reconcile(1.0)
    assert desk.take() == [px.DropCandidates(2)], "it is in place already"


def test_a_state_that_comes_back_in_the_middle_ends_the_trials() -> None:
    desk = Desk()
    for effect in desk.take():
        desk.play(effect)
    desk.state[stage_channel(2)] = (STEPS, state_hash(2, STEPS))
    desk.host.tick(1.0)
    wish = desk.wish(desk.run())
    assert wish.candidates == (KEPT,)


# --- trouble -------------------------------------------------------------------------------------


def test_a_candidate_that_cannot_be_built_or_scored_is_not_chosen() -> None:
    desk = Desk()
    desk.broken["copy-left"] = "no such layout"
    left = desk.run()
    wish = desk.wish(left)
    assert wish.losses == (2.5, UNSCORED, 3.0) and wish.candidates[wish.choice] == "average-plain"
    assert notices(left) == ["no such layout"]
    desk = Desk()
    desk.losses["copy-left"] = math.nan
    wish = desk.wish(desk.run())
    assert wish.losses == (2.5, UNSCORED, 3.0) and wish.choice == 0


def test_without_held_out_data_the_likeliest_is_taken_and_it_is_said() -> None:
    desk = Desk(corpus=False)
    desk.names = ("fresh", "copy-left", "average-plain")
    left = desk.run()
    wish = desk.wish(left)
    assert wish.losses == (UNSCORED,) * 3 and wish.candidates[wish.choice] == "average-plain"
    assert len(notices(left)) == 3


@pytest.mark.parametrize(
    ("stage", "swapped", "best"),
    [
        *((1, False, "near-identity-0"), (3, False, "near-identity-0"), (2, False, "copy-right")),
        *((1, True, "copy-right"), (3, True, "copy-right")),
    ],
)
def test_an_edge_is_copied_unseen_only_if_the_run_swaps_stages(
    stage: int, swapped: bool, best: str
) -> None:
    desk = Desk(lost=(), corpus=False, swapped=swapped)
    desk.names = ("fresh", "copy-right", "near-identity-0")
    desk.lose(stage)
    wish = desk.wish(desk.run())
    assert wish.candidates[wish.choice] == best


def test_a_trial_that_nobody_answers_ends_in_time() -> None:
    desk = Desk()
    while not desk.asked:
        for effect in desk.take():
            if isinstance(effect, Send) and isinstance(effect.message, HopRequest):
                desk.asked.append(effect.message)
            else:
                desk.play(effect)
    desk.now = TRIAL_S
    desk.errands.tick(TRIAL_S)
    wish = desk.wish(desk.run())
    assert wish.losses == (UNSCORED, 2.25, 3.0)


def test_if_nothing_can_be_built_it_begins_anew_after_a_while() -> None:
    desk = Desk()
    desk.broken = dict.fromkeys(NAMES, "out of memory")
    desk.run()
    assert desk.tried == list(NAMES) and desk.host.deadline() == AGAIN_S
    desk.broken = {}
    desk.now = AGAIN_S
    desk.host.tick(AGAIN_S)
    assert desk.wish(desk.run()).losses == (2.5, 2.25, 3.0)


def test_neighbours_that_never_answer_are_not_waited_for_for_ever() -> None:
    desk = Desk()
    for effect in desk.take():
        if isinstance(effect, px.NeedCalibration):
            desk.play(effect)
    assert desk.host.deadline() == COLLECT_S
    desk.now = COLLECT_S
    desk.host.tick(COLLECT_S)
    desk.run()
    assert desk.built.inputs == () and desk.tried == list(NAMES)


def test_an_older_state_on_its_way_is_waited_for() -> None:
    desk = Desk(lost=())
    desk.fetching[stage_channel(2)] = None
    desk.lose(2)
    assert desk.run() == [] and desk.tried == []
    desk.fetching.clear()
    desk.state[stage_channel(2)] = (1, state_hash(2, 1))
    desk.host.tick(1.0)
    desk.run()
    assert [item.what for item in desk.built.inputs] == ["left", "right", "snapshot"]


def test_a_trainer_that_dies_is_waited_for_and_the_trial_begins_anew() -> None:
    desk = Desk()
    while desk.trial != "copy-left":
        for effect in desk.take():
            desk.play(effect)
    desk.host.trainer_changed(1.0, False)
    assert not desk.host.on_trial(2)
    assert not [x for x in desk.run() if isinstance(x, Send)]
    desk.host.trainer_changed(2.0, True)
    wish = desk.wish(desk.run())
    assert desk.tried == ["average-plain", "copy-left", "copy-left", "fresh"]
    assert wish.losses == (2.5, 2.25, 3.0)


def test_ends_that_are_lost_with_all_blocks_are_scored_alone() -> None:
    desk = Desk(lost=())
    for stage, host in ((0, D), (1, B), (2, D), (3, C)):
        desk.log.ok(e.StageLost(stage, STEPS, host, "test"))
    desk.host.reconcile(0.0)
    wish = desk.wish(desk.run())
    assert wish.stage == 0 and UNSCORED not in wish.losses
    assert {r.path for r in desk.asked} == {(0, 4)}
    assert all(is_path(r.path, 3) for r in desk.asked), "workers take it"


def test_blocks_wait_for_the_ends_and_other_lost_blocks_are_left_out() -> None:
    desk = Desk(lost=())
    desk.log.ok(e.StageLost(0, STEPS, D, "test"))
    desk.log.ok(e.StageLost(2, STEPS, D, "test"))
    desk.log.ok(e.StageLost(3, STEPS, B, "test"))
    desk.host.reconcile(0.0)
    wish = desk.wish(desk.run())
    assert wish.stage == 0, "without embedding and head there is no loss"
    assert {r.path for r in desk.asked} == {(0, 1, 4)}
    desk.asked.clear()
    desk.tried.clear()
    desk.log.ok(wish)
    desk.log.assign(A, 0)
    desk.host.reconcile(1.0)
    wish = desk.wish(desk.run())
    assert wish.stage == 2 and {r.path for r in desk.asked} == {(0, 1, 2, 4)}
    assert [item.what for item in desk.built.inputs] == ["left"], "its right neighbour is lost, too"


def test_another_loss_in_the_middle_begins_everything_anew() -> None:
    desk = Desk()
    for effect in desk.take():
        desk.play(effect)
    desk.lose(3, B)
    assert px.DropCandidates(2) in desk.out
    wish = desk.wish([x for x in desk.run() if isinstance(x, Send)])
    assert {r.path for r in desk.asked} == {(0, 1, 2, 4)}
    assert wish.losses == (2.5, 2.25, 3.0)


def test_answers_to_questions_of_yesterday_change_nothing() -> None:
    desk = Desk()
    desk.run()
    desk.host.calibration(1.0, 2, ())
    desk.host.calibration(1.0, 3, BATCHES)
    desk.host.candidates_built(1.0, 2, ("other",))
    desk.host.candidate_ready(1.0, 2, "copy-left", hash_of("other"))
    desk.host.candidate_failed(1.0, 3, "copy-left", "late")
    assert desk.take() == []
