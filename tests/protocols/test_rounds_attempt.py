"""One member in one attempt, driven by hand: parts, deputies, results, lies."""

from __future__ import annotations

import math
import random

import pytest

from swarmtrain_protocols.core import CancelFetch, Connect, Effect, Fetch, PeerId
from swarmtrain_protocols.messages import rounds as m
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.attempt import PART_DOMAIN, Attempt, part_statement
from swarmtrain_protocols.rounds.fetches import Fetches
from tests.protocols.rounds_kit import (
    IDS,
    RINGS,
    RUN,
    A,
    B,
    C,
    D,
    Log,
    faults,
    hash_of,
    of_kind,
    sent,
    take,
)

LEADER = IDS[7]


class Seat:
    """``me`` in an attempt of contributors A, B, C whose parts 0 and 1 belong to A and B."""

    def __init__(self, me: bytes, **changes: bool) -> None:
        self.log = Log(A, B, C, D)
        self.opened = self.log.open([A, B, C], holders=[A, B, C, D])
        self.key = self.opened.key
        self.out: list[Effect] = []
        self.fetches = Fetches(self.out)
        ring = RINGS[IDS.index(PeerId(me))]
        self.attempt = Attempt(
            self.key,
            self.opened,
            ring.peer_id,
            RUN,
            ring,
            random.Random(1),
            self.fetches,
            self.out,
            **changes,
        )
        self.attempt.begin(0.0)

    def take(self) -> list[Effect]:
        return take(self.out)

    def choose(self, *indices: int) -> None:
        self.attempt.choose(1.0, self.log.choose(self.opened, *indices))

    def result(self, signer: bytes, part: int, root: bytes) -> m.PartResult:
        ring = RINGS[IDS.index(PeerId(signer))]
        signature = ring.sign(PART_DOMAIN, part_statement(RUN, self.key, part, root))
        return m.PartResult(self.key, part, root, signer, signature)

    def held(self, effects: list[Effect] | None = None) -> list[tuple[int, tuple[int, ...]]]:
        self.attempt.reports(LEADER, everything=False)
        found = sent(self.take(), m.PartsHeld)
        return [(x.part, x.contributors) for to, x in found if to == LEADER]


def fetched(fetches: list[Fetch]) -> list[tuple[bytes, bytes, int, int]]:
    return [(x.peer, x.root, x.first, x.count) for x in fetches]


def test_an_owner_fetches_its_part_of_every_contribution_but_its_own() -> None:
    seat = Seat(A)
    effects = seat.take()
    assert of_kind(effects, fx.BeginAttempt) == [fx.BeginAttempt(seat.opened)]
    assert [x.peer for x in of_kind(effects, Connect)] == [B]
    part, roots = seat.opened.parts[0], [c.root for c in seat.opened.contributors]
    asked = of_kind(effects, Fetch)
    assert fetched(asked) == [
        (B, roots[1], part.first, part.count),
        (C, roots[2], part.first, part.count),
    ]
    assert seat.held() == [(0, (0,))]
    seat.fetches.finished(0.1, asked[1].ticket, None)
    assert seat.held() == [(0, (0, 2))]
    assert seat.held() == []  # nothing new


def test_a_contribution_of_an_earlier_life_is_not_claimed() -> None:
    """The bytes died with the process: the set must not count on them."""
    seat = Seat(A, own_lost=True)
    seat.take()
    assert seat.held() == [(0, ())]
    seat.attempt.reports(LEADER, everything=True)
    own = seat.opened.contributors[0].root
    assert [x.root for _, x in sent(seat.take(), m.Withdraw)] == [own]


def test_the_set_is_summed_when_all_of_it_is_here_and_signed_for_everybody() -> None:
    seat = Seat(A)
    asked = of_kind(seat.take(), Fetch)
    seat.choose(0, 2)
    assert of_kind(seat.take(), fx.ReducePart) == []
    seat.fetches.finished(1.5, asked[1].ticket, None)
    (work,) = of_kind(seat.take(), fx.ReducePart)
    assert (work.part, [c.index for c in work.chosen.coefficients]) == (0, [0, 2])
    seat.attempt.reduced(2.0, 0, hash_of("sum"))
    told = sent(seat.take(), m.PartResult)
    assert [to for to, _ in told] == [B, C, D]
    assert {x for _, x in told} == {seat.result(A, 0, hash_of("sum"))}


def test_when_all_parts_are_in_place_the_result_is_stored_once() -> None:
    seat = Seat(D)  # holds state, contributes nothing
    assert of_kind(seat.take(), Fetch) == []
    seat.attempt.part_result(1.0, A, seat.result(A, 0, hash_of("one")))
    seat.attempt.part_result(1.0, B, seat.result(B, 1, hash_of("two")))
    asked = of_kind(seat.take(), Fetch)
    assert [(x.peer, x.root, x.first) for x in asked] == [
        (A, hash_of("one"), 0),
        (B, hash_of("two"), 0),
    ]
    for fetch in asked:
        seat.fetches.finished(1.1, fetch.ticket, None)
    assert of_kind(seat.take(), fx.StoreResult) == [fx.StoreResult(seat.key)]
    seat.attempt.part_result(1.2, A, seat.result(A, 0, hash_of("one")))
    seat.attempt.step(1.3)
    assert of_kind(seat.take(), fx.StoreResult) == []


def test_a_deputy_computes_the_same_part_and_says_again_what_it_holds() -> None:
    seat = Seat(C)
    seat.take()
    seat.attempt.take_over(1.0, 0, C)
    asked = of_kind(seat.take(), Fetch)
    assert [x.peer for x in asked] == [A, B]
    assert seat.held() == [(0, (2,))]
    seat.attempt.take_over(2.0, 0, C)  # a new leader says so, too
    assert of_kind(seat.take(), Fetch) == []
    assert seat.held() == [(0, (2,))]
    seat.attempt.take_over(2.0, 99, C)  # no such part


def test_a_result_that_overtakes_the_word_of_its_deputy_is_asked_for_again() -> None:
    """The leader's TakeOver and the deputy's result travel on different links."""
    seat = Seat(D)
    seat.take()
    early = seat.result(C, 0, hash_of("sum"))
    seat.attempt.part_result(1.0, C, early)
    effects = seat.take()
    assert faults(effects) == [] and of_kind(effects, Fetch) == []
    seat.attempt.take_over(1.1, 0, C)
    assert [to for to, _ in sent(seat.take(), m.RoundQuery)] == [C]
    seat.attempt.part_result(1.2, C, early)
    assert [x.peer for x in of_kind(seat.take(), Fetch)] == [C]


def test_a_fetch_that_fails_is_tried_again_later_and_elsewhere() -> None:
    seat = Seat(D)
    seat.attempt.part_result(1.0, B, seat.result(A, 0, hash_of("sum")))  # relayed by B
    (first,) = of_kind(seat.take(), Fetch)
    assert first.peer == B
    seat.fetches.finished(1.0, first.ticket, "unknown")
    effects = seat.take()
    assert [to for to, _ in sent(effects, m.RoundQuery)] == [A, C]
    assert of_kind(effects, Fetch) == []
    wait = seat.attempt.deadline()
    assert 1.0 < wait <= 1.2
    seat.attempt.part_result(1.0, B, seat.result(A, 0, hash_of("sum")))
    assert of_kind(seat.take(), Fetch) == [], "an echo does not cut the pause short"
    seat.attempt.step(wait)
    (second,) = of_kind(seat.take(), Fetch)
    assert second.peer == A
    seat.fetches.finished(wait, second.ticket, "unknown")
    seat.take()
    seat.attempt.part_result(wait, C, seat.result(A, 0, hash_of("sum")))
    assert len(of_kind(seat.take(), Fetch)) == 1, "a new source is tried at once"


def test_retries_slow_down_but_never_stop() -> None:
    seat = Seat(A)
    now, gaps = 0.0, []
    (ticket, *_) = [x.ticket for x in of_kind(seat.take(), Fetch) if x.peer == B]
    for _ in range(12):
        seat.fetches.finished(now, ticket, "disconnected")
        seat.take()
        due = seat.attempt.deadline()
        gaps.append(due - now)
        now = due
        seat.attempt.step(now)
        (ticket,) = [x.ticket for x in of_kind(seat.take(), Fetch)]
    assert gaps[0] < 0.2 and all(0.0 < gap <= 2.0 for gap in gaps)
    assert gaps[-1] >= 1.0


def test_somebody_who_is_back_is_asked_for_what_it_computed() -> None:
    seat = Seat(D)
    seat.take()
    seat.attempt.ask_again(A)
    assert sent(seat.take(), m.RoundQuery) == []  # nothing can be computed before the set
    seat.choose()
    seat.attempt.ask_again(C)
    assert sent(seat.take(), m.RoundQuery) == []  # C computes nothing
    seat.attempt.ask_again(A)
    assert sent(seat.take(), m.RoundQuery) == [(A, m.RoundQuery(seat.key))]


def test_results_that_nobody_has_announced_are_asked_for_less_and_less_often() -> None:
    """This node may have been away when they were: its owners, and somebody else, are asked."""
    seat = Seat(D)
    seat.choose(0, 1)
    seat.take()
    times: list[float] = []
    now = 1.0
    for _ in range(6):
        now = seat.attempt.deadline()
        seat.attempt.step(now)
        asked = [peer for peer, _ in sent(seat.take(), m.RoundQuery)]
        assert asked[:2] == [A, B] and 2 <= len(asked) <= 4 and D not in asked
        times.append(now)
    assert times == [2.0, 4.0, 8.0, 16.0, 24.0, 32.0]


def test_what_is_announced_or_computed_here_is_not_asked_for() -> None:
    seat = Seat(A)
    seat.choose(0)
    seat.take()
    seat.attempt.reducing.append(0)
    seat.attempt.part_result(1.5, PeerId(B), seat.result(B, 1, hash_of("b")))
    seat.take()
    seat.attempt.step(2.0)
    assert sent(seat.take(), m.RoundQuery) == []


def test_what_is_in_place_is_relayed_to_whoever_asks() -> None:
    seat = Seat(A)
    (asked, *_) = of_kind(seat.take(), Fetch)
    seat.attempt.answer_query(IDS[6])
    assert seat.take() == []
    seat.attempt.reduced(1.0, 0, hash_of("sum"))
    seat.take()
    seat.attempt.answer_query(IDS[6])
    assert sent(seat.take(), m.PartResult) == [(IDS[6], seat.result(A, 0, hash_of("sum")))]
    assert asked.peer == B


def test_the_end_cancels_every_fetch() -> None:
    seat = Seat(A)
    asked = of_kind(seat.take(), Fetch)
    seat.attempt.cancel()
    assert of_kind(seat.take(), CancelFetch) == [CancelFetch(x.ticket) for x in asked]
    assert seat.attempt.deadline() == float("inf")


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["signature", "root", "owner", "part", "key"])
def test_a_result_with_a_wrong_signature_is_the_senders_fault(change: str) -> None:
    seat = Seat(D)
    seat.take()
    good = seat.result(A, 0, hash_of("sum"))
    fields = {name: getattr(good, name) for name in good.__struct_fields__}
    fields |= {
        "signature": {"signature": bytes(64)},
        "root": {"root": hash_of("other")},
        "owner": {"owner": B},
        "part": {"part": 1, "owner": A},
        "key": {"signature": seat.result(A, 1, hash_of("sum")).signature},
    }[change]
    seat.attempt.part_result(1.0, C, m.PartResult(**fields))
    effects = seat.take()
    assert faults(effects) == [("bad_signature", C)]
    assert seat.attempt.results == {} and of_kind(effects, Fetch) == []


def test_a_part_that_does_not_exist_is_the_senders_fault() -> None:
    seat = Seat(D)
    seat.take()
    seat.attempt.part_result(1.0, C, seat.result(A, 7, hash_of("sum")))
    assert faults(seat.take()) == [("bad_part", C)]


def test_a_member_that_owns_nothing_cannot_announce_results() -> None:
    seat = Seat(D)
    seat.take()
    seat.attempt.part_result(1.0, C, seat.result(C, 0, hash_of("lie")))
    assert seat.attempt.results == {}
    assert of_kind(seat.take(), Fetch) == []


def test_an_owner_that_signs_two_results_is_named_and_the_first_one_stays() -> None:
    """AR1, G8: equivocation is seen by whoever gets both."""
    seat = Seat(D)
    seat.attempt.part_result(1.0, A, seat.result(A, 0, hash_of("one")))
    seat.take()
    seat.attempt.part_result(1.1, C, seat.result(A, 0, hash_of("two")))
    assert faults(seat.take()) == [("conflicting_results", A)]
    assert seat.attempt.results[0].root == hash_of("one")


def test_a_deputy_whose_own_sum_differs_from_what_it_was_sent_stands_by_its_own() -> None:
    """A lying owner must not be able to crash whoever takes over from it."""
    seat = Seat(C)
    seat.attempt.part_result(1.0, A, seat.result(A, 0, hash_of("lie")))
    (fetch,) = of_kind(seat.take(), Fetch)
    seat.fetches.finished(1.1, fetch.ticket, None)
    seat.attempt.take_over(1.2, 0, C)
    seat.take()
    seat.attempt.reduced(2.0, 0, hash_of("right"))
    effects = seat.take()
    assert faults(effects) == [("conflicting_results", A)]
    assert {x.root for _, x in sent(effects, m.PartResult)} == {hash_of("right")}
    assert seat.attempt.in_place[0] == hash_of("right")


def test_bytes_that_match_their_root_and_are_no_contribution_are_refused_for_good() -> None:
    seat = Seat(A)
    (asked, *_) = of_kind(seat.take(), Fetch)
    seat.fetches.finished(1.0, asked.ticket, "invalid")
    assert faults(seat.take()) == [("invalid_contribution", B)]
    seat.attempt.reports(LEADER, everything=False)
    ((_, report),) = sent(seat.take(), m.PartsHeld)
    assert (report.contributors, report.refused) == ((0,), (1,))
    seat.attempt.step(100.0)
    assert of_kind(seat.take(), Fetch) == []


def test_bytes_that_match_their_root_and_are_no_result_are_the_owners_fault() -> None:
    seat = Seat(D)
    seat.attempt.part_result(1.0, C, seat.result(A, 0, hash_of("nan")))
    (asked,) = of_kind(seat.take(), Fetch)
    assert asked.peer == C
    seat.fetches.finished(1.0, asked.ticket, "invalid")
    assert faults(seat.take()) == [("invalid_result", A)]
    seat.attempt.step(100.0)
    assert of_kind(seat.take(), Fetch) == []
    assert 0 not in seat.attempt.in_place


def test_bytes_that_do_not_match_their_root_are_the_providers_fault() -> None:
    seat = Seat(A)
    (asked, *_) = of_kind(seat.take(), Fetch)
    seat.fetches.finished(1.0, asked.ticket, "corrupt")
    assert faults(seat.take()) == [("corrupt_chunk", B)]
    assert seat.held() == [(0, (0,))]


def test_a_contribution_that_there_is_no_room_for_is_refused_and_nobody_is_blamed() -> None:
    seat = Seat(A)
    asked = of_kind(seat.take(), Fetch)
    seat.fetches.finished(0.1, asked[0].ticket, "no_room")
    effects = seat.take()
    assert faults(effects) == []
    seat.attempt.reports(LEADER, everything=False)
    ((_, report),) = sent(seat.take(), m.PartsHeld)
    assert (report.contributors, report.refused) == ((0,), (1,))
    assert seat.attempt.deadline() == math.inf  # it is not asked for again
