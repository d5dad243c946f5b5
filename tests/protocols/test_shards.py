"""Shards by themselves: what is dealt, what counts, what is refused, and every order of events."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.ledger import Ledger, load_snapshot
from swarmtrain_protocols.messages.rounds import Ready, Withdraw
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.offer import Offer
from swarmtrain_protocols.shards import DataState, LeaseBook, Span, data_state, joined, without
from tests.protocols.rounds_kit import TRAIN, VALUES, Log, events, hash_of, opening, sent
from tests.protocols.shards_kit import NAMES, Broken, play, positions
from tests.protocols.test_rounds_member import Seat

A, B, C = NAMES[:3]


def state(samples: int = 100, shards: int = 10, phase: int = 5) -> DataState:
    found = data_state(shards, phase)
    assert found.define(samples, b"", 0)
    return found


def commit(data: DataState, number: int, *claims: tuple[bytes, tuple[Span, ...]]) -> None:
    for member, spans in claims:
        assert data.refusal(member, spans, 1.0) == ""
    data.opened(claims)
    data.decided([member for member, _ in claims], number)


@given(st.integers(1, 5000), st.integers(1, 300), st.integers(0, 3))
def test_shards_cut_an_epoch_without_gaps(samples: int, shards: int, epoch: int) -> None:
    data = state(samples, shards)
    cut = [data.first(epoch * data.shards + k) for k in range(data.shards + 1)]
    assert (cut[0], cut[-1]) == (epoch * samples, (epoch + 1) * samples)
    sizes = [b - a for a, b in itertools.pairwise(cut)]
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    for position in {cut[0], cut[-1] - 1, cut[len(cut) // 2] - 1, cut[len(cut) // 2]}:
        shard = data.shard_of(position)
        assert data.first(shard) <= position < data.first(shard + 1)


def test_nothing_is_dealt_before_the_data_are_known_or_without_shards() -> None:
    for data in (data_state(0, 5), data_state(10, 5)):
        data.deal([A])
        assert not data.dealt and data.held(A) == ()
        assert data.refusal(A, (), 9.0) == "" and data.refusal(A, (Span(0, 1),), 1.0) == "bad_claim"
    assert not data_state(0, 5).define(10, b"", 0)
    assert not state().define(10, b"", 0), "once"
    assert not data_state(4, 5).define(0, b"", 0)
    assert not data_state(4, 5).define(limits.SAMPLES_PER_EPOCH_MAX + 1, b"", 0)


def test_members_hold_what_keeps_them_busy_and_what_they_leave_goes_to_others() -> None:
    data = state()
    data.deal([A, B])
    assert data.held(A) == (Span(0, 20),) and data.held(B) == (Span(20, 20),)
    commit(data, 1, (A, (Span(0, 13),)))
    data.deal([A, B])
    # Thirteen in a round: four times as much is wanted, what is begun stays.
    assert data.held(A) == (Span(13, 7), Span(40, 50)) and data.counted == 13
    data.deal([B, C])
    assert data.held(A) == () and data.held(C) == (Span(13, 7), Span(40, 20))
    assert sorted(data.free) == [6, 7, 8], "the rest waits, and goes before anything new"
    assert data.epoch() == (0, 1)


def test_an_epoch_ends_when_its_last_shard_does_and_the_next_has_begun_by_then() -> None:
    data = state(samples=20, shards=2, phase=3)
    data.deal([A, B])
    assert data.held(A) == (Span(0, 20),) and data.held(B) == (Span(20, 20),)
    commit(data, 1, (B, (Span(20, 20),)))
    data.deal([A, B])
    assert data.epoch() == (0, 0)
    commit(data, 2, (A, (Span(0, 20),)))
    data.deal([A, B])
    assert data.epoch() == (2, 0) and data.counted == 40


@pytest.mark.parametrize(
    ("spans", "samples", "why"),
    [
        ((Span(0, 5),), 5.0, ""),
        ((), 0.0, ""),
        ((), 1.0, "bad_claim"),
        ((Span(0, 5),), 5.5, "bad_claim"),
        ((Span(0, 0),), 0.0, "bad_claim"),
        ((Span(5, 2), Span(0, 5)), 1.0, "bad_claim"),
        ((Span(0, 5), Span(4, 2)), 1.0, "bad_claim"),
        ((Span(1, 5),), 1.0, "stale_claim"),
        ((Span(0, 21),), 1.0, "stale_claim"),
        ((Span(20, 1),), 1.0, "stale_claim"),
        ((Span(1 << 52, 1 << 52),), 1.0, "stale_claim"),
        (tuple(Span(2 * i, 1) for i in range(40)), 1.0, "bad_claim"),
    ],
)
def test_a_claim_is_of_the_next_positions_of_own_shards(
    spans: tuple[Span, ...], samples: float, why: str
) -> None:
    data = state()
    data.deal([A, B])
    before = msgspec.msgpack.encode(data)
    assert data.refusal(A, spans, samples) == why
    assert msgspec.msgpack.encode(data) == before


def test_what_an_open_attempt_lists_waits_for_its_outcome_whoever_leaves() -> None:
    data = state()
    data.deal([A, B])
    data.opened([(A, (Span(0, 7),))])
    data.deal([B])
    assert data.held(A) == (Span(0, 20),) and not data.free
    data.decided([A], 1)
    data.deal([B])
    assert data.held(A) == () and data.free == {0: 7, 1: 10} and data.counted == 7
    data.deal([B, C])
    data.opened([(C, (Span(7, 3),))])
    data.decided([], 1)
    data.deal([B])
    assert data.free == {0: 7, 1: 10, 4: 40}, "aborted: nothing counts"


def test_who_gets_nothing_done_holds_one_shard_at_a_time() -> None:
    data = state(samples=100_000, shards=1000, phase=100)
    data.deal([A, B])
    held = data.held(A)
    for number in range(1, limits.SHARD_IDLE_ROUNDS + 3):
        commit(data, number, (B, (Span(data.held(B)[0].first, 100),)))
        data.deal([A, B])
    assert data.held(A) != held and sum(span.count for span in data.held(A)) == 100
    begun = {p for span in held for p in positions((span,))}
    assert not begun & set(positions(data.held(A))), "others get a chance with what it had"
    commit(data, 90, (A, (Span(data.held(A)[0].first, 50),)))
    data.deal([A, B])
    assert sum(span.count for span in data.held(A)) >= 4 * 100


def test_a_rewind_goes_back_to_what_counted_then() -> None:
    data = state()
    data.deal([A, B])
    commit(data, 1, (A, (Span(0, 10),)))
    data.deal([A, B])
    saved = data.held(A), data.held(B), data.counted
    commit(data, 2, (A, (Span(10, 10),)), (B, (Span(20, 5),)))
    data.deal([A, B])
    data.rewound(1)
    data.deal([A, B])
    assert (data.counted, data.round) == (saved[2], 1)
    left = sorted(positions(data.held(A)) + positions(data.held(B)))
    assert left[:30] == list(range(10, 40))
    data.rewound(0)
    assert data.counted == 0 and not data.marks[0].open


def test_marks_are_few_and_a_rewind_between_them_repeats_rather_than_skips(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "SHARD_MARK_RECORDS_MAX", 40)
    data = state(samples=1000, shards=10)
    for number in range(1, 200):
        data.deal([A])
        commit(data, number, (A, (Span(data.held(A)[0].first, 3),)))
    assert sum(1 + len(mark.open) for mark in data.marks) <= 40
    rounds = [mark.round for mark in data.marks]
    assert rounds[0] == 0 and rounds[-3:] == [197, 198, 199] and rounds == sorted(rounds)
    counted = max(mark.counted for mark in data.marks if mark.round <= 150)
    data.rewound(150)
    assert data.counted == counted <= 3 * 150


def test_the_ledger_carries_it_through_a_snapshot() -> None:
    ledger = Ledger(data=state())
    ledger.data.deal([A, B])
    ledger.data.opened([(A, (Span(0, 7),))])
    again = load_snapshot(ledger.snapshot())
    assert again.data == ledger.data and again.snapshot() == ledger.snapshot()


# --- the trainer's book ---


def test_a_book_hands_out_each_position_once_until_it_is_dropped() -> None:
    book = LeaseBook()
    book.update(0, 0, (Span(0, 6), Span(20, 6)))
    assert book.take(4) == [0, 1, 2, 3] and book.take(4) == [4, 5, 20, 21]
    assert book.boundary() == (Span(0, 6), Span(20, 2))
    assert book.take(2) == [22, 23]
    book.decided(False, 0)
    assert book.take(9) == [24, 25], "what was aborted goes along, and is not trained again"
    assert book.boundary() == (Span(0, 6), Span(20, 6))
    book.decided(True, 1)
    assert book.take(1) == [], "counted, though the news of it is not here yet"
    book.update(0, 1, (Span(40, 5),))
    assert book.take(2) == [40, 41]
    book.dropped()
    assert book.take(3) == [40, 41, 42]


def test_a_book_gives_up_what_is_somebody_elses_by_now() -> None:
    book = LeaseBook()
    book.update(0, 0, (Span(0, 6),))
    book.take(4)
    book.update(0, 3, (Span(2, 4),))
    assert book.boundary() is None
    book.dropped()
    assert book.take(9) == [2, 3, 4, 5]


def test_a_new_generation_voids_everything() -> None:
    book = LeaseBook()
    book.update(0, 5, (Span(10, 6),))
    book.take(2)
    book.boundary()
    book.decided(True, 6)
    book.take(2)
    book.update(1, 3, (Span(0, 20),))
    assert book.boundary() is None
    book.dropped()
    assert book.take(3) == [0, 1, 2]
    assert book.boundary() == (Span(0, 3),)


def test_an_earlier_life_may_have_a_contribution_in_an_open_attempt() -> None:
    book = LeaseBook()
    book.update(0, 0, (Span(0, 6),), (Span(0, 4),))
    assert book.take(9) == [4, 5]


def test_a_book_is_full_before_a_claim_has_too_many_pieces() -> None:
    book = LeaseBook()
    book.update(0, 0, tuple(Span(10 * i, 3) for i in range(80)))
    taken = book.take(1000)
    assert book.full and book.take(1) == []
    claims = book.boundary()
    assert claims is not None and positions(claims) == taken
    assert len(claims) <= limits.CLAIM_SPANS_MAX


SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6)), max_size=6)


@given(SPANS, SPANS)
def test_spans_are_sets_of_positions(
    some: list[tuple[int, int]], gone: list[tuple[int, int]]
) -> None:
    def disjoint(pairs: list[tuple[int, int]]) -> tuple[Span, ...]:
        out: tuple[Span, ...] = ()
        for first, count in pairs:
            out = joined([*out, *without([Span(first, count)], out)])
        return out

    left, right = disjoint(some), disjoint(gone)
    assert set(positions(left)) == {p for a, n in some for p in range(a, a + n)}
    found = without(left, right)
    assert positions(found) == sorted(set(positions(left)) - set(positions(right)))
    assert list(found) == sorted(found, key=lambda span: span.first)


# --- any order of events ---


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32))
def test_whatever_happens_each_sample_counts_once(seed: int) -> None:
    assert play(seed).trained.total() >= 2 * 60


@pytest.mark.parametrize("seed", range(20))
def test_in_calm_weather_no_progress_is_thrown_away(seed: int) -> None:
    assert play(seed, calm=True).seen["void"] == 0


def test_the_schedules_contain_what_they_should() -> None:
    seen = play(0, 10).seen
    for seed in range(1, 80):
        seen += play(seed).seen
    for what in ("void", "rewound", "stale_claim", "left while listed", "restarted while listed"):
        assert seen[what] >= 2, what


def test_a_lost_position_is_noticed() -> None:
    world = play(1, 50)
    held = next(iter(world.state.leases.values()))
    held.pop(next(iter(held)))
    with pytest.raises(Broken, match="lost"):
        world.check()


# --- in the ledger ---


def dealt() -> Log:
    log = Log(A, B, C)
    log.ledger.data = data_state(10, 5)
    assert not log.add(e.DataDefined(0, bytes(32), A))
    assert log.add(e.DataDefined(100, b"d" * 32, A)) and not log.add(e.DataDefined(9, bytes(32), B))
    return log


def claiming(log: Log, *claims: tuple[bytes, tuple[Span, ...]]) -> e.RoundOpened:
    body = opening(log.ledger, [member for member, _ in claims])
    said = dict(claims)
    people = tuple(
        msgspec.structs.replace(one, claims=said[one.member], samples=1.0)
        for one in body.contributors
    )
    return msgspec.structs.replace(body, contributors=people)


def test_an_attempt_with_a_claim_that_does_not_fit_is_ignored_by_everybody() -> None:
    log = dealt()
    members = sorted((A, B, C))
    first, second = log.ledger.data.held(members[0])[0], log.ledger.data.held(members[1])[0]
    assert not log.add(claiming(log, (members[0], (second,))))
    assert not log.add(claiming(log, (members[0], (first,)), (members[1], ())))
    assert not log.add(claiming(log, (members[0], (Span(first.first + 1, 1),))))
    opened = claiming(log, (members[0], (Span(first.first, 3),)), (members[1], (second,)))
    assert log.add(opened)
    log.choose(opened, 0)
    log.commit(opened, bytes(32))
    assert log.ledger.data.counted == 3
    assert log.ledger.data.held(members[0])[0] == Span(first.first + 3, first.count - 3)
    assert log.ledger.data.held(members[1])[0] == second, "it was not in the set"
    again = claiming(log, (members[1], (second,)))
    assert log.add(again) and log.add(e.RoundAborted(again.key, "test"))
    assert log.ledger.data.counted == 3 and not log.ledger.data.claimed
    assert log.add(e.MemberLeft(members[1], "lost"))
    assert log.ledger.data.held(members[1]) == () and second.first in log.ledger.data.free.values()


def test_other_channels_claim_nothing() -> None:
    ledger = dealt().ledger
    assert ledger.refusal(A, "group/g", (), 5.0) == ""
    assert ledger.refusal(A, "group/g", (Span(0, 1),), 1.0) == "bad_claim"


def test_a_member_takes_back_what_it_may_not_claim_any_more_and_says_so() -> None:
    seat = Seat()
    seat.log.ledger.data = data_state(10, 5)
    assert seat.log.add(e.DataDefined(100, bytes(32), A))
    held = seat.log.ledger.data.held(seat.me)
    good = Offer(TRAIN, hash_of("good"), VALUES, "fp32", 4.0, 0, 0, claims=held)
    seat.member.offer(0.0, good)
    assert [m.claims for _, m in sent(seat.take(), Ready)] == [held]
    assert seat.member.undecided(TRAIN) is not None
    seat.log.ledger.data.deal([A, B, bytes(32)])  # as after its death was logged
    seat.log.ledger.data.deal([A, B, bytes(32), seat.me])
    seat.member.reconcile(1.0)
    effects = seat.take()
    (notice,) = events(effects, fx.Notice)
    assert (notice.name, notice.fields) == ("contribution_rejected", {"reason": "stale_claim"})
    (decision,) = events(effects, fx.ContributionDecided)
    assert decision.outcome == "excluded" and len(sent(effects, Withdraw)) == 1
