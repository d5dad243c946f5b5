"""The log core as the layer above sees it."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Emit, Persist, Send
from swarmtrain_protocols.entries import NoOp, Paused, Rewound, StewardsChanged
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.identity import Ed25519Keyring
from swarmtrain_protocols.log.core import LogCore
from swarmtrain_protocols.log.events import Committed, LeaderChanged, SnapshotLoaded
from swarmtrain_protocols.manifest import make_genesis
from swarmtrain_protocols.messages.log import (
    Update,
)
from swarmtrain_protocols.messages.session import Ping
from tests.protocols.log_world import (
    FOUNDER,
    RUN,
    Ledger,
    World,
    instant,
)


def test_a_single_steward_leads_and_commits_at_once() -> None:
    world = instant()
    world.start("a")
    core = world.sites["a"].core
    assert core is not None
    assert (core.is_leader, core.ready, core.leader) == (True, True, world.sites["a"].id)
    assert (core.term, core.commit_index, core.voters) == (1, 1, (world.sites["a"].id,))
    world.propose()
    world.run(0.0)
    assert world.sites["a"].shown.index == 2 and world.now == 0.0
    assert core.deadline() > 0.0


def test_effects_of_a_proposal_stand_in_order() -> None:
    """One drain: persist, then the update to the subscriber and the commit; no timer, no reply."""
    world = instant("ab")
    world.start("ab")
    world.run(1.0)
    core = world.sites["a"].core
    assert core is not None
    core.propose(world.now, Paused("x"))
    core.propose(world.now, Paused("y"))
    effects = core.drain()
    kinds = [type(e) for e in effects]
    assert kinds == [Persist, Send, Emit]
    update, emitted = effects[1].message, effects[2].event  # type: ignore[union-attr]
    assert isinstance(update, Update) and len(update.entries) == 2
    assert update.certificate is not None and update.certificate.index == core.commit_index
    assert isinstance(emitted, Committed)
    assert [e.body for e in emitted.entries] == [Paused("x"), Paused("y")]


def test_misuse_is_refused() -> None:
    world = instant("ab")
    world.start("ab")
    world.run(1.0)
    a, b = world.sites["a"].core, world.sites["b"].core
    assert a is not None and b is not None
    me, other = world.sites["a"].id, world.sites["b"].id
    with pytest.raises(LocalProtocolError, match="does not lead"):
        b.propose(world.now, Paused("no"))
    with pytest.raises(LocalProtocolError, match="does not lead"):
        b.change_voters(world.now, (other,))
    for body in (NoOp(), StewardsChanged((me,)), make_genesis(FOUNDER, RUN, me)):
        with pytest.raises(LocalProtocolError, match="the log's own"):
            a.propose(world.now, body)
    with pytest.raises(LocalProtocolError, match="generation is 0"):
        a.propose(world.now, Rewound(2, "", (), (), ()))
    with pytest.raises(LocalProtocolError, match="grant"):
        a.change_voters(world.now, (other,))
    with pytest.raises(LocalProtocolError, match="2 voters"):
        a.change_voters(world.now, (me, other))
    with pytest.raises(LocalProtocolError, match="only steward"):
        a.hand_over(world.now)
    with pytest.raises(LocalProtocolError, match="not a message of the log"):
        a.receive(world.now, other, Ping(1))
    assert a.last_index == 1


def test_a_founder_must_be_the_one_that_genesis_names() -> None:
    world = World(1, "ab")
    world.sites["b"].genesis = world.sites["a"].genesis
    with pytest.raises(LocalProtocolError, match="another steward"):
        world.start("b")


def test_restart_emits_the_log_again_from_the_snapshot_on() -> None:
    world = instant(compact_every=10)
    world.start("a")
    for _ in range(34):
        world.propose()
        world.run(0.01)
    site = world.sites["a"]
    before = site.shown.digest, site.shown.index
    assert len(site.disk) < 20  # compacted
    site.crash()
    core = LogCore(
        run=RUN,
        founder=FOUNDER.peer_id,
        keyring=site.keyring,
        rng=random.Random(1),
        now=world.now,
        records=site.disk,
        genesis=site.genesis,
        snapshot_of=site.ledger.snapshot,
        compact_every=10,
    )
    events = [e.event for e in core.drain() if isinstance(e, Emit)]
    assert isinstance(events[0], SnapshotLoaded) and events[0].index == 30
    ledger = Ledger()
    ledger.load(30, events[0].data)
    for event in events[1:]:
        for entry in event.entries if isinstance(event, Committed) else ():
            if entry.index <= before[1]:
                ledger.apply(entry.index, entry.term, entry.body)
    assert (ledger.digest, ledger.index) == before
    assert core.is_leader and core.ready and core.term == 2


def test_with_ed25519() -> None:
    def key(name: str) -> Ed25519Keyring:
        return Ed25519Keyring(name.encode() * 32)

    world = World(12, "abcd", compact_every=8, keyrings=key, founder=key("f")).settled("abc")
    for _ in range(20):
        world.propose()
        world.run(0.05)
    assert world.run(3.0, world.caught_up)
    leader = world.leader()
    assert leader is not None
    leader.crash()
    assert world.run(5.0, world.propose)
    assert world.run(3.0, world.caught_up)
    world.check()
    assert leader.name in "abc" and world.oracle.seen["compacted"] > 0


def test_leader_changes_are_told_once() -> None:
    world = World(13, "abc").settled("abc")
    world.run(5.0)
    for site in world.sites.values():
        told = [e for e in site.events if isinstance(e, LeaderChanged)]
        assert all(x != y for x, y in pairwise(told))
        leader = world.leader()
        assert leader is not None and told[-1].leader == leader.id


def test_patience_scales_with_what_was_measured_and_is_bounded() -> None:
    world = instant("abc").settled("abc")
    follower = next(s.core for s in world.sites.values() if s.core and not s.core.is_leader)
    for factor, seconds in ((4.0, 4.0), (0.1, 1.0), (1e9, limits.LOG_PATIENCE_FACTOR_MAX)):
        follower.set_patience(world.now, factor)
        assert follower._s.timeouts.election_s == seconds
        follower._election.rest()
        assert seconds <= follower._election.at - world.now < 2 * seconds
