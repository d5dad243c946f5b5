"""Logits in a run without stages: whom to ask, who answers, and within which share of its time."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from swarmtrain_protocols.core import Connect, Effect, Emit, PeerId, Send
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.messages import pipeline as m
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.errands import ErrandDone, ErrandFailed
from swarmtrain_protocols.pipeline.requests import inline_tensor
from swarmtrain_protocols.pipeline.whole import (
    ANSWER_TIMEOUT_S,
    CHANNEL,
    PATH,
    STUCK_S,
    WholeModel,
)
from tests.protocols.rounds_kit import A, B, C, D, Log, joined

LOGITS = inline_tensor(b"logits")


def ledger_of(round_: int = 3) -> Ledger:
    """Members A, B and C train, D only looks; the model is at ``round_``."""
    log = Log(A, B, C)
    assert log.add(joined(D, trains=False, holds_state=False))
    ledger = log.ledger
    ledger.channels[CHANNEL].round = round_
    return ledger


class Site:
    """One member's part; ``away`` are channels whose state is not here."""

    def __init__(self, me: bytes, linked: tuple[bytes, ...], share: float = 0.1) -> None:
        self.me = PeerId(me)
        self.out: list[Effect] = []
        self.linked = [PeerId(one) for one in linked]
        self.away: set[str] = set()
        self.ledger = ledger_of()
        self.core = WholeModel(
            me=self.me,
            ledger=self.ledger,
            out=self.out,
            share=share,
            connected=lambda: self.linked,
            in_step=lambda name: name not in self.away,
        )

    def take(self, kind: type) -> list[Any]:
        found = [effect for effect in self.out if isinstance(effect, kind)]
        self.out[:] = [effect for effect in self.out if not isinstance(effect, kind)]
        return found

    def said(self) -> list[Any]:
        return [effect.message for effect in self.take(Send)]

    def start(self, now: float = 0.0) -> int:
        return self.core.errands.start(now, "generate", b"text", PATH, timeout_s=30.0)


def request(site: Site, number: int = 1, **changes: Any) -> m.HopRequest:
    identity = m.HopId(0, 3, (1 << 32) + number, 0, False, 1)
    plain = m.HopRequest(identity, "generate", 3, 0, PATH, m.EMPTY, m.EMPTY, b"text")
    return msgspec.structs.replace(plain, **changes)


def test_the_own_trainer_is_asked_first_and_then_any_other() -> None:
    site = Site(B, (D, C, A))
    assert site.core.workers(0) == [PeerId(A), PeerId(C)]
    site.core.set_answers(-5.0, True)
    assert site.core.workers(0) == [PeerId(B), PeerId(A), PeerId(C)]
    handle = site.start()
    (asked,) = site.take(Send)
    assert asked.peer == B and (asked.message.version, asked.message.path) == (3, PATH)
    site.core.receive(0.1, PeerId(B), m.HopRefused(asked.message.id, "share"))
    (asked,) = site.take(Send)
    assert asked.peer == A
    site.core.disconnected(0.2, PeerId(A))
    (asked,) = site.take(Send)
    assert asked.peer == C
    site.core.receive(0.3, PeerId(C), m.HopReply(asked.message.id, LOGITS, 0.0, 0, 0.1))
    (told,) = site.take(Emit)
    assert told.event == ErrandDone(handle, LOGITS, 0.0, 3)


def test_weights_that_move_on_begin_it_again() -> None:
    site = Site(B, (A,))
    site.start()
    (asked,) = site.take(Send)
    site.ledger.channels[CHANNEL].round = 4
    site.core.receive(0.1, PeerId(A), m.HopRefused(asked.message.id, "stale"))
    (asked,) = site.take(Send)
    assert asked.message.version == 4


def test_nobody_in_reach_is_said_in_the_end() -> None:
    site = Site(D, ())
    handle = site.start()
    site.core.connect(0.0)
    assert [one.peer for one in site.take(Connect)] == [A, B, C]
    site.core.tick(1.0)
    assert site.take(Connect) == [], "asked for already"
    site.core.tick(30.0)
    (told,) = site.take(Emit)
    assert isinstance(told.event, ErrandFailed) and told.event.handle == handle
    assert told.event.code == "no_worker"
    site.core.tick(31.0)
    assert site.core.deadline() == math.inf, "nothing is asked, nobody is needed"


def test_a_request_is_computed_and_answered() -> None:
    site = Site(B, (A,))
    site.core.set_answers(-5.0, True)
    asked = request(site)
    site.core.receive(0.0, PeerId(A), asked)
    site.core.receive(0.0, PeerId(A), asked)
    (job,) = site.take(px.Compute)
    assert (job.step, job.tokens, job.kind, job.accumulate) == (3, b"text", "generate", False)
    site.core.computed(0.1, job.job, LOGITS, 0.01)
    assert site.said() == [m.HopReply(asked.id, LOGITS, 0.0, 0, 0.01)]
    site.core.computed(0.2, job.job, LOGITS, 0.01)
    assert site.said() == []


def test_what_goes_wrong_is_said_with_its_code() -> None:
    site = Site(B, (A,))
    site.core.receive(-5.0, PeerId(A), request(site, 0))
    site.core.set_answers(-5.0, True)
    site.core.receive(0.0, PeerId(A), request(site, 1, version=2))
    site.core.receive(0.0, PeerId(A), request(site, 2, version=4))
    site.away.add(CHANNEL)
    site.core.receive(0.0, PeerId(A), request(site, 3))
    site.away.clear()
    site.core.receive(0.0, PeerId(A), request(site, 4))
    (job,) = site.take(px.Compute)
    site.core.compute_failed(0.0, job.job, "stale", "a round ahead")
    site.core.receive(0.0, PeerId(A), request(site, 5))
    site.core.receive(0.0, PeerId(A), request(site, 6))
    site.core.set_answers(0.0, False)
    codes = [one.code for one in site.said()]
    refusals = ["not_ready", "stale", "not_ready", "not_ready", "stale", "failed", "not_ready"]
    assert codes == refusals


@pytest.mark.parametrize(
    "changes",
    [
        {"path": (0, 1)},
        {"kind": "forward"},
        {"tokens": b""},
        {"inputs": LOGITS},
        {"gradient": LOGITS},
        {"id": m.HopId(0, 3, 1, 1, False, 1)},
        {"id": m.HopId(0, 3, 1, 0, True, 1)},
    ],
)
def test_a_request_of_another_form_is_its_senders_fault(changes: dict[str, Any]) -> None:
    site = Site(B, (A,))
    site.core.set_answers(-5.0, True)
    site.core.receive(0.0, PeerId(A), request(site, **changes))
    (told,) = site.take(Emit)
    assert told.event.name == "peer_fault" and told.event.fields["fault"] == "bad_hop"
    assert [one.code for one in site.said()] == ["malformed"]
    site.core.receive(0.0, PeerId(bytes(32)), request(site))
    (told,) = site.take(Emit)
    assert told.event.fields["fault"] == "not_a_member"


def test_the_trainer_gives_its_share_and_no_more() -> None:
    """Two askers that ask again as soon as they are answered or refused, for 200 seconds."""
    site = Site(B, (A, C), share=0.2)
    site.core.set_answers(-5.0, True)
    now, used, number, refused = 0.0, 0.0, 0, 0
    news: list[Any] = []
    while now < 200.0:
        for peer in (A, C):
            number += 1
            site.core.receive(now, PeerId(peer), request(site, number))
        now += 0.01
        for job in site.take(px.Compute):
            now += 0.05
            used += 0.05
            site.core.computed(now, job.job, LOGITS, 0.05)
        site.core.tick(now)
        refused += sum(isinstance(one, m.HopRefused) for one in site.said())
        news += site.take(Emit)
    assert used / now == pytest.approx(0.2, abs=0.01)
    assert refused > 0
    assert 2 <= len(news) <= 25 and news[0].event.name == "generate_deferred"
    assert news[0].event.fields["share"] == 0.2


def test_silence_of_a_trainer_leads_to_the_next() -> None:
    site = Site(B, (A, C))
    site.start()
    (first,) = site.take(Send)
    assert site.core.deadline() <= ANSWER_TIMEOUT_S
    site.core.tick(ANSWER_TIMEOUT_S)
    (second,) = site.take(Send)
    assert (first.peer, second.peer) == (A, C)


def test_an_asker_that_is_gone_is_forgotten() -> None:
    site = Site(B, (A, C))
    site.core.set_answers(-5.0, True)
    site.core.receive(0.0, PeerId(C), request(site, 1))
    (job,) = site.take(px.Compute)
    site.core.receive(0.0, PeerId(A), request(site, 2))
    site.core.disconnected(0.0, PeerId(A))
    site.core.computed(1.0, job.job, LOGITS, 0.01)
    site.core.tick(100.0)
    assert site.take(px.Compute) == []


def test_a_trainer_that_forgets_a_job_does_not_stop_the_next() -> None:
    site = Site(B, (A, C))
    site.core.set_answers(-5.0, True)
    site.core.receive(0.0, PeerId(C), request(site, 1))
    assert len(site.take(px.Compute)) == 1 and site.core.deadline() == STUCK_S
    site.core.tick(STUCK_S)
    assert [one.code for one in site.said()] == ["failed"]
    site.core.receive(STUCK_S, PeerId(C), request(site, 2))
    assert len(site.take(px.Compute)) == 1


def test_another_ledger_takes_the_place_of_the_first() -> None:
    site = Site(B, (A,))
    site.core.ledger = ledger_of(9)
    site.core.reconcile(0.0)
    assert site.core.version() == 9 and site.core.errands.ledger is site.core.ledger
