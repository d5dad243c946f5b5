"""The whole log core in a hostile little world."""

from __future__ import annotations

from tests.protocols.log_world import World


def test_a_single_steward_leads_and_commits_at_once() -> None:
    world = World(1, "a")
    world.disk_max_s = 0.0
    world.start("a")
    core = world.sites["a"].core
    assert core is not None and core.is_leader and core.ready and core.commit_index == 1
    world.propose()
    world.run(0.0)
    assert world.sites["a"].shown.index == 2 and world.now == 0.0


def test_followers_see_what_is_committed() -> None:
    world = World(1, "abc").settled("a")
    for _ in range(50):
        world.propose()
        world.run(0.01)
    assert world.run(1.0, world.caught_up)
    assert len(world.oracle.truth) == 54
    world.check()


def test_three_stewards() -> None:
    world = World(1, "abcde").settled("abc")
    for _ in range(50):
        world.propose()
        world.run(0.01)
    assert world.run(1.0, world.caught_up)
    world.check()
    world.sites["a"].crash()
    assert world.run(5.0, lambda: world.leader() is not None)
    print(world.now, world.sent)
    world.propose()
    assert world.run(3.0, world.caught_up)
    world.sites["a"].start()
    assert world.run(3.0, world.caught_up)
    world.check()
