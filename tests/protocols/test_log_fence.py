"""What a site that knows of a new beginning does with messages of the old log."""

from __future__ import annotations

import random

import pytest

from swarmtrain_protocols.core import Emit, PeerId, Send
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.log.anchor import statement
from swarmtrain_protocols.log.events import LogTimeouts, Superseded
from swarmtrain_protocols.log.fence import Fence
from swarmtrain_protocols.log.state import LogState
from swarmtrain_protocols.messages import log as m
from tests.protocols.log_world import FOUNDER, RUN, KeyedHash, Site, World

PEER, OTHER = PeerId(b"p" * 32), PeerId(b"o" * 32)


def recovery(generation: int = 1000, signer: KeyedHash = FOUNDER) -> m.Recovery:
    unsigned = m.Recovery(generation, 1, 1 << 20, PEER, bytes(32), bytes(64))
    signature = signer.sign(b"recovery", statement(RUN, unsigned))
    return m.Recovery(generation, 1, 1 << 20, PEER, bytes(32), signature)


class Post:
    def __init__(self) -> None:
        site: Site = World(1, "a").sites["a"]
        self.state = LogState(site.trust(), random.Random(0), 0.0, LogTimeouts())
        self.state.links = {PEER: True, OTHER: True}
        self.fence = Fence(self.state)

    def told(self) -> list[PeerId]:
        sent = [x for x in self.state.out if isinstance(x, Send)]
        assert all(isinstance(x.message, m.Recovered) for x in sent)
        self.state.out.clear()
        return [x.peer for x in sent]


def test_without_a_recovery_everything_passes() -> None:
    post = Post()
    assert not post.fence.refuses(PEER, m.HandOver(0, 1))
    post.fence.connected(PEER)
    post.fence.tick()
    assert post.told() == [] and post.fence.deadline() == float("inf")


def test_the_proof_is_taken_once_and_passed_on_to_all_links() -> None:
    post = Post()
    assert post.fence.proven(PEER, recovery())
    assert post.told() == [OTHER]
    assert not post.fence.proven(OTHER, recovery()), "known"
    assert not post.fence.proven(OTHER, recovery(999)), "older"
    assert post.fence.proven(OTHER, recovery(2000))
    assert post.state.superseded == recovery(2000)
    assert not [x for x in post.state.out if isinstance(x, Emit)], "an empty log loses nothing"


def test_a_forged_proof_is_a_fault_of_its_bearer() -> None:
    post = Post()
    assert not post.fence.proven(PEER, recovery(signer=KeyedHash("somebody")))
    (effect,) = post.state.out
    assert isinstance(effect, Emit) and isinstance(effect.event, PeerFault)
    assert (effect.event.code, effect.event.peer) == ("bad_recovery", PEER)
    assert post.state.superseded is None


@pytest.mark.parametrize(
    "message",
    [
        m.VoteRequest(3, 9, False, False, 9, 9),
        m.Append(3, 9, 0, 1, bytes(32)),
        m.Update(3, 9, b"", (9, 9), 0, 9),
        m.HandOver(3, 9),
        m.Subscribe(3, 0, 0),
    ],
    ids=lambda message: type(message).__name__,
)
def test_messages_of_the_old_log_are_refused_with_the_proof(message: object) -> None:
    post = Post()
    post.fence.proven(OTHER, recovery())
    post.state.out.clear()
    post.state.now = 5.0
    assert post.fence.refuses(PEER, message)  # type: ignore[arg-type]
    assert post.told() == [PEER]
    post.state.now += post.state.timeouts.heartbeat_s / 2
    assert post.fence.refuses(PEER, message)  # type: ignore[arg-type]
    assert post.told() == [], "once per heartbeat"


def test_what_says_nothing_of_generations_passes() -> None:
    post = Post()
    post.fence.proven(OTHER, recovery())
    assert not post.fence.refuses(PEER, m.SnapshotPiece(1 << 20, 1, 0, b"x"))
    assert not post.fence.refuses(PEER, m.Unserved("empty"))


def test_links_are_told_again_until_they_speak_of_the_new_log() -> None:
    post = Post()
    post.fence.proven(PEER, recovery())
    post.told()
    period = post.state.timeouts.lease_s
    for turn in range(1, 4):
        post.state.now = turn * period
        post.fence.tick()
        assert post.told() == [PEER, OTHER]
        assert post.fence.deadline() == (turn + 1) * period
    assert not post.fence.refuses(PEER, m.Subscribe(1000, 0, 0))
    post.state.now = 4 * period
    post.fence.tick()
    assert post.told() == [OTHER]
    assert not post.fence.refuses(OTHER, m.Update(1001, 9, b"", (9, 9), 0, 9))
    assert post.fence.deadline() == float("inf")
    post.fence.disconnected(OTHER)
    post.state.now += 1.0
    post.fence.connected(OTHER)
    assert post.told() == [OTHER]


def test_a_site_with_a_log_says_what_it_gives_up() -> None:
    world = World(2, "a").settled("a")
    state = world.sites["a"].core._s  # type: ignore[union-attr]
    assert Fence(state).proven(PEER, recovery())
    events = [x.event for x in state.out if isinstance(x, Emit)]
    assert events == [Superseded(1000, 0, PEER)]
