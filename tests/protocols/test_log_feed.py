"""Serving subscribers."""

from __future__ import annotations

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId, Send
from swarmtrain_protocols.entries import MemberJoined, Paused
from swarmtrain_protocols.log.core import LogCore
from swarmtrain_protocols.messages import Message, encode
from swarmtrain_protocols.messages.log import (
    SnapshotPiece,
    SnapshotWanted,
    Subscribe,
    Unserved,
    Unsubscribe,
    Update,
)
from tests.protocols.log_world import TIMEOUTS, World, instant

X, Y = PeerId(b"x" * 32), PeerId(b"y" * 32)


def served(core: LogCore) -> list[tuple[PeerId, Message]]:
    return [(e.peer, e.message) for e in core.drain() if isinstance(e, Send)]


def lone(compact_every: int = 5000) -> tuple[World, LogCore]:
    world = instant(compact_every=compact_every)
    world.start("a")
    world.run(0.0)
    core = world.sites["a"].core
    assert core is not None
    return world, core


def test_subscribers_at_one_point_share_one_message() -> None:
    _, core = lone()
    for peer in (X, Y):
        core.receive(0.0, peer, Subscribe(0, 2, 2))
    served(core)
    core.propose(0.0, Paused("x"))
    (one, first), (two, second) = served(core)
    assert (one, two) == (X, Y) and first is second
    assert isinstance(first, Update) and (first.start, first.length, first.more) == (2, 3, False)


def test_a_site_without_a_log_serves_nobody() -> None:
    world = instant("ab")
    world.start("b")
    core = world.sites["b"].core
    assert core is not None
    core.receive(0.0, X, Subscribe(0, 0, 0))
    assert served(core) == [(X, Unserved("empty"))]


def test_subscribers_are_bounded_and_their_leases_end() -> None:
    _, core = lone()
    for n in range(limits.LOG_SUBSCRIBERS_MAX):
        core.receive(0.0, PeerId(n.to_bytes(32, "big")), Subscribe(0, 2, 2))
    served(core)
    core.receive(0.0, X, Subscribe(0, 2, 2))
    assert served(core) == [(X, Unserved("full"))]
    core.tick(TIMEOUTS.lease_s)
    assert served(core) == []
    core.receive(TIMEOUTS.lease_s, X, Subscribe(0, 2, 2))
    assert [peer for peer, _ in served(core)] == [X]


def test_the_idle_get_a_sign_of_life_and_those_who_leave_get_nothing() -> None:
    _, core = lone()
    for peer in (X, Y):
        core.receive(0.0, peer, Subscribe(0, 2, 2))
    served(core)
    core.receive(0.0, Y, Unsubscribe())
    core.tick(core.deadline())
    ((peer, life),) = served(core)
    assert peer == X and isinstance(life, Update) and life.entries == () and life.pulse == (1, 1)
    core.disconnected(2.0, X)
    core.propose(2.0, Paused("x"))
    assert served(core) == [] and core.deadline() > 2.0


def _large(n: int) -> MemberJoined:
    key = n.to_bytes(32, "big")
    return MemberJoined(key, "m" * 64, ("a" * 128,) * 8, True, True, False, True)


def test_who_is_behind_pulls_and_no_message_outgrows_a_frame() -> None:
    _, core = lone()
    for n in range(600):
        core.propose(0.0, _large(n))
        if n % 100 == 0:
            core.drain()
    core.drain()
    start, pulls = 0, 0
    while start < 602:
        core.receive(0.0, X, Subscribe(0, start, 0))
        messages = [m for _, m in served(core) if isinstance(m, Update)]
        assert 1 <= len(messages) <= limits.LOG_MESSAGES_PER_PULL
        for message in messages:
            assert message.start == start
            assert len(encode(message)) < limits.FRAME_BYTES_CONTROL_MAX
            start += len(message.entries)
        assert messages[-1].more == (start < 602)
        core.propose(0.0, Paused("more")) if pulls < 1 else None
        assert pulls or served(core) == []  # it has asked for no more yet
        pulls += 1
        start = min(start, 602)
    assert pulls > 2


def test_who_is_far_behind_gets_the_file_piece_by_piece() -> None:
    world, core = lone(compact_every=10)
    core._snapshots._take = lambda: bytes(500_000)
    for _ in range(35):
        world.propose()
        world.run(0.01)
    core.receive(world.now, X, Subscribe(0, 0, 0))
    data, index = b"", 0
    while True:
        pieces = [m for _, m in served(core)]
        assert 0 < len(pieces) <= limits.SNAPSHOT_PIECES_PER_PULL
        for piece in pieces:
            assert isinstance(piece, SnapshotPiece) and piece.offset == len(data)
            data, index = data + piece.data, piece.index
        assert isinstance(piece, SnapshotPiece)
        if len(data) == piece.nbytes:
            break
        core.receive(world.now, X, SnapshotWanted(index, len(data)))
    snapshot = core._s.trust.snapshot(data)
    assert snapshot.body.index == index == 30 and snapshot.body.ledger == bytes(500_000)


def test_a_stranger_cannot_pull_without_subscribing() -> None:
    _, core = lone()
    core.receive(0.0, X, SnapshotWanted(0, 0))
    assert served(core) == []
