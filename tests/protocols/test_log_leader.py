"""What the leader does: one round trip, changes of the set, and its own limits."""

from __future__ import annotations

from collections import Counter

import pytest

from swarmtrain_protocols.core import Emit, Send
from swarmtrain_protocols.entries import Paused
from swarmtrain_protocols.errors import LocalProtocolError, PeerFault
from swarmtrain_protocols.messages.log import Append, AppendReply
from tests.protocols.log_world import TIMEOUTS, Site, World, instant


def test_three_stewards_commit_in_one_round_trip() -> None:
    world = instant("abcd")
    world.latency_s = 0.0
    world.settled("abc")
    world.run(5.0)  # the follower has found the leader
    leader = world.leader()
    assert leader is not None
    start, before = world.now, Counter(world.sent)
    world.propose()
    index = leader.core.last_index  # type: ignore[union-attr]
    assert world.run(1.0, lambda: leader.shown.index == index)
    assert world.now - start == pytest.approx(0.002)  # one millisecond each way
    assert world.run(1.0, world.caught_up)
    assert world.now - start == pytest.approx(0.003)
    used = world.sent - before
    assert used == {"Append": 4, "AppendReply": 4, "Update": 1} or used["Append"] <= 4


def test_a_proposal_without_majority_is_bounded() -> None:
    world = World(1, "abc").settled("abc")
    leader = world.leader()
    assert leader is not None and leader.core is not None
    world.split(leader.name, "".join(n for n in "abc" if n != leader.name))
    core = leader.core
    with pytest.raises(LocalProtocolError, match="too many"):
        for _ in range(2000):
            core.propose(world.now, Paused("z"))
    assert world.run(4.0, lambda: not core.is_leader)  # it cannot hear a majority


def test_promotion_and_back_again() -> None:
    world = World(4, "abcde").settled("a")
    for names in ("abc", "abcde", "cde", "c", "bcd", "d"):
        world.vote_with(names)
        assert world.run(8.0, lambda names=names: world.set_in_force(names)), names  # type: ignore[misc]
        assert world.run(5.0, lambda: world.leader() is not None)
        world.propose()
        assert world.run(3.0, world.caught_up), names
        world.check()
    log = world.sites["a"].core._s.log  # type: ignore[union-attr]
    bodies = [log.trust.genesis(log.genesis)[0].steward == world.sites["a"].id]
    assert bodies == [True] and len(log.links) == 12


def test_a_lost_message_is_made_good_within_a_heartbeat_or_two() -> None:
    world = World(23, "abc").settled("abc")
    world.run(1.0)
    leader = world.leader()
    assert leader is not None
    others = "".join(n for n in "abc" if n != leader.name)
    world.split(leader.name, others)
    for _ in range(5):
        world.propose()
        world.run(0.01)
    world.cut = set()
    assert world.run(3 * TIMEOUTS.heartbeat_s, lambda: _shows(world, leader))
    assert leader.core is not None and leader.core.is_leader


def _shows(world: World, leader: Site) -> bool:
    assert leader.core is not None
    index = leader.core.last_index
    return all(site.shown.index == index for site in world.sites.values())


def test_a_signature_that_covers_something_else_is_a_fault_and_counts_for_nothing() -> None:
    world = World(24, "abc").settled("abc")
    leader = world.leader()
    assert leader is not None and leader.core is not None
    core = leader.core
    index = core.propose(world.now, Paused("x"))
    core.drain()
    for site in world.sites.values():
        if site is not leader:
            bad = AppendReply(0, core.term, True, index, 0, 0, bytes(64))
            core.receive(world.now, site.id, bad)
    events = [e.event for e in core.drain() if isinstance(e, Emit)]
    assert [e.code for e in events if isinstance(e, PeerFault)] == ["bad_signature"] * 2
    assert core.commit_index == index - 1


def test_an_acknowledgement_of_what_was_never_sent_is_a_fault() -> None:
    world = World(25, "abc").settled("abc")
    leader = world.leader()
    assert leader is not None and leader.core is not None
    other = next(s for s in world.sites.values() if s is not leader)
    core = leader.core
    core.receive(world.now, other.id, AppendReply(0, core.term, True, 10_000, 0, 0))
    events = [e.event for e in core.drain() if isinstance(e, Emit)]
    assert [e.code for e in events if isinstance(e, PeerFault)] == ["unexpected"]


def test_a_newcomer_that_does_not_catch_up_holds_nobody_up() -> None:
    world = World(26, "abcd")
    world.start("ab")
    world.admit("bcd")
    world.vote_with("abc")  # c is not there
    for _ in range(10):
        world.propose()
        world.run(0.1)
    leader = world.leader()
    assert leader is not None and leader.core is not None
    assert leader.core.changing and leader.core.commit_index == leader.core.last_index
    assert leader.core.voters == (leader.id,)
    world.start("cd")
    world.vote_with("abd")  # another plan replaces the one that did not come about
    assert world.run(5.0, lambda: world.set_in_force("abd"))
    assert not leader.core.changing
    world.vote_with("abd")
    assert not leader.core.changing


def test_all_proposals_of_a_turn_travel_in_one_message_per_steward() -> None:
    world = World(27, "abc").settled("abc")
    world.run(1.0)
    leader = world.leader()
    assert leader is not None and leader.core is not None
    for n in range(20):
        leader.core.propose(world.now, Paused(str(n)))
    sent = [e.message for e in leader.core.drain() if isinstance(e, Send)]
    assert [len(m.entries) for m in sent if isinstance(m, Append)] == [20, 20]


def test_a_steward_that_lost_a_certificate_in_a_crash_gets_it_again() -> None:
    """Entries are durable before they are answered for, certificates are not: seed 41 of the
    chaos ended with a steward that could not take the next change of the set."""
    world = World(24, "abc").settled("abc")
    world.run(1.0)
    leader = world.leader()
    assert leader is not None and leader.core is not None
    other = next(site for site in world.sites.values() if site is not leader)
    for _ in range(3):
        world.propose()
        world.run(0.2)
    core = leader.core
    before = core._leadership.progress[other.id].commit  # type: ignore[union-attr]
    last, term, generation = core.last_index, core.term, core.generation
    assert before == core.commit_index == last
    core.receive(world.now, other.id, AppendReply(generation, term, True, last, last - 2, 0))
    core.tick(world.now + TIMEOUTS.heartbeat_s)
    sent = [e.message for e in core.drain() if isinstance(e, Send) and e.peer == other.id]
    (again,) = [m for m in sent if isinstance(m, Append)]
    assert again.certificate is not None and again.certificate.index == last


def test_a_learner_that_lost_entries_in_a_crash_gets_them_again() -> None:
    """Nobody relies on what a learner said before its link broke."""
    world = World(25, "abc").settled("abc")
    world.run(1.0)
    leader = world.leader()
    assert leader is not None and leader.core is not None
    other = next(site for site in world.sites.values() if site is not leader)
    core, last = leader.core, leader.core.last_index
    core.connected(world.now, other.id)
    core.drain()
    core.receive(world.now, other.id, AppendReply(core.generation, core.term, False, 1, 1, 0))
    sent = [e.message for e in core.drain() if isinstance(e, Send) and e.peer == other.id]
    (again,) = [m for m in sent if isinstance(m, Append)]
    assert again.start == 2 < last and again.entries  # up to the next change of the set
