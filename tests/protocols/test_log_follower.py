"""Followers: sources, snapshots from elsewhere, and what they do not believe."""

from __future__ import annotations

import random

import pytest

from swarmtrain_protocols.core import Emit, Send
from swarmtrain_protocols.entries import Paused
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.identity import Keyring
from swarmtrain_protocols.log.events import SnapshotLoaded
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.messages.log import (
    Subscribe,
    Update,
)
from tests.protocols.log_world import (
    KeyedHash,
    Site,
    World,
    instant,
)


def test_a_newcomer_far_behind_gets_a_snapshot_and_verifies_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(8, "abcdef", compact_every=10)
    world.start("abcde")
    world.admit("bcde")
    for names in ("abc", "bcd"):
        world.vote_with(names)
        assert world.run(8.0, lambda names=names: world.set_in_force(names))  # type: ignore[misc]
        assert world.run(5.0, lambda: world.leader() is not None)
        for _ in range(30):
            world.propose()
            world.run(0.02)
    world.oracle.seen.clear()
    world.start("f")
    assert world.run(5.0, world.caught_up)
    f = world.sites["f"].core
    assert f is not None and world.oracle.seen["snapshot loaded"] == 1
    assert f._s.log.base.index >= 50 and len(f._s.log.links) == 4
    assert f.voters == tuple(sorted(world.sites[n].id for n in "bcd"))


def test_a_large_snapshot_comes_in_pieces_over_a_link_that_loses_some() -> None:
    world = World(9, "abc", compact_every=10)
    noise = random.Random(1).randbytes(700_000)
    world.start("ab")
    for site in (world.sites["a"], world.sites["b"]):
        assert site.core is not None
        plain = site.ledger.snapshot
        site.core._snapshots._take = lambda plain=plain: plain()[:0] + noise  # type: ignore[misc]
    world.oracle.loaded = lambda *a: None  # type: ignore[method-assign]
    for _ in range(40):
        world.propose()
        world.run(0.02)
    world.drop, world.latency_s = 0.1, 0.0
    c = world.sites["c"]
    loads: list[bytes] = []
    c.apply = c.show = lambda event: (  # type: ignore[method-assign,assignment]
        loads.append(event.data) if isinstance(event, SnapshotLoaded) else None
    )
    c.start()
    assert world.run(20.0, lambda: bool(loads))
    assert loads == [noise]


def test_a_follower_changes_a_silent_source_and_serves_others_itself() -> None:
    world = World(10, "abcd", hints=3).settled("a")
    # d hears only b; b hears a.
    world.cut = {(x, y) for x, y in (("a", "d"), ("d", "a"), ("c", "d"), ("d", "c"))}
    for _ in range(100):
        world.propose()
        world.run(0.25)
    assert world.sites["d"].shown.index >= len(world.oracle.truth) - 6
    assert world.sites["d"].core.source == world.sites["b"].id  # type: ignore[union-attr]


def test_followers_of_a_dead_leader_ask_stewards_and_not_each_other() -> None:
    """Two that fed each other heard of no new leader until both had found the other stale."""
    world = World(13, "abcdefgh", hints=3).settled("abc")
    followers = [world.sites[name].core for name in "defgh"]

    def know(leader: Site) -> bool:
        return all(core is not None and core.leader == leader.id for core in followers)

    for _ in range(6):
        first = world.leader()
        assert first is not None and world.run(5.0, lambda site=first: know(site))  # type: ignore[misc]
        world.run(1.0)
        first.crash()
        for other in (site for site in world.sites.values() if site is not first):  # all notice
            world.at(world.now + 0.05, first._broken, other, other.life)
        assert world.run(5.0, lambda: world.leader() is not None)
        second = world.leader()
        assert second is not None
        limit_s = second.core.timeouts.heartbeat_s  # type: ignore[union-attr]
        assert world.run(limit_s, lambda site=second: know(site))  # type: ignore[misc]
        first.start()
        world.propose()


@pytest.mark.parametrize("what", ["entry", "signature", "nobody", "stranger", "term"])
def test_a_follower_believes_no_forged_update(what: str) -> None:
    world = instant("ab")
    world.start("a")
    a, b = world.sites["a"], world.sites["b"]
    b.start()
    world.run(0.5)
    assert b.core is not None and a.core is not None
    a.core.propose(world.now, Paused("true"))
    (true,) = [e.message for e in a.core.drain() if isinstance(e, Send)]
    b.core.receive(world.now, a.id, _forged(true, what, KeyedHash("stranger")))
    effects = b.core.drain()
    events = [e.event for e in effects if isinstance(e, Emit)]
    assert [e.code for e in events if isinstance(e, PeerFault)] == ["bad_certificate"]
    assert b.core.commit_index == 1
    if what == "entry":  # stewards did sign something here: is there another log?
        assert [e.message for e in effects if isinstance(e, Send)] == [Subscribe(0, 1, 1)]
        b.core.receive(world.now, a.id, _forged(true, what, KeyedHash("stranger")))
        effects = b.core.drain()
        assert [e.event.code for e in effects if isinstance(e, Emit)] == ["bad_certificate"]  # type: ignore[attr-defined]
    assert b.core.source is None  # it looks for another, and finds only this one
    b.core.tick(world.now + 1.0)
    (asked,) = [e.message for e in b.core.drain() if isinstance(e, Send)]
    assert asked == Subscribe(0, 2, 2)
    b.core.receive(world.now + 1.0, a.id, true)
    assert b.core.commit_index == 2


def _forged(message: Message, what: str, stranger: Keyring) -> Message:
    from msgspec.structs import replace

    assert isinstance(message, Update) and message.certificate is not None
    c = message.certificate
    (signed,) = c.endorsements
    if what == "entry":
        body = message.entries[0].body.replace(b"true", b"lies")
        return replace(message, entries=(replace(message.entries[0], body=body),))
    if what == "signature":
        bad = replace(signed, signature=bytes(64))
        return replace(message, certificate=replace(c, endorsements=(bad, bad)))
    if what == "nobody":
        return replace(message, certificate=replace(c, endorsements=()))
    if what == "term":
        return replace(message, certificate=replace(c, term=c.term + 1))
    key = replace(signed, signer=stranger.peer_id)
    return replace(message, certificate=replace(c, endorsements=(key,)))
