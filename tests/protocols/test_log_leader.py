"""What the leader does: one round trip, changes of the set, and its own limits."""

from __future__ import annotations

from collections import Counter

import pytest

from swarmtrain_protocols.entries import Paused
from swarmtrain_protocols.errors import LocalProtocolError
from tests.protocols.log_world import (
    World,
    instant,
)


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
