"""A driver without leases: its own numbers, a full window, and backwards that keep their worker."""

from __future__ import annotations

import math
import random

from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.messages.pipeline import HopRequest
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.envelope import View
from swarmtrain_protocols.pipeline.errands import ERRANDS_FROM
from swarmtrain_protocols.pipeline.freedriver import MICRO_BATCH_S, FreeDriver
from swarmtrain_protocols.pipeline.paths import PathPlan
from swarmtrain_protocols.pipeline.routing import OBSERVATIONS_FOR_HEDGE
from swarmtrain_protocols.rounds.effects import Notice
from tests.protocols.pipeline.driver_kit import LEADER, Rig


class FreeRig(Rig):
    """A rig whose driver deals itself micro-batches; tokens come when a test says so."""

    core: FreeDriver

    def __init__(self, stages: int = 2, replicas: int = 2, seed: int = 11) -> None:
        super().__init__(stages, replicas)
        self.out.clear()
        self._sent.clear()
        self.wanted.clear()
        self.view = View(0, 0, 3)
        self.core = FreeDriver(
            rng=random.Random(seed),
            out=self.out,
            stages=stages,
            view=lambda: self.view,
            workers=lambda stage: self.serving[stage],
            version=lambda stage: 5,
            paths=PathPlan(stages),
        )
        self.core.leader_changed(0.0, LEADER)
        self.core.set_active(0.0, True)

    def begin(self, now: float = 0.0, count: int = 1) -> list[int]:
        """The tokens of the next ``count`` micro-batches are here."""
        self._collect()
        due, self.wanted = self.wanted[:count], self.wanted[count:]
        for need in due:
            self.core.tokens(now, need.step, need.micro_batch, b"tokens")
        return [need.micro_batch for need in due]

    def forwards(self, now: float) -> tuple[PeerId, HopRequest]:
        """Take a single micro-batch to its head; returns the first backward below that."""
        for _ in range(4):
            peer, request = self.asked()
            self.reply(now, peer, request, loss=2.0)
        return self.asked()


def test_it_fills_its_window_with_numbers_of_its_own() -> None:
    rig = FreeRig()
    rig._collect()
    numbers = [need.micro_batch for need in rig.wanted]
    assert numbers == list(range(numbers[0], numbers[0] + 4)), "two for each block stage"
    assert all(need.step == 0 for need in rig.wanted)
    assert numbers[-1] < ERRANDS_FROM
    assert rig.to_leader() == [], "nobody is asked for leases"
    other = FreeRig(seed=12)
    other._collect()
    assert other.wanted[0].micro_batch != numbers[0], "drawn anew by each driver"
    assert rig.core.deadline() == MICRO_BATCH_S


def test_a_micro_batch_that_is_done_makes_room_for_another() -> None:
    rig = FreeRig()
    (k,) = rig.begin()
    for _ in range(7):
        peer, request = rig.asked()
        assert request.id.micro_batch == k
        rig.reply(1.0, peer, request, loss=2.5)
    rig._collect()
    passed = [x for x in rig.events if isinstance(x, px.MicroBatchPassed)]
    assert passed == [px.MicroBatchPassed(k, 2.5)] and rig.core.passed == 1
    assert k not in rig.core.batches and len(rig.core.batches) == 4
    assert rig.to_leader() == []


def test_a_backward_goes_to_the_worker_of_its_forward() -> None:
    rig = FreeRig(replicas=3)
    rig.begin()
    made: dict[int, PeerId] = {}
    for _ in range(3):
        peer, request = rig.asked()
        made[request.id.hop] = peer
        rig.reply(1.0, peer, request)
    rig.reply(1.0, *rig.asked())
    for hop in (2, 1, 0):
        peer, request = rig.asked()
        assert (request.id.hop, request.id.backward, peer) == (hop, True, made[hop])
        rig.reply(1.0, peer, request)
    assert rig.core.not_sticky == 0


def test_it_waits_for_a_worker_that_takes_up_a_round() -> None:
    rig = FreeRig()
    rig.begin()
    peer, request = rig.forwards(1.0)
    for code in ("not_ready", "closing", "stale"):
        rig.refuse(1.0, peer, request, code)
        assert rig.requests() == [], "others have other weights"
        rig.core.tick(rig.core.deadline())
        again = rig.asked()
        assert again[0] == peer and again[1].id.attempt == request.id.attempt + 1
        request = again[1]
    assert rig.core.not_sticky == 0


def test_a_worker_that_fails_is_left_and_counted() -> None:
    rig = FreeRig()
    rig.begin()
    peer, request = rig.forwards(1.0)
    rig.refuse(1.0, peer, request, "failed")
    other, again = rig.asked()
    assert other != peer and again.id.hop == request.id.hop
    assert rig.core.not_sticky == 1
    rig.core.disconnected(1.0, other)
    rig.core.tick(rig.core.deadline())
    assert len(rig.requests()) == 1, "with nobody else, it is asked again"


def test_a_slow_worker_times_out_and_the_backward_moves() -> None:
    rig = FreeRig()
    rig.begin()
    peer, request = rig.forwards(1.0)
    rig.core.tick(rig.core.deadline())
    other, again = rig.asked()
    assert other != peer and again.id.attempt == request.id.attempt + 1


def test_only_forwards_are_asked_twice_at_once() -> None:
    """A second backward would count a gradient in two sums."""
    rig = FreeRig(stages=1)
    for _ in range(OBSERVATIONS_FOR_HEDGE):
        rig.begin()
        for at in range(5):
            rig.reply(at * 0.01, *rig.asked())
    (k,) = rig.begin()
    first = rig.asked()
    rig.core.tick(rig.core.deadline())
    hedge = rig.asked()
    assert first[1].id.hop == hedge[1].id.hop == 0 and first[0] != hedge[0]
    rig.reply(10.0, *hedge)
    rig.reply(10.0, *rig.asked())
    rig.reply(10.0, *rig.asked())
    backward = rig.asked()
    assert (backward[1].id.hop, backward[1].id.backward) == (1, True)
    rig.core.tick(10.2)
    assert [r for r in rig.requests() if r[1].id.micro_batch == k] == []


def test_what_takes_too_long_is_given_up_and_told() -> None:
    rig = FreeRig()
    (k,) = rig.begin()
    rig.asked()
    rig.core.tick(MICRO_BATCH_S + 1.0)
    assert k not in rig.core.batches and len(rig.core.batches) == rig.core.window.size == 2
    rig._collect()
    notices = [x for x in rig.events if isinstance(x, Notice)]
    assert {x.fields["what"] for x in notices} == {"micro-batch given up"}


def test_while_nothing_can_be_done_it_forgets_everything() -> None:
    rig = FreeRig()
    rig.begin()
    rig.view = None
    rig.core.reconcile(1.0)
    assert rig.core.batches == {} and rig.core.deadline() == math.inf
    rig.view = View(0, 0, 4)
    rig.core.reconcile(2.0)
    assert len(rig.core.batches) == 4
