"""Errands: one forward pass through the stages, whoever dies on the way."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Effect, Emit, PeerId, Send
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.messages.pipeline import (
    EMPTY,
    HopRefused,
    HopReply,
    HopRequest,
    Tensor,
)
from swarmtrain_protocols.pipeline.errands import (
    ERRANDS_FROM,
    RETRY_S,
    ErrandDone,
    ErrandFailed,
    Errands,
)
from swarmtrain_protocols.pipeline.hops import plain_path

PEERS = [PeerId(bytes([n]) * 32) for n in range(3)]
TIMEOUT_S = 2.0


def tensor(n: int) -> Tensor:
    return Tensor(bytes([n]) * 32, 1, bytes([n]))


class World:
    """Two block stages, three workers of everything; ``weights`` is the version now."""

    def __init__(self) -> None:
        self.out: list[Effect] = []
        self.weights = 7
        self.workers = list(PEERS)
        self.errands = Errands(
            ledger=Ledger(),
            out=self.out,
            stages=2,
            workers=lambda hop: self.workers,
            version=lambda: self.weights,
            stage_generation=lambda stage: 10 + stage,
            hop_timeout_s=lambda hop: TIMEOUT_S,
        )

    def start(self, kind: Any = "evaluate", **more: Any) -> int:
        return self.errands.start(0.0, kind, b"text", plain_path(2), timeout_s=30.0, **more)

    def asked(self) -> tuple[PeerId, HopRequest]:
        """The one request that was sent since the last call."""
        (effect,) = self.out
        self.out.clear()
        assert isinstance(effect, Send) and isinstance(effect.message, HopRequest)
        return effect.peer, effect.message

    def events(self) -> list[object]:
        found = [effect.event for effect in self.out if isinstance(effect, Emit)]
        self.out.clear()
        return found

    def answer(self, output: Tensor = EMPTY, loss: float = 0.0) -> HopRequest:
        peer, request = self.asked()
        self.errands.receive(1.0, peer, HopReply(request.id, output, loss, 0, 0.1))
        return request


def test_an_errand_visits_every_hop_with_what_the_one_before_said() -> None:
    world = World()
    handle = world.start()
    said = [world.answer(tensor(n), loss=float(n)) for n in range(4)]
    assert [request.id.hop for request in said] == [0, 1, 2, 3]
    assert [request.inputs for request in said] == [EMPTY, tensor(0), tensor(1), tensor(2)]
    assert [request.tokens for request in said] == [b"text", b"", b"", b"text"]
    assert [request.stage_generation for request in said] == [10, 11, 12, 10]
    assert all(request.version == 7 and request.kind == "evaluate" for request in said)
    assert all(request.id.micro_batch >= ERRANDS_FROM for request in said)
    assert world.events() == [ErrandDone(handle, tensor(3), 3.0, 7)]
    assert world.errands.deadline() == math.inf


def test_the_head_needs_no_targets_to_generate() -> None:
    world = World()
    world.start("generate")
    said = [world.answer(tensor(n)) for n in range(4)]
    assert said[3].tokens == b""


def test_a_dead_worker_costs_one_hop() -> None:
    world = World()
    world.start()
    world.answer(tensor(1))
    peer, request = world.asked()
    world.errands.disconnected(1.0, peer)
    other, again = world.asked()
    assert other != peer
    assert again.inputs == request.inputs and again.id.hop == 1
    assert again.id.attempt > request.id.attempt
    # The late answer of the first changes nothing.
    world.errands.receive(1.1, peer, HopReply(request.id, tensor(9), 0.0, 0, 0.1))
    assert world.out == []


def test_silence_and_refusals_lead_to_the_next_worker_and_round_again() -> None:
    world = World()
    world.start()
    first, _ = world.asked()
    world.errands.tick(TIMEOUT_S)
    second, request = world.asked()
    world.errands.receive(2.1, second, HopRefused(request.id, "busy"))
    third, request = world.asked()
    assert len({first, second, third}) == 3
    world.errands.receive(2.2, third, HopRefused(request.id, "busy"))
    assert world.out == []
    assert world.errands.deadline() == 2.2 + RETRY_S
    world.errands.tick(2.2 + RETRY_S)
    assert world.asked()[0] == first


def test_new_weights_begin_it_again() -> None:
    world = World()
    world.start()
    world.answer(tensor(1))
    world.asked()
    world.weights = 8
    world.errands.reconcile(1.0)
    _, request = world.asked()
    assert (request.id.hop, request.version, request.inputs) == (0, 8, EMPTY)


def test_a_worker_that_is_further_begins_it_again() -> None:
    world = World()
    world.start()
    world.answer(tensor(1))
    peer, request = world.asked()
    world.weights = 8
    world.errands.receive(1.0, peer, HopRefused(request.id, "stale"))
    _, again = world.asked()
    assert (again.id.hop, again.version) == (0, 8)


def test_it_expires_and_says_why() -> None:
    world = World()
    handle = world.start()
    peer, request = world.asked()
    world.workers = [peer]
    world.errands.receive(1.0, peer, HopRefused(request.id, "failed", "no memory"))
    world.errands.tick(30.0)
    assert world.events() == [ErrandFailed(handle, "failed no memory", "failed")]


def test_a_pinned_hop_goes_to_its_host_only() -> None:
    world = World()
    world.start(pinned={1: PEERS[2]})
    world.answer(tensor(1))
    peer, request = world.asked()
    assert (peer, request.id.hop) == (PEERS[2], 1)
    world.errands.receive(1.0, peer, HopRefused(request.id, "busy"))
    assert world.out == []
    world.errands.tick(1.0 + RETRY_S)
    assert world.asked()[0] == PEERS[2]


def test_answers_of_others_and_after_a_cancel_are_ignored() -> None:
    world = World()
    handle = world.start()
    peer, request = world.asked()
    reply = HopReply(request.id, tensor(1), 0.0, 0, 0.1)
    world.errands.receive(1.0, PEERS[2] if peer != PEERS[2] else PEERS[1], reply)
    forged = replace_id(reply, step=99)
    world.errands.receive(1.0, peer, forged)
    assert world.out == []
    world.errands.cancel(handle)
    world.errands.receive(1.0, peer, reply)
    assert world.out == []


def replace_id(reply: HopReply, **changes: Any) -> HopReply:
    return msgspec.structs.replace(reply, id=msgspec.structs.replace(reply.id, **changes))


def test_misuse_is_refused() -> None:
    world = World()
    with pytest.raises(LocalProtocolError, match="step"):
        world.start("backward")
    for _ in range(limits.ERRANDS_MAX):
        world.start()
    with pytest.raises(LocalProtocolError, match="too many"):
        world.start()


def test_whoever_began_it_is_told_instead_of_the_layer_above() -> None:
    world = World()
    told: list[tuple[float, object]] = []
    handle = world.start(done=lambda now, event: told.append((now, event)))
    for n in range(4):
        world.answer(tensor(n), loss=2.0)
    assert told == [(1.0, ErrandDone(handle, tensor(3), 2.0, 7))] and world.events() == []


def test_an_errand_that_is_cancelled_by_the_failure_of_another_asks_nobody() -> None:
    world = World()
    world.workers = []
    other: list[int] = []
    world.start(done=lambda now, event: world.errands.cancel(other[0]))
    other.append(world.start())
    world.workers = list(PEERS)
    world.errands.tick(31.0)
    assert world.out == [] and world.errands.deadline() == math.inf


def test_a_failure_has_a_code_and_the_hop_where_it_stood() -> None:
    world = World()
    assert not world.errands.busy
    handle = world.start("generate")
    world.answer(tensor(1))
    peer, request = world.asked()
    world.errands.receive(1.0, peer, HopRefused(request.id, "share", "0.1 is used up"))
    world.asked()
    assert world.errands.busy
    world.errands.tick(30.0)
    assert world.events() == [ErrandFailed(handle, "share 0.1 is used up", "share", 1)]
    world.workers = []
    handle = world.start("generate")
    world.errands.tick(31.0)
    failed = ErrandFailed(handle, "nobody in reach serves hop 0", "no_worker", 0)
    assert world.events() == [failed]
