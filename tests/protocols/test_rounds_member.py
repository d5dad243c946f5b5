"""A member through its rounds, driven by hand: offers, decisions, closings, queries."""

from __future__ import annotations

import random

import msgspec
import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.core import CancelFetch, Effect, Fetch, PeerId
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.ledger import load_snapshot
from swarmtrain_protocols.messages import rounds as m
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.attempt import PART_DOMAIN, part_statement
from swarmtrain_protocols.rounds.fetches import Fetches
from swarmtrain_protocols.rounds.member import (
    CLOSING_TIMEOUT_S,
    RECENT_ATTEMPTS_MAX,
    Offer,
    RoundMember,
)
from tests.protocols.rounds_kit import (
    GROUP,
    IDS,
    RINGS,
    RUN,
    TRAIN,
    VALUES,
    A,
    B,
    C,
    D,
    Log,
    events,
    faults,
    hash_of,
    key,
    of_kind,
    opening,
    sent,
    take,
)

LEADER = IDS[7]
MINE = hash_of("mine")


class Seat:
    """Peer C as a member of A, B, C, with a leader that only listens."""

    def __init__(self, me: bytes = C, *, model: bool = True) -> None:
        self.me = PeerId(me)
        self.log = Log(A, B, C, model=model)
        self.out: list[Effect] = []
        self.fetches = Fetches(self.out)
        self.member = RoundMember(
            keyring=RINGS[IDS.index(self.me)],
            rng=random.Random(1),
            ledger=self.log.ledger,
            fetches=self.fetches,
            out=self.out,
            max_base_age_rounds=2,
        )
        self.member.leader = LEADER

    def take(self) -> list[Effect]:
        return take(self.out)

    def offer(self, channel: str = TRAIN, base_round: int = 0, root: bytes = MINE) -> None:
        offer = Offer(channel, root, VALUES, "fp32", 4.0, base_round, 0)
        self.member.offer(0.0, offer)

    def logged(self, now: float, *bodies: e.EntryBody) -> list[Effect]:
        """Entries that come in one batch, as the node applies them."""
        for body in bodies:
            accepted = self.log.ledger.apply(self.log.ledger.index + 1, body)
            assert accepted, body
            self.member.logged(body)
        self.member.reconcile(now)
        return self.take()

    def opening(self, *people: bytes, root: bytes = MINE, channel: str = TRAIN) -> e.RoundOpened:
        return opening(self.log.ledger, people or (A, B, C), roots={self.me: root}, channel=channel)

    def result(self, signer: bytes, k: object, part: int, root: bytes) -> m.PartResult:
        ring = RINGS[IDS.index(PeerId(signer))]
        signature = ring.sign(PART_DOMAIN, part_statement(RUN, k, part, root))  # type: ignore[arg-type]
        return m.PartResult(k, part, root, signer, signature)  # type: ignore[arg-type]

    def bring(self, opened: e.RoundOpened, now: float = 2.0) -> None:
        """Both parts are announced and fetched."""
        for part, owner in ((0, A), (1, B)):
            self.member.receive(
                now, PeerId(owner), self.result(owner, opened.key, part, hash_of("p"))
            )
            (fetch,) = of_kind(self.take(), Fetch)
            self.fetches.finished(now, fetch.ticket, None)


def whole(opened: e.RoundOpened, *indices: int) -> e.RoundSet:
    return e.RoundSet(opened.key, tuple(e.Coefficient(i, 0.5) for i in indices or (0, 1, 2)))


def brought(seat: Seat) -> e.RoundOpened:
    """An attempt of which all that is wanted has come."""
    opened = seat.opening()
    seat.logged(1.0, opened)
    seat.logged(1.5, whole(opened))
    seat.bring(opened)
    return opened


def decided(effects: list[Effect]) -> list[tuple[str, float]]:
    return [(x.outcome, x.coefficient) for x in events(effects, fx.ContributionDecided)]


# --- the own contribution ------------------------------------------------------------------------


def test_whoever_is_listed_with_something_else_announces_anew() -> None:
    """What it had announced before it saw that counts for nothing (08 §2.2)."""
    seat = Seat()
    seat.offer()
    ((_, first),) = sent(seat.take(), m.Ready)
    effects = seat.logged(1.0, seat.opening(A, B, C, root=hash_of("of an earlier life")))
    ((to, again),) = sent(effects, m.Ready)
    assert to == LEADER
    assert again == msgspec.structs.replace(first, seen=first.seen + 1)
    seat = Seat()
    seat.offer()
    seat.take()
    assert not sent(seat.logged(1.0, seat.opening(A, B, C)), m.Ready)


def test_an_offer_is_announced_and_again_to_every_new_leader() -> None:
    seat = Seat()
    seat.offer()
    ((to, ready),) = sent(seat.take(), m.Ready)
    assert to == LEADER
    seen = seat.log.ledger.index
    assert ready == m.Ready(0, TRAIN, MINE, VALUES, "fp32", 4.0, 0, 0, seen)
    offer = seat.member.undecided(TRAIN)
    assert offer is not None
    offer.age = 2
    seat.member.leader = PeerId(A)
    seat.member.announce(1.0)
    assert sent(seat.take(), m.Ready) == [(A, msgspec.structs.replace(ready, age=2))]
    seat.member.leader = None
    seat.member.announce(2.0)
    assert seat.take() == []


def test_one_contribution_at_a_time() -> None:
    seat = Seat()
    seat.offer()
    with pytest.raises(LocalProtocolError, match="one contribution"):
        seat.offer()
    seat.offer(GROUP)


def test_an_offer_can_be_taken_back_until_it_is_in_an_attempt() -> None:
    seat = Seat()
    assert not seat.member.withdraw(0.0, TRAIN)
    seat.offer()
    assert seat.member.withdraw(0.0, TRAIN)
    effects = seat.take()
    assert sent(effects, m.Withdraw) == [(LEADER, m.Withdraw(0, TRAIN, MINE))]
    assert of_kind(effects, fx.ReleaseContribution) == [fx.ReleaseContribution(TRAIN, MINE)]
    seat.offer()
    seat.logged(1.0, seat.opening())
    assert not seat.member.withdraw(1.0, TRAIN)


@pytest.mark.parametrize(
    ("indices", "verdict"), [((0, 1, 2), ("committed", 0.5)), ((0, 1), ("excluded", 0.0))]
)
@pytest.mark.parametrize("batch", [False, True])
def test_a_commit_decides_the_offer_however_the_entries_come(
    indices: tuple[int, ...], verdict: tuple[str, float], batch: bool
) -> None:
    """AR3: seen entry by entry, so a late member never re-queues what was counted."""
    seat = Seat()
    seat.offer()
    seat.take()
    opened = seat.opening()
    bodies = [opened, whole(opened, *indices), e.RoundCommitted(opened.key, hash_of("result"))]
    effects = []
    for part in [bodies] if batch else [[body] for body in bodies]:
        effects += seat.logged(1.0, *part)
    assert decided(effects) == [verdict]
    assert of_kind(effects, fx.ReleaseContribution) == [fx.ReleaseContribution(TRAIN, MINE)]
    assert seat.member.undecided(TRAIN) is None


@pytest.mark.parametrize("batch", [False, True])
def test_an_abort_returns_the_offer(batch: bool) -> None:
    seat = Seat()
    seat.offer()
    opened = seat.opening()
    bodies = [opened, e.RoundAborted(opened.key, "owner lost")]
    effects = []
    for part in [bodies] if batch else [[body] for body in bodies]:
        effects += seat.logged(1.0, *part)
    assert decided(effects) == [("aborted", 0.0)]


@pytest.mark.parametrize("batch", [False, True])
def test_an_aborted_group_call_is_announced_again(batch: bool) -> None:
    seat = Seat()
    seat.offer(GROUP)
    seat.take()
    opened = seat.opening(channel=GROUP)
    bodies = [opened, e.RoundAborted(opened.key, "owner lost")]
    effects = []
    for part in [bodies] if batch else [[body] for body in bodies]:
        effects += seat.logged(1.0, *part)
    assert decided(effects) == []
    assert [x.root for _, x in sent(effects, m.Ready)] == [MINE]
    second = seat.opening(channel=GROUP)
    seat.logged(2.0, second)
    offer = seat.member.undecided(GROUP)
    assert offer is not None and offer.bound == second.key


def test_an_offer_whose_base_is_too_old_is_returned() -> None:
    seat = Seat()
    seat.offer(base_round=0)
    seat.take()
    for number in range(3):
        opened = seat.opening(A, B)
        assert seat.member.undecided(TRAIN) is not None, number
        effects = seat.logged(
            1.0, opened, whole(opened, 0, 1), e.RoundCommitted(opened.key, hash_of("result"))
        )
    assert decided(effects) == [("excluded", 0.0)]
    assert sent(effects, m.Withdraw) == [(LEADER, m.Withdraw(0, TRAIN, MINE))]


def test_a_rewind_returns_what_was_offered_before_it() -> None:
    seat = Seat()
    seat.offer()
    seat.offer(GROUP)
    seat.member.in_place[TRAIN, 4] = hash_of("lost")
    seat.take()
    seat.log.add(e.Rewound(1, "test", (TRAIN,), (0,), (hash_of("state 0"),)))
    seat.member.rewound(1.0)
    assert decided(seat.take()) == [("aborted", 0.0)]
    assert seat.member.undecided(GROUP) is not None
    assert seat.member.in_place == {}


@pytest.mark.parametrize(
    ("ending", "verdict"),
    [
        ("counted", ("committed", 0.5)),
        ("left out", ("excluded", 0.0)),
        ("aborted", ("aborted", 0.0)),
    ],
)
def test_a_snapshot_of_the_ledger_decides_what_was_missed(
    ending: str, verdict: tuple[str, float]
) -> None:
    seat = Seat()
    seat.offer()
    opened = seat.opening()
    seat.logged(1.0, opened)
    ahead = load_snapshot(seat.log.ledger.snapshot())
    indices = (0, 1, 2) if ending == "counted" else (0, 1)
    ahead.apply(ahead.index + 1, whole(opened, *indices))
    over = e.RoundAborted(opened.key, "x")
    last = over if ending == "aborted" else e.RoundCommitted(opened.key, hash_of("result"))
    assert ahead.apply(ahead.index + 1, last)
    seat.member.ledger = ahead
    seat.member.jumped()
    seat.member.reconcile(2.0)
    assert decided(seat.take()) == [verdict]


def test_a_snapshot_in_which_an_unbound_offer_was_counted_says_so() -> None:
    seat = Seat()
    seat.offer()
    ahead = load_snapshot(seat.log.ledger.snapshot())
    opened = seat.opening()
    for body in (opened, whole(opened), e.RoundCommitted(opened.key, hash_of("result"))):
        assert ahead.apply(ahead.index + 1, body)
    seat.member.ledger = ahead
    seat.take()
    seat.member.jumped()
    assert decided(seat.take()) == [("committed", 0.5)]
    seat.offer(base_round=1, root=hash_of("next"))
    seat.member.jumped()
    assert decided(seat.take()) == [], "an older round is not this offer's"


# --- attempts ------------------------------------------------------------------------------------


def test_a_member_that_is_not_in_an_attempt_keeps_out_of_it() -> None:
    seat = Seat(D)
    effects = seat.logged(1.0, seat.opening(A, B))
    assert of_kind(effects, fx.BeginAttempt) == []


def test_a_contribution_of_an_earlier_life_is_withdrawn() -> None:
    seat = Seat()
    effects = seat.logged(1.0, seat.opening(root=hash_of("earlier life")))
    assert [x.root for _, x in sent(effects, m.Withdraw)] == [hash_of("earlier life")]


def test_a_stored_result_is_reported_and_settled_by_the_commit() -> None:
    seat = Seat()
    seat.offer()
    opened = brought(seat)
    assert of_kind(seat.take(), fx.StoreResult) == [fx.StoreResult(opened.key)]
    seat.member.stored(2.5, opened.key, hash_of("result"), True)
    held = m.Holding(opened.key, hash_of("result"), True)
    assert sent(seat.take(), m.Holding) == [(LEADER, held)]
    seat.member.announce(2.6)
    assert sent(seat.take(), m.Holding) == [(LEADER, held)]
    effects = seat.logged(3.0, e.RoundCommitted(opened.key, hash_of("result")))
    assert seat.member.in_place == {(TRAIN, 0): hash_of("result")}
    assert of_kind(effects, fx.ReleaseAttempt) == [fx.ReleaseAttempt(opened.key)]
    assert decided(effects) == [("committed", 0.5)]


def test_a_group_result_is_told_with_its_contributors() -> None:
    seat = Seat(model=False)
    seat.offer(GROUP)
    opened = seat.opening(channel=GROUP)
    seat.logged(1.0, opened)
    seat.logged(1.5, whole(opened))
    seat.bring(opened)
    seat.member.stored(2.5, opened.key, hash_of("result"), False)
    effects = seat.logged(3.0, e.RoundCommitted(opened.key, hash_of("result")))
    (done,) = events(effects, fx.GroupDone)
    assert (done.key, done.root) == (opened.key, hash_of("result"))
    assert done.contributors == ((A, 4.0, 0.5), (B, 4.0, 0.5), (C, 4.0, 0.5))
    assert seat.member.in_place == {}


def test_an_own_result_that_is_not_the_committed_one_is_thrown_away() -> None:
    """A lying owner told this node something else: no crash, the committed bytes are fetched."""
    seat = Seat()
    opened = brought(seat)
    seat.member.stored(2.5, opened.key, hash_of("other"), True)
    seat.take()
    effects = seat.logged(3.0, e.RoundCommitted(opened.key, hash_of("result")))
    assert seat.member.in_place == {} and seat.member.pending_rounds(TRAIN) == []
    (told,) = events(effects, fx.Notice)
    assert (told.name, told.fields["what"]) == ("fallback", "result by committed root")
    assert of_kind(effects, fx.ReleaseAttempt) == [fx.ReleaseAttempt(opened.key)]


def test_a_commit_that_comes_before_the_bytes_waits_for_them_and_asks_around() -> None:
    seat = Seat()
    opened = seat.opening()
    seat.logged(1.0, opened)
    seat.logged(1.5, whole(opened))
    seat.member.receive(1.6, PeerId(A), seat.result(A, opened.key, 0, hash_of("p")))
    seat.take()
    seat.logged(2.0, e.RoundCommitted(opened.key, hash_of("result")))
    assert seat.member.pending_rounds(TRAIN) == [0]
    due = seat.member.deadline()
    assert 2.0 < due <= 2.5
    seat.member.tick(due)
    assert [to for to, _ in sent(seat.take(), m.RoundQuery)] == [A, B]
    seat.member.receive(2.6, PeerId(A), seat.result(B, opened.key, 1, hash_of("p")))
    for ticket in list(seat.fetches._jobs):
        seat.fetches.finished(2.7, ticket, None)
    seat.member.stored(2.8, opened.key, hash_of("result"), True)
    assert seat.member.pending_rounds(TRAIN) == []
    assert seat.member.in_place == {(TRAIN, 0): hash_of("result")}


def test_bytes_that_never_come_are_given_up_and_left_to_the_catch_up() -> None:
    seat = Seat()
    opened = seat.opening()
    seat.logged(1.0, opened)
    seat.logged(1.5, whole(opened))
    seat.member.receive(1.6, PeerId(A), seat.result(A, opened.key, 0, hash_of("p")))
    (fetch,) = of_kind(seat.take(), Fetch)
    seat.logged(2.0, e.RoundCommitted(opened.key, hash_of("result")))
    for tenth in range(10 * int(CLOSING_TIMEOUT_S) + 1):
        seat.member.tick(2.0 + tenth / 10)
    effects = seat.take()
    assert seat.member.pending_rounds(TRAIN) == []
    assert of_kind(effects, CancelFetch) == [CancelFetch(fetch.ticket)]
    assert [x.fields["what"] for x in events(effects, fx.Notice)] == ["result by committed root"]


def test_late_work_for_an_attempt_that_is_over_is_released() -> None:
    seat = Seat()
    seat.member.stored(1.0, key(5), hash_of("x"), True)
    assert seat.take() == [fx.ReleaseAttempt(key(5))]
    seat.member.reduced(1.0, key(5), 0, hash_of("x"))
    assert seat.take() == []


def test_a_group_that_the_ledger_forgets_takes_its_attempt_along() -> None:
    seat = Seat(model=False)
    opened = seat.opening(channel=GROUP)
    seat.logged(1.0, opened)
    del seat.log.ledger.channels[GROUP]
    seat.member.reconcile(2.0)
    assert of_kind(seat.take(), fx.ReleaseAttempt) == [fx.ReleaseAttempt(opened.key)]


# --- messages ------------------------------------------------------------------------------------


def test_only_the_leader_names_deputies() -> None:
    """Bad input: TakeOver from somebody else starts nothing."""
    seat = Seat()
    opened = seat.opening()
    seat.logged(1.0, opened)
    order = m.TakeOver(opened.key, 0, C)
    for impostor in (A, B, IDS[6]):
        seat.member.receive(1.1, PeerId(impostor), order)
    assert of_kind(seat.take(), Fetch) == []
    seat.member.receive(1.2, LEADER, m.TakeOver(key(0, 7), 0, C))
    assert of_kind(seat.take(), Fetch) == []
    seat.member.receive(1.3, LEADER, order)
    assert [x.peer for x in of_kind(seat.take(), Fetch)] == [A, B]


def test_results_of_other_attempts_are_ignored() -> None:
    seat = Seat()
    seat.logged(1.0, seat.opening())
    for wrong in (key(0, 1), key(1), key(0, channel=GROUP)):
        seat.member.receive(1.1, PeerId(A), seat.result(A, wrong, 0, hash_of("p")))
    effects = seat.take()
    assert of_kind(effects, Fetch) == [] and faults(effects) == []


def test_whoever_asks_is_told_of_recent_results_and_memory_is_bounded() -> None:
    seat = Seat()
    keys = []
    for number in range(RECENT_ATTEMPTS_MAX + 3):
        opened = seat.opening()
        seat.logged(1.0, opened)
        seat.logged(1.5, whole(opened))
        seat.bring(opened)
        seat.member.stored(2.5, opened.key, hash_of(f"result {number}"), True)
        seat.logged(3.0, e.RoundCommitted(opened.key, hash_of(f"result {number}")))
        keys.append(opened.key)
    seat.member.receive(4.0, IDS[6], m.RoundQuery(keys[-1]))
    assert [(to, x.part) for to, x in sent(seat.take(), m.PartResult)] == [(IDS[6], 0), (IDS[6], 1)]
    seat.member.receive(4.0, IDS[6], m.RoundQuery(keys[0]))
    assert sent(seat.take(), m.PartResult) == []
    assert len(seat.member._recent) == RECENT_ATTEMPTS_MAX


def test_results_that_nothing_is_applied_to_are_forgotten() -> None:
    """A member that contributes and holds no state takes no result up."""
    seat = Seat()
    for _ in range(limits.HISTORY_ROUNDS + 20):
        opened = seat.opening()
        seat.logged(1.0, opened)
        seat.logged(1.5, whole(opened))
        seat.bring(opened)
        seat.member.stored(2.5, opened.key, hash_of("result"), True)
        seat.logged(3.0, e.RoundCommitted(opened.key, hash_of("result")))
    assert len(seat.member.in_place) == limits.HISTORY_ROUNDS + 1


def test_a_new_link_to_an_owner_asks_for_what_it_may_have_said_on_the_old_one() -> None:
    seat = Seat()
    opened = seat.opening()
    seat.logged(1.0, opened)
    seat.logged(1.5, whole(opened))
    seat.member.connected(PeerId(B))
    assert sent(seat.take(), m.RoundQuery) == [(B, m.RoundQuery(opened.key))]
