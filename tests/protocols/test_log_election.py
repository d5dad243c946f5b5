"""Elections: durable votes, patience, hand-over, and who may stand."""

from __future__ import annotations

from swarmtrain_protocols.log.records import VoteRecord, decode_record
from swarmtrain_protocols.messages.log import (
    Append,
    VoteRequest,
)
from tests.protocols.log_world import (
    World,
    instant,
    joined,
)


def _two_candidates(forget: bool) -> list[bool]:
    """Does a steward that crashes in between vote for both candidates of one term?"""
    world = World(3, "abc").settled("abc")
    site = world.sites["b"]
    site.forget = lambda record: forget and isinstance(decode_record(record), VoteRecord)
    world.cut = {(x, y) for x in "abc" for y in "abc"}
    answers: list[bool] = []
    for candidate in (world.sites["a"].id, world.sites["c"].id):
        world.run(0.9)  # long enough to miss a leader's heartbeat, too short to stand oneself
        assert site.core is not None
        log = site.core._s.log
        request = VoteRequest(0, 50, False, True, log.last_index, log.last.term)
        site.call(lambda core, c=candidate, r=request: core.receive(world.now, c, r))  # type: ignore[misc]
        world.run(0.1)
        answers.append(site.core._s.voted_for == candidate)
        site.crash()
        site.start()
    return answers


def test_a_vote_survives_a_crash_because_it_was_made_durable() -> None:
    assert _two_candidates(forget=False) == [True, False]
    assert _two_candidates(forget=True) == [True, True]


def _seconds_without_a_leader(*, notified: bool) -> float:
    world = World(5, "abcd").settled("abc")
    old = world.leader()
    assert old is not None
    world.run(1.0)
    old.core, old.queue = None, []  # dies without a word
    for other in world.sites.values() if notified else ():
        other.call(lambda core: core.disconnected(world.now, old.id))
    start = world.now
    assert world.run(6.0, lambda: _ready(world))
    return world.now - start


def _ready(world: World) -> bool:
    leader = world.leader()
    return leader is not None and leader.core is not None and leader.core.ready


def test_losing_the_leader_costs_one_election_and_a_broken_link_speeds_it_up() -> None:
    assert _seconds_without_a_leader(notified=True) < 0.5
    assert 1.0 <= _seconds_without_a_leader(notified=False) < 4.0


def test_a_lone_voter_that_returns_does_not_unseat_the_leader() -> None:
    world = World(6, "abc").settled("abc")
    leader = world.leader()
    assert leader is not None and leader.core is not None
    lonely = next(s for s in world.sites.values() if s is not leader)
    world.split(lonely.name, "".join(n for n in "abc" if n != lonely.name))
    term = leader.core.term
    world.run(15.0)
    world.cut = set()
    world.run(5.0)
    assert leader.core.is_leader and leader.core.term == term
    assert lonely.core is not None and lonely.core.leader == leader.id


def test_a_leader_hands_over_within_one_round_trip() -> None:
    world = World(7, "abc").settled("abc")
    world.run(1.0)
    old = world.leader()
    assert old is not None
    start = world.now
    old.call(lambda core: core.hand_over(world.now))
    assert world.run(1.0, lambda: _ready(world))
    assert world.leader() is not old and world.now - start < 0.2


def test_only_keys_with_a_grant_can_lead_or_be_voted_for() -> None:
    world = instant("abx")
    world.start("abx")
    world.propose(body=joined(world.sites["b"].id))
    world.propose(body=joined(world.sites["x"].id, may_vote=False))
    world.run(1.0)
    b, x = world.sites["b"].core, world.sites["x"]
    assert b is not None
    last = b._s.log.last
    b.tick(world.now + 100)
    b.drain()
    for message in (
        VoteRequest(0, 50, False, False, last.index, last.term),
        Append(0, 50, 0, last.index + 1, last.chain_hash),
    ):
        b.receive(world.now + 100, x.id, message)
        assert b.drain() == [] and b._s.term == 1
