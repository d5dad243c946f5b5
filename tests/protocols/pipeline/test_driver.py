"""The driver against a leader and workers played by hand: paths, retries, leases, redo, bounds."""

from __future__ import annotations

import math

import pytest

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.messages.pipeline import (
    EMPTY,
    HopReply,
    HopRequest,
    LeaseRequest,
    MicroBatchDone,
    Tensor,
)
from swarmtrain_protocols.pipeline.driver import LEASE_POLL_S
from swarmtrain_protocols.pipeline.envelope import View
from swarmtrain_protocols.pipeline.paths import PathPlan, PathRule
from swarmtrain_protocols.pipeline.routing import OBSERVATIONS_FOR_HEDGE
from swarmtrain_protocols.rounds.effects import Notice
from tests.protocols.pipeline.driver_kit import (
    Rig,
    serve_all,
    tensor,
    worker,
)


def through(rig: Rig, now: float, steps: int, loss: float = 0.0) -> list[HopRequest]:
    """Answer the next ``steps`` requests of a single micro-batch."""
    seen = []
    for _ in range(steps):
        peer, request = rig.asked()
        rig.reply(now, peer, request, loss)
        seen.append(request)
    return seen


def test_a_micro_batch_goes_there_and_back_and_carries_what_the_hops_have_answered() -> None:
    rig = Rig(stages=2)
    rig.lease(1.0, 4)
    seen = through(rig, 1.5, 7, loss=2.5)
    hops = [(r.id.hop, r.id.backward, r.kind) for r in seen]
    assert hops == [
        *((0, False, "forward"), (1, False, "forward"), (2, False, "forward")),
        *((3, True, "backward"), (2, True, "backward"), (1, True, "backward")),
        (0, True, "backward"),
    ]
    assert [r.inputs for r in seen] == [
        EMPTY,
        *(tensor("y4.0"), tensor("y4.1"), tensor("y4.2"), tensor("y4.1"), tensor("y4.0")),
        EMPTY,
    ]
    assert [r.gradient for r in seen] == [EMPTY] * 4 + [tensor(f"g4.{h}") for h in (3, 2, 1)]
    assert [r.tokens for r in seen] == [b"tokens4", b"", b"", b"tokens4", b"", b"", b"tokens4"]
    assert all((r.version, r.stage_generation, r.path) == (5, 3, (0, 1, 2, 3)) for r in seen)
    assert {(r.id.generation, r.id.step, r.id.attempt) for r in seen} == {(0, 5, 0)}
    done, asking = rig.to_leader()
    assert done == MicroBatchDone(0, 5, 4, 2.5)
    assert isinstance(asking, LeaseRequest) and asking.working == ()
    assert rig.core.figures() == {"active": 0, "parked": 0, "done": 1, "redo": 0}


def test_a_timeout_sends_the_same_bytes_elsewhere_and_a_late_answer_still_counts() -> None:
    rig = Rig(stages=2)
    rig.lease(0.0, 1)
    through(rig, 0.1, 1)
    slow, first = rig.asked()
    due = 0.1 + rig.core.router.timeout_s((1, False))
    rig.core.tick(due - 0.01)
    assert not rig.requests()
    rig.core.tick(due)
    other, second = rig.asked()
    assert other != slow
    assert second.id.attempt == first.id.attempt + 1
    assert (second.inputs, second.path, second.kind) == (first.inputs, first.path, first.kind)
    assert rig.core.router.is_banned(due, slow)
    rig.reply(due + 1.0, slow, first)  # late, but first
    assert not rig.core.router.is_banned(due + 1.0, slow)
    _, following = rig.asked()
    assert following.id.hop == 2
    rig.reply(due + 2.0, other, second)  # nobody waits for it any more
    assert not rig.requests()
    assert rig.outcomes() == ["ok", "timeout", "ok", "ok"]


def test_a_worker_that_is_gone_costs_one_retry_at_once() -> None:
    rig = Rig(stages=2)
    rig.lease(0.0, 1)
    gone, first = rig.asked()
    rig.core.disconnected(0.5, gone)
    other, second = rig.asked()
    assert other != gone and second.id.hop == first.id.hop
    assert rig.core.router.is_banned(0.6, gone)
    rig.core.connected(0.7, gone)
    assert not rig.core.router.is_banned(0.7, gone)


def test_without_workers_it_is_parked_until_somebody_comes() -> None:
    rig = Rig(stages=1)
    everybody, rig.serving[1] = rig.serving[1], []
    rig.lease(0.0, 1, 2)
    for peer, request in rig.requests():
        rig.reply(0.1, peer, request)
    assert not rig.requests()
    assert rig.core.figures()["parked"] == 2
    rig.serving[1] = everybody
    rig.core.reconcile(0.2)
    assert len(rig.requests()) == 2
    assert rig.core.figures()["parked"] == 0


def test_it_never_gives_up_while_the_lease_lives_and_gives_up_when_it_ends() -> None:
    rig = Rig(stages=1, replicas=1)
    rig.lease(0.0, 7, ttl_s=40.0)
    now, tries = 0.0, 0
    while now < 39.0:
        for peer, request in rig.requests():
            tries += 1
            rig.refuse(now, peer, request, "failed")
        now = rig.core.deadline()
        rig.core.tick(now)
    assert 60 <= tries <= 100  # after a breath each time, half a second at the longest
    rig.core.tick(40.0)
    assert MicroBatchDone(0, 5, 7, 0.0, True) in rig.to_leader()
    assert rig.core.figures()["active"] == 0
    rig.lease(41.0, 7)  # and it may get the same one again
    assert rig.asked()[1].id.micro_batch == 7


def test_leases_are_renewed_by_every_answer_of_the_leader() -> None:
    rig = Rig(stages=1)
    rig.lease(0.0, 1, ttl_s=3.0)
    rig.sent()
    rig.core.tick(LEASE_POLL_S)
    (asking,) = rig.to_leader()
    assert asking == LeaseRequest(0, 5, 1, (1,))
    rig.lease(2.5, ttl_s=3.0)
    rig.core.tick(5.4)
    assert rig.core.figures()["active"] == 1
    rig.core.tick(5.6)
    assert rig.core.figures()["active"] == 0


def test_the_window_is_two_per_stage_and_halves_when_requests_are_late() -> None:
    rig = Rig(stages=3)
    asking = rig.to_leader()[-1]
    assert isinstance(asking, LeaseRequest) and asking.room == 6
    rig.lease(0.0, *range(6))
    assert rig.core.room() == 0
    rig.core.tick(limits.HOP_TIMEOUT_S_FIRST)
    assert rig.core.window.size == 3
    for peer, request in rig.requests():
        rig.refuse(20.0, peer, request, "busy")
    assert rig.core.window.size == 1
    assert rig.core.room() == 0


def test_too_many_kept_bytes_leave_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(stages=2)
    monkeypatch.setattr(limits, "DRIVER_KEPT_BYTES_MAX", 8)
    rig.lease(0.0, 1)
    assert rig.core.room() == 3
    through(rig, 0.1, 2)  # two activations of four bytes
    assert rig.core.room() == 0


def test_redo_replays_only_that_hop_from_what_was_kept() -> None:
    rig = Rig(stages=2)
    rig.lease(0.0, 3)
    before = through(rig, 0.1, 7)
    rig.sent()
    rig.lease(1.0, redo=((2, 3),))
    peer, again = rig.asked()
    (old,) = [r for r in before if (r.id.hop, r.id.backward) == (2, True)]
    assert (again.inputs, again.gradient, again.kind) == (old.inputs, old.gradient, "backward")
    assert (again.id.hop, again.id.attempt) == (2, 1)
    assert rig.core.figures()["redo"] == 1
    rig.reply(1.1, peer, again)
    assert MicroBatchDone(0, 5, 3, 0.0) in rig.to_leader()  # once more: it is all there again
    assert rig.core.figures() == {"active": 0, "parked": 0, "done": 1, "redo": 0}
    rig.lease(2.0, redo=((2, 3),))
    assert rig.asked()[1].id.attempt == 2  # and lost again


def test_the_first_answer_of_a_kind_of_hop_ends_the_patience_with_the_others() -> None:
    """Nothing is known at first, and everybody gets long; then the next timeout is like any."""
    rig = Rig(stages=2)
    rig.lease(0.0, 1, 2)
    (one, first), (two, _) = rig.requests()
    assert one != two
    rig.reply(0.1, one, first)
    rig.requests()
    rig.core.tick(0.1 + 1.01)
    assert [(m.id.micro_batch, m.id.hop, m.id.attempt) for _, m in rig.requests()] == [(2, 0, 1)]


def test_a_hop_is_sent_again_once_until_all_that_is_missing_is_there() -> None:
    """The leader repeats what it wants in every lease."""
    rig = Rig(stages=2)
    rig.lease(0.0, 3)
    through(rig, 0.1, 7)
    rig.sent()
    rig.lease(1.0, redo=((1, 3), (2, 3)))
    (one, first), (two, second) = rig.requests()
    rig.reply(1.1, one, first)
    rig.lease(1.2, redo=((1, 3), (2, 3)))
    assert not rig.requests()
    rig.reply(1.3, two, second)
    assert MicroBatchDone(0, 5, 3, 0.0) in rig.to_leader()


def test_redo_of_what_is_still_on_its_way_or_unknown() -> None:
    rig = Rig(stages=2)
    rig.lease(0.0, 3)
    through(rig, 0.1, 4)  # waits for the backward of hop 2
    rig.sent()
    rig.lease(0.2, redo=((1, 3), (2, 3), (3, 3), (1, 9)))
    seen = rig.sent()
    redone = [m.id.hop for _, m in seen if isinstance(m, HopRequest)]
    assert redone == [3]  # the head had been answered; the others come anyway
    assert MicroBatchDone(0, 5, 9, 0.0, True) in [m for _, m in seen]
    rig.lease(0.3, redo=((3, 3),))
    assert not rig.requests()  # once is enough while it is under way


def test_the_next_step_and_a_dropped_step_make_everything_void() -> None:
    for view in (View(0, 6, 3), View(0, 5, 4), View(1, 5, 3), None):
        rig = Rig(stages=2)
        rig.lease(0.0, 1)
        peer, request = rig.asked()
        rig.view = view
        rig.core.reconcile(0.1)
        assert rig.core.figures()["active"] == 0
        rig.reply(0.2, peer, request)
        assert not rig.requests()
        assert bool(rig.core.room()) and not rig.core.router.outstanding(peer)
        if view is not None:
            assert isinstance(view, View)
            rig.core.tick(0.3)


def test_patient_refusals_ban_nobody_and_are_asked_again_soon() -> None:
    for code in ("closing", "not_ready", "stale"):
        rig = Rig(stages=1, replicas=1)
        rig.lease(0.0, 1)
        peer, request = rig.asked()
        rig.refuse(0.1, peer, request, code)
        now = rig.core.deadline()
        assert 0.1 < now <= 0.2
        rig.core.tick(now)
        _, again = rig.asked()
        assert again.id.attempt == 1 and again.inputs == request.inputs
        rig.reply(now, peer, again)
        assert rig.asked()[1].id.hop == 1


def test_a_bad_worker_is_named_and_its_work_done_elsewhere() -> None:
    rig = Rig(stages=2)
    rig.lease(0.0, 1)
    bad, request = rig.asked()
    rig.core.receive(0.1, bad, HopReply(request.id, tensor("y"), math.nan, 0, 0.1))
    other, again = rig.asked()
    assert other != bad
    rig.core.receive(0.2, other, HopReply(again.id, EMPTY, 0.0, 0, 0.1))  # no activation
    rig.requests()
    faults = [e.fields for e in rig.events if isinstance(e, Notice)]
    assert [f["fault"] for f in faults] == ["bad_reply", "bad_reply"]
    assert [f["peer"] for f in faults] == [bad.hex(), other.hex()]


def test_answers_to_an_earlier_life_of_this_driver_count_for_nothing() -> None:
    rig = Rig(stages=2)
    rig.lease(0.0, 1)
    _, request = rig.asked()
    rig.reply(0.1, PeerId(b"s" * 32), request)
    assert not rig.requests()
    assert [e.fields["reason"] for e in rig.events if isinstance(e, Notice)] == ["unexpected"]


def test_an_input_that_two_workers_call_malformed_is_made_again_by_somebody_else() -> None:
    rig = Rig(stages=2)
    rig.lease(0.0, 1)
    maker, request = rig.asked()
    rig.reply(0.1, maker, request)
    one, first = rig.asked()
    rig.refuse(0.2, one, first, "malformed")
    two, second = rig.asked()
    assert two != one
    rig.refuse(0.3, two, second, "malformed")
    found = rig.requests()
    peer, again = found[-1]
    assert (again.id.hop, again.id.backward, again.id.attempt) == (0, False, 1)
    assert peer != maker
    rig.reply(0.4, peer, again)
    assert rig.asked()[1].id.hop == 1
    notices = [e.fields for e in rig.events if isinstance(e, Notice)]
    assert {"peer": maker.hex(), "fault": "bad_tensor"} in notices


def test_a_new_leader_hears_what_is_done_and_what_is_under_way() -> None:
    rig = Rig(stages=2)
    rig.lease(0.0, 1)
    through(rig, 0.1, 7, loss=1.25)
    rig.lease(0.2, 2)
    rig.sent()
    other = PeerId(b"M" * 32)
    rig.core.leader_changed(1.0, other)
    news = rig.sent()
    assert (other, MicroBatchDone(0, 5, 1, 1.25)) in news
    assert (other, LeaseRequest(0, 5, 3, (2,))) in news
    rig.lease(1.1, 3)  # of the old leader
    assert not rig.requests()


def test_much_slower_than_usual_and_somebody_idle_two_are_asked() -> None:
    rig = Rig(stages=1, replicas=2)
    now = 0.0
    for k in range(OBSERVATIONS_FOR_HEDGE):
        rig.lease(now, k)
        for _ in range(5):
            peer, request = rig.asked()
            now += 0.1
            rig.reply(now, peer, request)
        rig.sent()
    rig.lease(now, 100)
    slow, request = rig.asked()
    at = rig.core.deadline()
    assert at == pytest.approx(now + 0.2)
    rig.core.tick(at)
    other, second = rig.asked()
    assert other != slow and second.id.attempt == 1
    rig.reply(at + 0.05, other, second)
    assert rig.asked()[1].id.hop == 1  # the first to answer counts
    assert rig.core.router.outstanding(slow) >= 1  # and the other still has its work
    rig.reply(at + 0.5, slow, request)
    assert not rig.requests()


def test_sticky_backwards_go_to_the_worker_of_the_forward() -> None:
    rig = Rig(stages=3, replicas=6, sticky=True)
    rig.lease(0.0, 0, 1, 2)
    makers: dict[tuple[int, int], PeerId] = {}
    for turn in range(9):
        for peer, request in rig.requests():
            k, hop = request.id.micro_batch, request.id.hop
            if not request.id.backward:
                makers[k, hop] = peer
            elif hop != 4:
                assert makers[k, hop] == peer
            rig.reply(0.1 * turn, peer, request)
    assert rig.core.figures()["done"] == 3 and rig.core.not_sticky == 0


def test_sticky_falls_back_to_another_worker_and_counts_it() -> None:
    rig = Rig(stages=1, replicas=2, sticky=True)
    rig.lease(0.0, 0)
    through(rig, 0.1, 1)
    peer, request = rig.asked()
    rig.reply(0.2, peer, request)
    rig.serving[1] = [w for w in rig.serving[1] if w != peer]
    through(rig, 0.3, 1)
    assert rig.asked()[0] == rig.serving[1][0]
    assert rig.core.not_sticky == 1


def test_odd_micro_batches_take_the_swapped_path_if_the_run_says_so() -> None:
    rig = Rig(stages=4, paths=PathPlan(4, rule=PathRule(4, swapped=True)))
    rig.lease(0.0, 2, 3)
    for _ in range(6):
        for peer, request in rig.requests():
            wanted = (0, 2, 1, 4, 3, 5) if request.id.micro_batch == 3 else (0, 1, 2, 3, 4, 5)
            assert request.path == wanted
            rig.reply(0.1, peer, request)


def test_the_first_micro_batches_leave_out_the_stage_that_the_log_names() -> None:
    rig = Rig(stages=4, paths=PathPlan(4, rule=PathRule(4, skips=1)))
    rig.view = View(0, 5, 3, skip=2)
    rig.core.reconcile(0.0)
    rig.lease(0.0, 0, 1)
    seen = set()
    for _ in range(4):
        for peer, request in rig.requests():
            wanted = (0, 1, 2, 3, 4, 5) if request.id.micro_batch else (0, 1, 3, 4, 5)
            assert request.path == wanted
            seen.add((request.id.micro_batch, request.id.hop))
            rig.reply(0.1, peer, request)
    assert (0, 3) in seen and (0, 2) not in seen and (1, 2) in seen


def test_tensors_that_do_not_fit_beside_each_other_go_by_root() -> None:
    rig = Rig(stages=2)
    rig.lease(0.0, 1)
    big = bytes(30 * 1024)
    for _ in range(4):
        peer, request = rig.asked()
        root = b"%32d" % request.id.hop
        reply = HopReply(request.id, Tensor(root, len(big), big), 0.0, 0, 0.1)
        rig.core.receive(0.1, peer, reply)
    _, request = rig.asked()
    assert request.inputs.data == big
    assert request.gradient == Tensor(b"%32d" % 3, len(big))
    assert [s.tensor.data for s in rig.served] == [big]


def test_one_worker_four_times_slower_beats_uniform_round_robin_by_1_4() -> None:
    """Experiment 7.5 with the whole driver: eight workers on four stages."""

    def seconds(peer: PeerId, request: HopRequest) -> float:
        usual = 0.3 if request.id.backward else 0.1
        return usual * (4.0 if peer == worker(2, 0) else 1.0)

    fast = serve_all(Rig(stages=4), 120, seconds)
    uniform = serve_all(Rig(stages=4, policy="uniform"), 120, seconds)
    assert uniform / fast >= 1.4


def test_deadlines_pass() -> None:
    """After ``tick`` at the deadline the next one is later: no spinning."""
    rig = Rig(stages=2, replicas=1)
    rig.lease(0.0, 1, 2, 3)
    now = 0.0
    for _ in range(260):
        following = rig.core.deadline()
        assert following > now or now == 0.0
        now = following
        rig.core.tick(now)
        rig.sent()
    assert rig.core.figures()["active"] == 0  # the leader has been silent for too long


def test_an_inactive_driver_is_silent() -> None:
    rig = Rig()
    rig.core.set_active(0.0, False)
    rig.sent()
    rig.core.tick(10.0)
    rig.lease(11.0, 1)
    assert rig.sent() == []
    assert rig.core.deadline() == math.inf
