"""Shared state: durable records rebuild it, and a conflict ends it."""

from __future__ import annotations

import random

import pytest

from swarmtrain_protocols.core import Emit, PeerId, Persist, Send
from swarmtrain_protocols.entries import Paused, encode_body
from swarmtrain_protocols.log.certificate import Trust
from swarmtrain_protocols.log.core import LogCore
from swarmtrain_protocols.log.events import Conflict, LeaderChanged
from swarmtrain_protocols.log.state import LogState
from swarmtrain_protocols.manifest import make_genesis
from swarmtrain_protocols.messages.log import Subscribe, WireEntry
from tests.protocols.log_chaos import Chaos
from tests.protocols.log_world import FOUNDER, RUN, TIMEOUTS, KeyedHash, World, instant


def test_two_certificates_that_conflict_halt_the_log_with_a_proof() -> None:
    """Run the steward twice from the same disk: its two lives sign different entries."""
    world = instant("abc")
    world.start("a")
    world.run(0.0)
    fork = list(world.sites["a"].disk)
    world.start("bc")
    world.run(1.0)
    world.propose(body=Paused("for b"))
    world.run(1.0)
    liar = LogCore(
        run=RUN, founder=FOUNDER.peer_id, keyring=world.sites["a"].keyring, now=0.0,
        rng=random.Random(1), records=fork, genesis=None, snapshot_of=bytes, timeouts=TIMEOUTS,
    )  # fmt: skip
    liar.propose(0.0, Paused("for nobody else"))
    liar.drain()
    b = world.sites["b"].core
    assert b is not None
    # Its second life led from term 2 on, and contradicts what b has verified at index 2.
    liar.receive(0.0, world.sites["b"].id, Subscribe(0, 2, 2))
    for effect in liar.drain():
        if isinstance(effect, Send):
            b.receive(world.now, world.sites["a"].id, effect.message)
    events = [e.event for e in b.drain() if isinstance(e, Emit)]
    (conflict,) = [e for e in events if isinstance(e, Conflict)]
    assert b.halted and conflict.proof.index == 2 and conflict.proof.adds_up()
    assert len(conflict.proof.theirs_after) == 1
    b.tick(world.now + 100)
    assert b.drain() == [] and b.deadline() == float("inf")


def test_a_steward_restored_from_an_old_copy_is_convicted_by_whoever_follows_it() -> None:
    """Its new log has grown past the old one, so that nothing of it seems to contradict at first:
    the follower asks for it from the beginning."""
    world = instant("ab")
    world.start("a")
    world.run(0.0)
    fork = list(world.sites["a"].disk)
    world.start("b")
    world.run(1.0)
    for number in range(3):
        world.propose(body=Paused(f"for b {number}"))
    world.run(1.0)
    liar = LogCore(
        run=RUN, founder=FOUNDER.peer_id, keyring=world.sites["a"].keyring, now=world.now,
        rng=random.Random(1), records=fork, genesis=None, snapshot_of=bytes, timeouts=TIMEOUTS,
    )  # fmt: skip
    b, names = world.sites["b"].core, world.sites
    assert b is not None
    for number in range(9):
        liar.propose(world.now, Paused(f"for nobody else {number}"))
        liar.drain()
    assert liar.commit_index > b.commit_index
    told = exchange(b, liar, names["b"].id, names["a"].id, world.now)
    (conflict,) = [event for event in told if isinstance(event, Conflict)]
    assert b.halted and conflict.proof.adds_up()
    assert 0 < conflict.proof.index <= 4, "the first entry that differs"


def exchange(b: LogCore, a: LogCore, b_id: PeerId, a_id: PeerId, now: float) -> list[object]:
    """Let ``b`` and ``a`` talk for 20 seconds on a new link; returns what ``b`` told."""
    told: list[object] = []
    b.disconnected(now, a_id)
    for core, peer in ((a, b_id), (b, a_id)):
        core.connected(now, peer)
    for step in range(200):
        b.tick(now + step / 10)
        a.tick(now + step / 10)
        for core, other, me in ((b, a, b_id), (a, b, a_id)):
            for effect in core.drain():
                if isinstance(effect, Send):
                    other.receive(now + step / 10, me, effect.message)
                elif isinstance(effect, Emit) and core is b:
                    told.append(effect.event)
    return told


def _state(records: list[bytes]) -> LogState:
    trust = Trust(RUN, FOUNDER.peer_id, KeyedHash("a"))
    state = LogState(trust, random.Random(1), 0.0, TIMEOUTS)
    state.load(records)
    return state


def _facts(state: LogState) -> tuple[object, ...]:
    log = state.log
    entries = [(e.index, e.term, e.data) for e in log.entries]
    return state.term, state.voted_for, entries, log.commit, log.links, log.base, log.genesis


def test_records_rebuild_what_they_recorded_at_every_point() -> None:
    """Replay every prefix of what three stewards wrote while leaders and sets changed."""
    chaos = Chaos(1)
    world = chaos.world
    checked = 0
    chaos.run()
    for site in world.sites.values():
        world.run(3.0)  # whatever was postponed is written
        assert site.core is not None and not site.busy
        live = site.core._s
        loaded = _state(list(site.disk))
        assert (loaded.term, loaded.voted_for) == (live.term, live.voted_for)
        kept = [e for e in live.log.entries if e.index >= loaded.log.first]
        assert loaded.log.entries == kept  # the interval before the snapshot is not on disk
        assert loaded.log.commit == live.log.commit and loaded.log.links == live.log.links
        for cut in range(len(site.disk)):
            prefix = _state(site.disk[: cut + 1])
            assert prefix.term <= live.term and prefix.log.commit <= live.log.commit
            checked += 1
    assert checked > 10


def test_entries_are_saved_once_and_again_after_a_cut() -> None:
    state = _state([])
    genesis = make_genesis(FOUNDER, RUN, state.me)
    state.log.append(state.log.follow(state.log.last, WireEntry(0, encode_body(genesis))))
    state.adopt_term(1, state.me)
    state.extend(Paused("x"))
    state.save()
    state.save()
    state.truncate(1)
    state.extend(Paused("y"))
    state.extend(Paused("z"))
    state.save()
    records = [e.record for e in state.out if isinstance(e, Persist)]
    assert len(records) == 3  # the vote, entries 0 and 1, entries 1 and 2
    again = _state(records)
    assert _facts(again) == _facts(state) and again.log.last_index == 2


def test_a_vote_is_never_taken_back_within_a_term() -> None:
    state = _state([])
    state.adopt_term(3, b"a" * 32)
    with pytest.raises(AssertionError):
        state.adopt_term(3, b"b" * 32)
    with pytest.raises(AssertionError):
        state.adopt_term(2)
    state.adopt_term(4)
    assert (state.term, state.voted_for) == (4, b"")


def test_a_leader_is_told_once() -> None:
    state = _state([])
    peer = PeerId(b"p" * 32)
    for _ in range(3):
        state.set_leader(peer, 2)
    state.set_leader(None, 2)
    state.set_leader(None, 2)
    state.set_leader(peer, 3)
    events = [e.event for e in state.out if isinstance(e, Emit)]
    assert events == [
        LeaderChanged(peer, 2, 0),
        LeaderChanged(None, 2, 0),
        LeaderChanged(peer, 3, 0),
    ]


def test_what_is_certified_ends_older_terms() -> None:
    """A site that follows others must not listen to a leader of an older term afterwards."""
    world = World(20, "abcd").settled("abc")
    world.propose()
    world.run(2.0)
    follower = world.sites["d"].core
    assert follower is not None and follower._s.term == follower._s.log.last.term > 0
    assert _state(list(world.sites["d"].disk)).term == follower._s.term
