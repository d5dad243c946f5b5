"""What a pipeline does with bad input: a typed refusal, the peer named, the work done elsewhere.

One driver and two workers that serve all stages, connected by nothing but the wire's encoding. One
of them spoils what it answers; every micro-batch is finished all the same, each gradient counted
once, and whoever spoiled it is named. Values are looked at by trainers
(``tests/swarmtrain/training/stages/test_runtime.py``); the device here refuses as they do.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from swarmtrain_protocols import limits, messages
from swarmtrain_protocols.core import Effect, Emit, PeerId, Send
from swarmtrain_protocols.errors import ConfigError, PeerFault
from swarmtrain_protocols.manifest import check_stages
from swarmtrain_protocols.messages import pipeline as m
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.driver import DriverCore
from swarmtrain_protocols.pipeline.envelope import View
from swarmtrain_protocols.pipeline.paths import PathPlan
from swarmtrain_protocols.pipeline.requests import inline_tensor
from swarmtrain_protocols.pipeline.worker import WorkerCore
from swarmtrain_protocols.rounds.effects import Notice
from swarmtrain_protocols.rounds.fetches import Fetches
from swarmtrain_protocols.rounds.member import RoundMember
from tests.protocols.pipeline.stage_kit import StageLog
from tests.protocols.pipeline.worker_kit import BLOCKS, DRIVER, HEAD, Bench, jobs
from tests.protocols.rounds_kit import RINGS, A, B, C, D, E, sent

LEADER, BAD, GOOD, SELF = A, B, C, D
COUNT = 4
SIZE = 3
"""Bytes of every activation and gradient."""
NOT_FINITE = b"nan"
Spoil = Callable[["Line", m.HopReply], list[m.HopReply]]


class Line:
    """Driver D, workers B and C; ``spoil`` makes B's answers what they are on the wire."""

    def __init__(self, spoil: Spoil | None = None) -> None:
        self.log = StageLog(A, B, C, D, E, blocks=BLOCKS)
        self.now = 0.0
        self.spoil = spoil
        self.notices: list[Notice] = []
        self.outcomes: list[str] = []
        self.done: list[m.MicroBatchDone] = []
        self.requests: list[tuple[PeerId, m.HopRequest]] = []
        self.added: dict[bytes, dict[tuple[int, int], int]] = {BAD: {}, GOOD: {}}
        self.linked = [PeerId(BAD), PeerId(GOOD)]
        self.outs: dict[bytes, list[Effect]] = {BAD: [], GOOD: [], SELF: []}
        for member in (BAD, GOOD):
            self.log.assign(member, 0, 1, 2)
        self.workers = {member: self.worker(member) for member in (BAD, GOOD)}
        self.driver = DriverCore(
            rng=random.Random(5),
            out=self.outs[SELF],
            stages=BLOCKS,
            view=lambda: View(0, 0, 0),
            workers=lambda stage: self.linked,
            version=lambda stage: 0,
            paths=PathPlan(BLOCKS),
        )
        self.driver.leader_changed(0.0, PeerId(LEADER))
        self.driver.set_active(0.0, True)

    def worker(self, member: bytes) -> WorkerCore:
        out = self.outs[member]
        rounds = RoundMember(
            keyring=next(ring for ring in RINGS if ring.peer_id == member),
            rng=random.Random(1),
            ledger=self.log.ledger,
            fetches=Fetches(out),
            out=out,
            max_base_age_rounds=2,
        )
        worker = WorkerCore(
            me=PeerId(member),
            ledger=self.log.ledger,
            out=out,
            member=rounds,
            in_step=lambda name: True,
            micro_batches=COUNT,
            scatter_codec="fp32",
        )
        worker.leader = rounds.leader = PeerId(LEADER)
        worker.trainer(0.0, 1 << 20)
        return worker

    # -- what the shells do ----------------------------------------------------------------

    def device(self, member: bytes, job: px.Compute) -> None:
        """Looks at every byte before it computes, as a trainer does."""
        worker = self.workers[member]
        for tensor in (job.inputs, job.gradient):
            data = tensor.data
            if tensor.nbytes and (tensor.nbytes != SIZE or len(data) != SIZE):
                why = f"malformed: {tensor.nbytes} bytes, not {SIZE}"
                return worker.compute_failed(self.now, job.job, why)
            if data == NOT_FINITE:
                why = "malformed: a value is not finite"
                return worker.compute_failed(self.now, job.job, why)
        if job.accumulate:
            at = job.hop, job.micro_batch
            self.added[member][at] = self.added[member].get(at, 0) + 1
        last = job.hop == 0 and job.kind == "backward"
        mark = b"g" if job.kind == "backward" else b"y"
        output = m.EMPTY if last else inline_tensor(mark + bytes((job.hop, job.micro_batch)))
        loss = 2.5 if job.hop == HEAD else 0.0
        return worker.computed(self.now, job.job, output, loss, 0.01)

    def deliver(self, sender: bytes, to: bytes, message: object) -> None:
        """Over the wire. Whoever sends what cannot be decoded loses its link."""
        try:
            heard = messages.decode(messages.encode(message))  # type: ignore[arg-type]
        except PeerFault as fault:
            self.notices.append(Notice("peer_fault", {"peer": sender.hex(), "fault": fault.code}))
            self.linked = [peer for peer in self.linked if peer != sender]
            self.driver.disconnected(self.now, PeerId(sender))
            return
        if to == SELF:
            self.driver.receive(self.now, PeerId(sender), heard)
        elif to in self.workers:
            assert isinstance(heard, m.HopRequest)
            self.requests.append((PeerId(to), heard))
            self.workers[to].receive(self.now, PeerId(sender), heard)
        elif isinstance(heard, m.MicroBatchDone):
            self.done.append(heard)

    def settle(self) -> None:
        """Until nobody has anything more to do at this moment."""
        while any(self.outs.values()):
            for member, out in self.outs.items():
                effects, out[:] = list(out), []
                for effect in effects:
                    self.carry_out(member, effect)

    def carry_out(self, member: bytes, effect: Effect) -> None:
        if isinstance(effect, Send):
            spoilt = (
                self.spoil if member == BAD and isinstance(effect.message, m.HopReply) else None
            )
            for message in [effect.message] if spoilt is None else spoilt(self, effect.message):
                self.deliver(member, effect.peer, message)
        elif isinstance(effect, px.Compute):
            self.device(member, effect)
        elif isinstance(effect, px.NeedTokens):
            self.driver.tokens(self.now, effect.step, effect.micro_batch, b"\1\0\0\0" * 4)
        elif isinstance(effect, Emit) and isinstance(effect.event, Notice):
            self.notices.append(effect.event)
        elif isinstance(effect, Emit) and isinstance(effect.event, px.HopDone):
            self.outcomes.append(effect.event.outcome)

    def train(self, until_s: float = 60.0) -> None:
        """All micro-batches of a step, with the lease renewed."""
        while len({one.micro_batch for one in self.done}) < COUNT and self.now < until_s:
            lease = m.Lease(0, 0, tuple(range(COUNT)), 30.0)
            self.driver.receive(self.now, PeerId(LEADER), lease)
            self.settle()
            self.now += 0.05
            self.driver.tick(self.now)
            self.settle()

    # -- what came of it -------------------------------------------------------------------

    def faults(self) -> set[tuple[str, str]]:
        return self._told("peer_fault", "fault")

    def ignored(self) -> set[tuple[str, str]]:
        return self._told("message_ignored", "reason")

    def _told(self, name: str, field: str) -> set[tuple[str, str]]:
        mine = [n.fields for n in self.notices if n.name == name]
        return {(str(fields[field]), str(fields["peer"])) for fields in mine}

    def check_whole(self) -> None:
        """Every micro-batch is done, none given up, and no gradient was added twice anywhere."""
        assert sorted({one.micro_batch for one in self.done}) == list(range(COUNT))
        assert not any(one.abandoned for one in self.done)
        assert all(math.isfinite(one.loss) for one in self.done)
        for k in range(COUNT):
            for hop in range(BLOCKS + 2):
                has = [self.added[member].get((hop, k), 0) for member in (BAD, GOOD)]
                assert max(has) == 1, (hop, k, has)
        for member, worker in self.workers.items():
            for hop in range(BLOCKS + 2):
                held = sorted(k for (h, k) in self.added[member] if h == hop)
                assert worker.have(hop) == held


def with_output(reply: m.HopReply, output: m.Tensor) -> list[m.HopReply]:
    """``reply`` with another tensor, if it has one at all."""
    return [msgspec.structs.replace(reply, output=output) if reply.output.nbytes else reply]


def wrong_shape(line: Line, reply: m.HopReply) -> list[m.HopReply]:
    return with_output(reply, inline_tensor(b"y" * (SIZE + 1)))


def not_finite(line: Line, reply: m.HopReply) -> list[m.HopReply]:
    return with_output(reply, inline_tensor(NOT_FINITE))


def oversize(line: Line, reply: m.HopReply) -> list[m.HopReply]:
    return with_output(reply, m.Tensor(b"r" * 32, limits.ACTIVATION_BYTES_MAX + 1))


def too_long_inline(line: Line, reply: m.HopReply) -> list[m.HopReply]:
    data = bytes(limits.HOP_INLINE_BYTES_MAX + 1)
    return with_output(reply, m.Tensor(b"r" * 32, len(data), data))


def no_output(line: Line, reply: m.HopReply) -> list[m.HopReply]:
    return with_output(reply, m.EMPTY)


def loss_not_finite(line: Line, reply: m.HopReply) -> list[m.HopReply]:
    return [msgspec.structs.replace(reply, loss=math.inf)]


def test_honest_workers_are_blamed_for_nothing() -> None:
    line = Line()
    line.train()
    line.check_whole()
    assert line.faults() == set()
    assert set(line.outcomes) == {"ok"}
    assert all(line.added.values()), "both had their share"


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (wrong_shape, "bad_tensor"),
        (not_finite, "bad_tensor"),
        (no_output, "bad_reply"),
        (loss_not_finite, "bad_reply"),
    ],
)
def test_a_worker_that_answers_rubbish_is_named_and_its_work_done_elsewhere(
    spoil: Spoil, fault: str
) -> None:
    """Wrong shapes and values that are not finite: those who are handed them refuse, typed, and
    whoever made them is asked no more for a while."""
    line = Line(spoil)
    line.train()
    line.check_whole()
    assert (fault, BAD.hex()) in line.faults()
    assert not any(peer == GOOD.hex() for _, peer in line.faults()), "nobody else is blamed"
    made_again = {
        (r.id.micro_batch, r.id.hop, r.id.backward)
        for peer, r in line.requests
        if peer == GOOD and r.id.attempt > 0
    }
    assert made_again, "another worker did it again"


@pytest.mark.parametrize("spoil", [oversize, too_long_inline])
def test_an_oversize_tensor_does_not_get_past_the_wire(spoil: Spoil) -> None:
    line = Line(spoil)
    line.train()
    line.check_whole()
    assert [peer for _, peer in line.faults()] == [BAD.hex()]
    assert "disconnected" in line.outcomes, "what it was to answer went elsewhere at once"


def test_a_worker_that_answers_for_a_hop_that_was_asked_of_another_is_named() -> None:
    """Its answer counts for nothing: nobody asked it, whether it serves the stage or not."""

    def meddle(line: Line, reply: m.HopReply) -> list[m.HopReply]:
        others = [r.id for peer, r in line.requests if peer == GOOD]
        claims = [m.HopReply(one, inline_tensor(b"bad"), 9.0, 0, 0.01) for one in others]
        return [*claims, reply]

    line = Line(meddle)
    line.train()
    line.check_whole()
    assert line.faults() == set() and line.ignored() == {("unexpected", BAD.hex())}
    wrong = [r for _, r in line.requests if b"bad" in (r.inputs.data, r.gradient.data)]
    assert not wrong, "nothing was built on it"
    assert {one.loss for one in line.done} == {2.5}


def test_an_answer_of_another_than_was_asked_is_named_and_counts_for_nothing() -> None:
    """It is no fault: it may be late, for an earlier life of this driver that asked the same."""
    line = Line()
    line.driver.receive(0.0, PeerId(LEADER), m.Lease(0, 0, (0,), 30.0))
    need = next(x for x in line.outs[SELF] if isinstance(x, px.NeedTokens))
    line.driver.tokens(0.0, need.step, 0, b"\1\0\0\0" * 4)
    ((asked, request),) = sent(line.outs[SELF], m.HopRequest)
    other = BAD if asked == GOOD else GOOD
    line.outs[SELF].clear()
    line.driver.receive(0.0, PeerId(other), m.HopReply(request.id, inline_tensor(b"bad"), 0, 0, 0))
    line.settle()
    assert line.faults() == set() and line.ignored() == {("unexpected", other.hex())}
    assert not line.requests, "nothing followed from it"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"version": 3}, "not_ready"),
        ({"stage_generation": 2}, "not_ready"),
        ({"id": m.HopId(5, 0, 0, 1, True, 0)}, "not_ready"),
        ({"id": m.HopId(0, 7, 0, 1, True, 0)}, "not_ready"),
    ],
)
def test_requests_of_another_version_or_generation_touch_nothing(
    changes: dict[str, Any], code: str
) -> None:
    bench = Bench()
    bench.run("backward", 1, 2)
    bench.ask("backward", 1, 0, **changes)
    assert bench.refusals() == [code]
    assert jobs(bench) == []
    bench.truth()
    assert bench.worker.have(1) == [2]


def test_requests_of_a_step_that_is_over_are_stale() -> None:
    bench = Bench()
    old = bench.request("backward", 1, 0)
    bench.apply(bench.log.closing(E))
    bench.apply(bench.log.outcome())
    bench.take()
    bench.say(old, DRIVER)
    assert bench.refusals() == ["stale"]
    assert bench.worker.have(1) == []
    bench.run("backward", 1, 0)
    assert bench.worker.have(1) == [0], "the same micro-batch of the step of now is welcome"


def test_a_worker_with_stale_weights_is_passed_over_and_not_blamed() -> None:
    """It refuses; the step is finished by the other, and it is asked again later."""
    line = Line()
    line.workers[BAD]._in_step = lambda name: False
    line.train()
    line.check_whole()
    assert "not_ready" in line.outcomes
    assert line.faults() == set()
    assert line.added[BAD] == {}


def test_a_worker_is_not_made_to_compute_a_stage_that_it_does_not_serve() -> None:
    bench = Bench(stages=(1,))
    bench.ask("forward", 2, 0)
    assert bench.refusals() == ["not_served"]
    assert jobs(bench) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": inline_tensor(b"four")},
        {"gradient": inline_tensor(b"four")},
        {"inputs": m.EMPTY},
        {"inputs": m.Tensor(bytes(32), 3, b"abc")},
        {"path": (0, 2, 3)},
        {"tokens": b"\1\0\0\0"},
    ],
)
def test_a_request_of_another_shape_is_refused_and_its_driver_named(
    changes: dict[str, Any],
) -> None:
    bench = Bench()
    bench.ask("backward", 1, 0, **changes)
    notices = [x.event for x in bench.out if isinstance(x, Emit)]
    faults = [x.fields for x in notices if isinstance(x, Notice)]
    assert faults == [{"peer": DRIVER.hex(), "fault": "bad_hop"}]
    assert bench.refusals() == ["malformed"]
    assert jobs(bench) == []
    bench.run("backward", 1, 0)
    assert bench.worker.have(1) == [0], "a good one is taken after it"


def test_strangers_are_refused_and_named() -> None:
    bench = Bench()
    bench.ask("backward", 1, 0, peer=E)
    notices = [x.event for x in bench.out if isinstance(x, Emit)]
    assert [x.fields for x in notices if isinstance(x, Notice)] == [
        {"peer": E.hex(), "reason": "not_a_member"}  # no fault: it may be about to be one
    ]
    assert bench.refusals() == ["not_ready"]


@pytest.mark.parametrize(("stages", "layers"), [(3, 4), (5, 4), (0, 4)])
def test_a_model_that_cannot_be_cut_is_refused_before_anything_starts(
    stages: int, layers: int
) -> None:
    """By the number of its blocks; what else may be in the way is in ``test_cut.py``."""
    with pytest.raises(ConfigError, match="cannot be cut") as found:
        check_stages(stages, layers)
    assert found.value.exit_code == 3
    assert "divisor of 4" in found.value.todo
