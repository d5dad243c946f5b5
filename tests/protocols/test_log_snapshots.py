"""Compaction: one hash for all, and a site whose ledger differs hears of it."""

from __future__ import annotations

import random

import pytest
from msgspec.structs import replace

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Emit, Persist, Send
from swarmtrain_protocols.entries import Paused
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.log.core import LogCore
from swarmtrain_protocols.log.events import Committed, LedgerDiverged
from swarmtrain_protocols.messages.log import AppendReply, SnapshotVote, Update
from tests.protocols.log_world import FOUNDER, RUN, World, instant


def _propose(world: World, count: int) -> None:
    for _ in range(count):
        world.propose()
        world.run(0.05)


def test_everybody_compacts_at_the_same_index_to_the_same_bytes() -> None:
    world = World(1, "abcde", compact_every=10).settled("abc")
    _propose(world, 40)
    world.run(2.0)
    cores = [site.core for site in world.sites.values() if site.core is not None]
    assert len({core._snapshots.index for core in cores}) == 1
    bodies = {core._s.log.snapshot.file.body for core in cores}  # type: ignore[union-attr]
    assert len(bodies) == 1
    for core in cores:  # one interval is kept for those a little behind
        assert core._s.log.first == core._snapshots.index - 9
    assert all(len(site.disk) < 30 for site in world.sites.values())


def test_commits_pause_at_the_boundary_until_the_snapshot_is_taken() -> None:
    world = instant(compact_every=4)
    world.start("a")
    site = world.sites["a"]
    core = site.core
    assert core is not None
    for n in range(10):
        core.propose(world.now, Paused(str(n)))
    shown: list[int] = []
    for _ in range(4):
        for effect in core.drain():
            if isinstance(effect, Emit) and isinstance(effect.event, Committed):
                site.apply(effect.event)
                shown.append(effect.event.entries[-1].index)
        core.tick(world.now) if core.deadline() <= world.now else None
    assert shown == [4, 8, 11] and core._snapshots.index == 8
    assert core.deadline() > world.now


def test_a_site_whose_ledger_differs_is_told() -> None:
    world = World(2, "abcd", compact_every=10).settled("abc")
    wrong = world.sites["d"]
    assert wrong.core is not None
    wrong.core._snapshots._take = lambda: b"something else"
    told: list[object] = []
    wrong.show = told.append  # type: ignore[method-assign]
    _propose(world, 20)
    world.run(3.0)
    (event, *_) = [e for e in told if isinstance(e, LedgerDiverged)]
    assert event.index % 10 == 0 and event.ours != event.certified
    assert wrong.core._snapshots.index == 0  # it does not compact to what it cannot vouch for


def test_a_steward_whose_ledger_differs_cannot_stop_the_others() -> None:
    world = World(3, "abc", compact_every=10).settled("abc")
    leader = world.leader()
    wrong = next(s for s in world.sites.values() if s is not leader)
    assert wrong.core is not None and leader is not None and leader.core is not None
    wrong.core._snapshots._take = lambda: b"something else"
    told: list[object] = []
    wrong.show = leader.show = told.append  # type: ignore[method-assign]
    _propose(world, 20)
    world.run(3.0)
    assert leader.core._snapshots.index >= 20
    assert any(isinstance(e, LedgerDiverged) for e in told)
    assert [e for e in told if getattr(e, "code", "") == "bad_signature"]


def test_a_snapshot_that_nobody_could_send_is_refused() -> None:
    core = LogCore(
        run=RUN, founder=FOUNDER.peer_id, keyring=(site := instant().sites["a"]).keyring,
        rng=random.Random(1), now=0.0, records=[], genesis=site.genesis, compact_every=2,
        snapshot_of=lambda: bytes(limits.SNAPSHOT_BYTES_MAX),
    )  # fmt: skip
    core.propose(0.0, Paused("x"))
    core.drain()
    with pytest.raises(LocalProtocolError, match="snapshot refused"):
        core.tick(0.0)


def test_votes_for_snapshots_travel_until_there_is_a_certificate() -> None:
    world = World(4, "abc", compact_every=10).settled("abc")
    leader = world.leader()
    follower = next(s for s in world.sites.values() if s is not leader)
    assert follower.core is not None and leader is not None
    _propose(world, 1)
    votes: list[SnapshotVote] = []
    original = world.send

    def send(source, to, message) -> None:  # type: ignore[no-untyped-def]
        if isinstance(message, AppendReply) and message.snapshot is not None:
            votes.append(message.snapshot)
            message = replace(message, snapshot=None)
        original(source, to, message)

    world.send = send  # type: ignore[method-assign]
    _propose(world, 10)
    world.run(1.0)
    assert len({v.index for v in votes}) == 1 and len(votes) > 4
    world.send = original  # type: ignore[method-assign]
    world.run(1.0)
    assert follower.core._snapshots.index == 10 and follower.core._snapshots.vote is None


def test_compaction_is_one_atomic_record() -> None:
    world = instant("ab", compact_every=4)
    world.start("ab")
    world.run(1.0)
    core = world.sites["a"].core
    assert core is not None
    for n in range(3):
        core.propose(world.now, Paused(str(n)))
    for effect in core.drain():
        if isinstance(effect, Emit):
            world.sites["a"].apply(effect.event)
    core.tick(world.now)
    effects = core.drain()
    assert [e.reset for e in effects if isinstance(e, Persist)] == [True]
    updates = [e.message for e in effects if isinstance(e, Send)]
    assert [u.snapshot.index for u in updates if isinstance(u, Update) and u.snapshot] == [4]
