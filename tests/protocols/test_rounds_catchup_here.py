"""Snapshots of which some chunks are here already, and those that are given up."""

from __future__ import annotations

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import CancelFetch, Fetch
from swarmtrain_protocols.messages.member import SnapshotOffer, SnapshotQuery
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.catchup import DONORS_INTERVAL_S, QUERY_INTERVAL_S
from tests.protocols.rounds_kit import TRAIN, A, B, events, hash_of, of_kind, sent
from tests.protocols.test_rounds_catchup import LONG, Seat


def test_chunks_of_an_earlier_life_are_gone_on_with() -> None:
    """That snapshot is taken although a newer one is on offer, and only the rest is fetched."""
    seat = Seat(3, values=LONG)
    seat.have = tuple(range(90))
    seat.catchup.partly_here(TRAIN, 1, hash_of("state 1"))
    seat.catchup.reconcile(1.0)
    seat.take()
    assert of_kind(seat.offer(1.1, B, 2), Fetch) == [], "somebody may still have the other one"
    fetches = of_kind(seat.offer(1.2, A, 1, 2), Fetch)
    assert {x.root for x in fetches} == {hash_of("state 1")}
    assert [(x.first, x.count) for x in fetches] == [(90, 11)]
    seat.fetches.finished(1.3, fetches[0].ticket, None)
    (told,) = [x for x in events(seat.take(), fx.Notice) if x.name == "state_fetched"]
    assert (told.fields["chunks"], told.fields["chunks_here"]) == (101, 90)


def test_what_nobody_offers_any_more_is_not_waited_for() -> None:
    seat = Seat(3, values=LONG)
    seat.catchup.partly_here(TRAIN, 1, hash_of("state 1"))
    seat.catchup.reconcile(1.0)
    seat.take()
    assert of_kind(seat.offer(1.5, A, 2), Fetch) == []
    seat.catchup.tick(1.0 + QUERY_INTERVAL_S)
    assert sent(seat.take(), SnapshotQuery) != []
    assert {x.root for x in of_kind(seat.offer(2.1, A, 2), Fetch)} == {hash_of("state 2")}


def test_a_download_that_failed_goes_on_with_the_same_snapshot() -> None:
    seat = Seat(3, values=LONG)
    seat.catchup.reconcile(1.0)
    seat.take()
    one, two = of_kind(seat.offer(1.1, A, 1), Fetch)
    seat.fetches.finished(1.2, one.ticket, None)
    seat.fetches.finished(1.3, two.ticket, "disconnected")
    flying = of_kind(seat.take(), Fetch)
    for fetch in flying:
        seat.fetches.finished(1.4, fetch.ticket, "disconnected")
    seat.take()
    assert seat.catchup.tracks[TRAIN].download is None
    assert seat.catchup.tracks[TRAIN].partly == (1, hash_of("state 1"))
    seat.have = tuple(range(16))
    seat.catchup.tick(1.3 + QUERY_INTERVAL_S)
    fetches = of_kind(seat.offer(2.6, B, 1, 2), Fetch)
    assert {x.root for x in fetches} == {hash_of("state 1")} and fetches[0].first == 16


def test_with_an_old_state_the_hashes_are_fetched_and_compared_first() -> None:
    seat = Seat(limits.HISTORY_ROUNDS + 3)
    seat.restore(1)
    newest = limits.HISTORY_ROUNDS + 2
    root = hash_of(f"state {newest}")
    seat.catchup.offered(1.0, A, SnapshotOffer(TRAIN, (newest,), (root,)))
    (prepare,) = of_kind(seat.take(), fx.PrepareSnapshot)
    seat.catchup.prepared(1.0, TRAIN, root, (), True)
    (asked,) = of_kind(seat.take(), Fetch)
    assert asked.purpose == fx.SnapshotLeaves(prepare.snapshot) and asked.count == 4
    seat.fetches.finished(1.1, asked.ticket, None)
    assert of_kind(seat.take(), fx.PrepareSnapshot) == [prepare], "now it can be compared"
    seat.catchup.prepared(1.2, TRAIN, root, (1, 2), False)
    fetches = of_kind(seat.take(), Fetch)
    assert sorted((x.first, x.count) for x in fetches) == [(0, 1), (3, 1)]


def test_a_snapshot_that_the_log_has_forgotten_meanwhile_is_given_up() -> None:
    seat = Seat(1, values=LONG)
    seat.catchup.reconcile(1.0)
    seat.take()
    assert of_kind(seat.offer(1.1, A, 0), Fetch)
    for _ in range(limits.HISTORY_ROUNDS + 2):
        seat.commit()
    seat.catchup.reconcile(50.0)
    effects = seat.take()
    assert of_kind(effects, CancelFetch) and sent(effects, SnapshotQuery)
    assert "forgotten" in events(effects, fx.Resync)[0].reason
    seat.catchup.prepared(50.1, TRAIN, hash_of("state 0"), (), False)
    assert of_kind(seat.take(), Fetch) == [], "an answer for what is given up"


def test_more_donors_are_looked_for_while_a_snapshot_comes() -> None:
    seat = Seat(1, values=LONG)
    seat.catchup.reconcile(1.0)
    seat.take()
    seat.offer(1.1, A, 0)
    due = seat.catchup.deadline()
    assert due <= 1.1 + DONORS_INTERVAL_S
    seat.catchup.tick(1.1 + DONORS_INTERVAL_S)
    assert {to for to, _ in sent(seat.take(), SnapshotQuery)} == {B}
    assert {x.peer for x in of_kind(seat.offer(17.0, B, 0), Fetch)} == {B}
