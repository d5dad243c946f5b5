"""Keeping the state at the ledger's round, by hand: apply, fetch a result, fetch a snapshot."""

from __future__ import annotations

import math
import random

import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.core import CancelFetch, Effect, Emit, Fetch, PeerId
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.messages.member import SnapshotOffer, SnapshotQuery, StateReport
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.catchup import (
    QUERY_INTERVAL_S,
    CatchUp,
)
from swarmtrain_protocols.rounds.download import RANGE_CHUNKS_MAX, RANGES_PER_DONOR
from swarmtrain_protocols.rounds.fetches import Fetches
from swarmtrain_protocols.rounds.member import RoundMember
from tests.protocols.rounds_kit import (
    CHUNK,
    IDS,
    RINGS,
    TRAIN,
    VALUES,
    A,
    B,
    C,
    D,
    Log,
    defined,
    events,
    faults,
    hash_of,
    joined,
    of_kind,
    sent,
    take,
)

LEADER = IDS[7]
LONG = 100 * CHUNK
"""Values of a channel whose snapshots take several ranges."""


class Seat:
    """Peer C, which holds state; A and B hold it too."""

    def __init__(self, rounds: int = 0, *, values: int = VALUES) -> None:
        self.log = Log(A, B, C, model=False)
        self.log.add(defined(values))
        self.out: list[Effect] = []
        self.fetches = Fetches(self.out)
        self.links = [A, B]
        self.have: tuple[int, ...] = ()
        """Chunks of snapshots that an earlier life has left."""
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
            connected=lambda: self.links,
            keys=RunKeys(outer_lr=0.5, outer_momentum=0.25),
            chunk_values=CHUNK,
        )
        self.catchup.active = True
        self.catchup.leader = LEADER
        for _ in range(rounds):
            self.commit()

    def commit(self) -> None:
        """A round of A and B, of which this node has nothing."""
        number = self.log.ledger.channels[TRAIN].round
        opened = self.log.open([A, B])
        self.log.choose(opened)
        self.log.commit(opened, hash_of(f"result {number}"))

    def take(self) -> list[Effect]:
        return take(self.out)

    def restore(self, round_number: int, state_hash: bytes | None = None) -> list[Effect]:
        known = state_hash or hash_of(f"state {round_number}")
        self.catchup.restore(TRAIN, round_number, known)
        self.catchup.reconcile(0.0)
        return self.take()

    def offer(self, now: float, peer: bytes, *rounds: int, lie: bool = False) -> list[Effect]:
        roots = tuple(hash_of(f"{'lie' if lie else 'state'} {number}") for number in rounds)
        self.catchup.offered(now, PeerId(peer), SnapshotOffer(TRAIN, rounds, roots))
        effects = self.take()
        for wanted in of_kind(effects, fx.PrepareSnapshot):
            self.catchup.prepared(now, TRAIN, wanted.snapshot.root, self.have, False)
            effects += self.take()
        return effects

    def applied(self, now: float, round_number: int) -> list[Effect]:
        self.catchup.applied(now, TRAIN, round_number, hash_of(f"state {round_number}"))
        return self.take()

    @property
    def track(self) -> tuple[int, bool, bool]:
        found = self.catchup.tracks[TRAIN]
        return found.round, found.state_hash is not None, found.busy


def reports(effects: list[Effect]) -> list[tuple[int, bool]]:
    return [(x.round, x.ready) for _, x in sent(effects, StateReport)]


# --- results -------------------------------------------------------------------------------------


def test_a_result_that_is_here_is_applied_and_reported() -> None:
    seat = Seat()
    seat.restore(0)
    seat.commit()
    seat.member.in_place[TRAIN, 0] = hash_of("result 0")
    seat.catchup.reconcile(1.0)
    assert seat.take() == [fx.ApplyResult(TRAIN, 0, hash_of("result 0"), lr=0.5, momentum=0.25)]
    seat.catchup.reconcile(1.1)
    assert seat.take() == []  # busy
    effects = seat.applied(1.2, 1)
    assert events(effects, fx.StateAdvanced) == [
        fx.StateAdvanced(TRAIN, 1, hash_of("state 1"), True)
    ]
    assert sent(effects, StateReport) == [
        (LEADER, StateReport(0, TRAIN, 1, hash_of("state 1"), True, False))
    ]
    assert seat.member.in_place == {}


def test_missed_results_are_fetched_by_their_committed_root_one_after_another() -> None:
    seat = Seat(2)
    effects = seat.restore(0)
    for number in range(2):
        (fetch,) = of_kind(effects, Fetch)
        root = hash_of(f"result {number}")
        assert fetch.peer in (A, B) and (fetch.root, fetch.first, fetch.count) == (root, 0, 3)
        result = fx.WholeResult(TRAIN, number, root, VALUES, "fp32")
        assert fetch.purpose == result
        seat.fetches.finished(number + 0.6, fetch.ticket, None)
        assert seat.take() == [fx.CompleteResult(result)]
        seat.catchup.completed(number + 0.7, result)
        assert seat.take() == [fx.ApplyResult(TRAIN, number, root, lr=0.5, momentum=0.25)]
        effects = seat.applied(number + 0.8, number + 1)
    assert seat.track == (2, True, False)
    assert seat.catchup.in_step(TRAIN)


def test_a_result_that_is_on_its_way_by_the_normal_path_is_not_fetched_twice() -> None:
    seat = Seat()
    seat.restore(0)
    seat.catchup.tracks[TRAIN].next_query = 0.5  # asked for a snapshot some time ago
    opened = seat.log.open([A, B, C])
    seat.member.reconcile(1.0)
    chosen = seat.log.choose(opened)
    seat.log.commit(opened, hash_of("result 0"))
    seat.member.reconcile(1.1)
    assert chosen.key == opened.key and seat.member.pending_rounds(TRAIN) == [0]
    seat.take()
    seat.catchup.reconcile(1.2)
    assert of_kind(seat.take(), Fetch) == []
    assert seat.catchup.deadline() == math.inf, "no deadline stays in the past"


def test_a_download_goes_on_with_the_other_donors() -> None:
    seat = Seat(1, values=LONG)
    effects = seat.restore(0)
    flying, done = of_kind(effects, Fetch), []
    assert [x.peer for x in flying].count(A) == [x.peer for x in flying].count(B) == 2
    while flying:
        fetch = flying.pop(0)
        lost = fetch.peer == A
        seat.fetches.finished(1.0, fetch.ticket, "disconnected" if lost else None)
        done += [] if lost else [(fetch.first, fetch.count)]
        effects = seat.take()
        flying += of_kind(effects, Fetch)
    assert of_kind(effects, fx.CompleteResult) != []
    covered = [index for start, count in sorted(done) for index in range(start, start + count)]
    assert covered == list(range(100))


def test_one_failure_of_the_last_donor_does_not_hang_the_download() -> None:
    """Of two ranges in flight the first fails and the second arrives: nothing was in flight."""
    seat = Seat(1, values=LONG)
    seat.links = [A]
    seat.log.add(e.MemberLeft(B, "lost"))
    channel = seat.log.ledger.channels[TRAIN]
    channel.history[0].held_by = (A,)
    effects = seat.restore(0)
    one, two = of_kind(effects, Fetch)
    assert (one.peer, two.peer) == (A, A)
    seat.fetches.finished(1.0, one.ticket, "busy")
    seat.fetches.finished(1.1, two.ticket, None)
    seat.take()
    assert seat.catchup.tracks[TRAIN].download is None
    due = seat.catchup.deadline()
    assert due == 1.1 + QUERY_INTERVAL_S
    seat.catchup.tick(due)
    assert len(of_kind(seat.take(), Fetch)) == RANGES_PER_DONOR


def test_a_result_that_nobody_serves_is_asked_for_again_and_the_own_state_stays() -> None:
    seat = Seat(1)
    (fetch,) = of_kind(seat.restore(0), Fetch)
    seat.fetches.finished(1.0, fetch.ticket, "unknown")
    (other,) = of_kind(seat.take(), Fetch)
    assert {fetch.peer, other.peer} == {A, B}
    seat.fetches.finished(1.1, other.ticket, "unknown")
    effects = seat.take()
    assert [x.reason for x in events(effects, fx.Resync)] == ["nobody serves the result of round 0"]
    assert len(sent(effects, SnapshotQuery)) == 2
    assert reports(effects) == [(0, False)]  # what a rewind may have to go to
    assert seat.track == (0, True, False)
    assert seat.catchup.deadline() == 1.1 + QUERY_INTERVAL_S


def test_with_nobody_to_ask_it_waits_and_does_not_spin() -> None:
    seat = Seat(1)
    for peer in (A, B):
        seat.log.add(e.MemberLeft(peer, "lost"))
    seat.log.ledger.channels[TRAIN].history[0].held_by = (C,)
    assert of_kind(seat.restore(0), Fetch) == []
    assert seat.catchup.deadline() == QUERY_INTERVAL_S
    seat.catchup.tick(QUERY_INTERVAL_S)
    assert seat.catchup.deadline() == 2 * QUERY_INTERVAL_S


# --- snapshots -----------------------------------------------------------------------------------


def test_a_node_without_state_asks_for_snapshots_and_installs_a_pinned_one() -> None:
    """OS3: what a joiner takes is pinned by the log, or it is not taken."""
    seat = Seat(2)
    seat.catchup.reconcile(1.0)
    assert {to for to, _ in sent(seat.take(), SnapshotQuery)} == {A, B}
    assert seat.catchup.deadline() == 1.0 + QUERY_INTERVAL_S
    (fetch,) = of_kind(seat.offer(1.1, A, 0, 1), Fetch)
    snapshot = fx.Snapshot(TRAIN, 1, hash_of("state 1"), VALUES)
    assert (fetch.peer, fetch.root, fetch.purpose) == (A, hash_of("state 1"), snapshot)
    assert fetch.count == 1 + 3  # header and chunks
    seat.fetches.finished(1.2, fetch.ticket, None)
    told, install = seat.take()
    assert install == fx.InstallSnapshot(snapshot)
    assert isinstance(told, Emit) and isinstance(told.event, fx.Notice)
    assert (told.event.name, told.event.fields["chunks"]) == ("state_fetched", 4)
    effects = seat.applied(1.3, 1)
    assert events(effects, fx.StateAdvanced)[0].caught_up is False
    assert [x.root for x in of_kind(effects, Fetch)] == [hash_of("result 1")]  # replay


def test_a_long_snapshot_comes_in_ranges_from_all_who_offer_it() -> None:
    seat = Seat(1, values=LONG)
    seat.catchup.reconcile(1.0)
    seat.take()
    first = of_kind(seat.offer(1.1, A, 0), Fetch)
    assert [x.count for x in first] == [RANGE_CHUNKS_MAX] * RANGES_PER_DONOR
    second = of_kind(seat.offer(1.2, B, 0), Fetch)
    assert [x.peer for x in second] == [B] * RANGES_PER_DONOR
    assert of_kind(seat.offer(1.2, B, 0), Fetch) == []
    flying, seen = first + second, []
    while flying:
        fetch = flying.pop(0)
        seen.append((fetch.first, fetch.count))
        seat.fetches.finished(2.0, fetch.ticket, None)
        effects = seat.take()
        flying += of_kind(effects, Fetch)
    covered = [index for start, count in sorted(seen) for index in range(start, start + count)]
    assert covered == list(range(1 + 100))
    assert of_kind(effects, fx.InstallSnapshot) != []


def test_a_state_that_differs_from_the_pinned_hash_is_thrown_away() -> None:
    seat = Seat(1)
    effects = seat.restore(0, hash_of("another state"))
    assert [x.reason for x in events(effects, fx.Resync)] == [
        "own state differs from the pinned hash"
    ]
    assert sent(effects, SnapshotQuery) != [] and seat.track == (0, False, False)


def test_a_state_older_than_the_history_of_the_log_is_replaced() -> None:
    seat = Seat(limits.HISTORY_ROUNDS + 3)
    effects = seat.restore(1)
    assert [x.reason for x in events(effects, fx.Resync)] == [
        "round 1 is no longer in the log's history"
    ]
    assert sent(effects, SnapshotQuery) != []
    assert of_kind(seat.offer(1.0, A, 1, 2), Fetch) == [], "as old, and no help"
    newest = limits.HISTORY_ROUNDS + 2
    (fetch,) = of_kind(seat.offer(1.0, A, 3, newest), Fetch)
    assert fetch.root == hash_of(f"state {newest}")


def test_a_rewind_makes_states_that_are_ahead_worthless_and_keeps_the_others() -> None:
    seat = Seat(3)
    seat.restore(3)
    seat.catchup.snapshots[TRAIN] = [(1, hash_of("state 1")), (3, hash_of("state 3"))]
    rewound = e.Rewound(1, "test", (TRAIN,), (1,), (hash_of("state 1"),))
    seat.log.add(rewound)
    seat.catchup.rewound()
    seat.catchup.reconcile(1.0)
    effects = seat.take()
    assert [x.reason for x in events(effects, fx.Resync)] == ["the run was rewound"]
    assert seat.catchup.snapshots[TRAIN] == [(1, hash_of("state 1"))]
    other = Seat(3)
    other.restore(1)
    other.log.add(rewound)
    other.catchup.rewound()
    other.take()
    other.catchup.announce()
    assert reports(other.take()) == [(1, True)]


def test_what_is_being_fetched_is_cancelled_by_a_rewind() -> None:
    seat = Seat(2)
    asked = of_kind(seat.restore(0), Fetch)
    seat.log.add(e.Rewound(1, "test", (TRAIN,), (0,), (hash_of("state 0"),)))
    seat.catchup.rewound()
    assert of_kind(seat.take(), CancelFetch) == [CancelFetch(x.ticket) for x in asked]
    assert seat.catchup.tracks[TRAIN].download is None


def test_a_snapshot_that_the_log_has_moved_beyond_is_given_up() -> None:
    seat = Seat(2, values=LONG)
    seat.catchup.reconcile(1.0)
    seat.take()
    asked = of_kind(seat.offer(1.1, A, 1), Fetch)
    for _ in range(limits.HISTORY_ROUNDS + 1):
        seat.commit()
    seat.catchup.reconcile(2.0)
    effects = seat.take()
    assert [x.reason for x in events(effects, fx.Resync)] == [
        "the log has forgotten the round of the snapshot that was being fetched"
    ]
    assert of_kind(effects, CancelFetch) == [CancelFetch(x.ticket) for x in asked] != []
    assert sent(effects, SnapshotQuery) != []


def test_a_state_ahead_of_a_log_that_still_loads_is_kept() -> None:
    seat = Seat(1)
    assert events(seat.restore(3), fx.Resync) == []
    assert not seat.catchup.in_step(TRAIN)


def test_a_snapshot_that_cannot_be_used_is_looked_for_again() -> None:
    seat = Seat(1)
    seat.catchup.reconcile(0.0)
    (fetch,) = of_kind(seat.offer(0.1, A, 0), Fetch)
    seat.fetches.finished(0.2, fetch.ticket, None)
    seat.take()
    seat.catchup.install_failed(0.3, TRAIN, "corrupt")
    assert [x.reason for x in events(seat.take(), fx.Resync)] == ["corrupt"]
    assert seat.track == (0, False, False)
    seat.catchup.tick(seat.catchup.deadline())
    assert sent(seat.take(), SnapshotQuery) != []


@pytest.mark.parametrize("alone", [False, True])
def test_a_state_that_changed_in_memory_is_fetched_again_if_somebody_has_it(alone: bool) -> None:
    """Nothing better is to be had by whoever is alone: it goes on, and says so."""
    seat = Seat()
    if alone:
        for member in (A, B):
            seat.log.add(e.MemberLeft(member, "lost"))
    seat.restore(0)
    seat.commit()
    seat.member.in_place[TRAIN, 0] = hash_of("result 0")
    seat.catchup.reconcile(1.0)
    (apply,) = of_kind(seat.take(), fx.ApplyResult)
    seat.catchup.install_failed(1.1, TRAIN, "own state differs from its hash", spoilt=True)
    assert events(seat.take(), fx.Resync) == [
        fx.Resync(TRAIN, 0, "own state differs from its hash")
    ]
    assert seat.track == (0, alone, False)
    seat.catchup.tick(seat.catchup.deadline())
    effects = seat.take()
    assert of_kind(effects, fx.ApplyResult) == ([apply] if alone else [])
    assert {to for to, _ in sent(effects, SnapshotQuery)} == (set() if alone else {A, B})


def test_nodes_that_hold_no_state_do_nothing() -> None:
    seat = Seat(2)
    seat.catchup.active = False
    seat.catchup.reconcile(1.0)
    assert seat.take() == [] and seat.catchup.tracks == {}
    assert seat.catchup.deadline() == math.inf


def test_members_that_hold_no_state_are_not_asked() -> None:
    seat = Seat(0)
    seat.log.add(joined(D, holds_state=False))
    seat.links = [A, D]
    seat.catchup.reconcile(1.0)
    assert {to for to, _ in sent(seat.take(), SnapshotQuery)} == {A, B}


def test_what_is_served_is_told_to_whoever_asks() -> None:
    seat = Seat()
    have = [(number, hash_of(f"state {number}")) for number in range(12)]
    seat.catchup.snapshots[TRAIN] = have
    for channel, expected in ((TRAIN, have[-8:]), ("train/9/9", [])):
        seat.catchup.queried(D, SnapshotQuery(channel))
        ((to, offer),) = sent(seat.take(), SnapshotOffer)
        assert to == D
        assert list(zip(offer.rounds, offer.roots, strict=True)) == expected


def test_the_leader_hears_where_this_node_stands() -> None:
    seat = Seat(1)
    seat.catchup.announce()
    assert seat.take() == []
    seat.restore(0)
    seat.catchup.training = True
    seat.catchup.announce()
    ((to, report),) = sent(seat.take(), StateReport)
    assert to == LEADER
    assert report == StateReport(0, TRAIN, 0, hash_of("state 0"), False, True)
    seat.catchup.leader = None
    seat.catchup.announce()
    assert seat.take() == []


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [(1,), (0, 1), (7,), (1 << 53,)])
def test_snapshots_that_the_log_does_not_pin_are_not_taken(rounds: tuple[int, ...]) -> None:
    seat = Seat(2)
    seat.catchup.reconcile(0.0)
    seat.take()
    assert seat.offer(0.1, A, *rounds, lie=True) == []
    assert seat.track == (0, False, False)


def test_offers_nobody_asked_for_change_nothing() -> None:
    seat = Seat(1)
    seat.catchup.offered(0.0, A, SnapshotOffer("train/9/9", (0,), (hash_of("state 0"),)))
    seat.catchup.offered(0.0, A, SnapshotOffer(TRAIN, (0, 1), (hash_of("state 0"),)))
    assert of_kind(seat.take(), Fetch) == []
    in_step = Seat(0)
    in_step.restore(0)
    assert in_step.offer(0.1, A, 0) == []


def test_a_donor_whose_chunks_do_not_match_is_named() -> None:
    seat = Seat(1)
    (fetch,) = of_kind(seat.restore(0), Fetch)
    seat.fetches.finished(1.0, fetch.ticket, "corrupt")
    effects = seat.take()
    assert faults(effects) == [("corrupt_chunk", fetch.peer)]
    (other,) = of_kind(effects, Fetch)
    assert other.peer != fetch.peer
