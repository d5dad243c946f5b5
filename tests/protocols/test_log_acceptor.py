"""Stewards that do not lead: what they take, what they sign, what they refuse."""

from __future__ import annotations

from swarmtrain_protocols.core import Send
from swarmtrain_protocols.entries import Rewound
from swarmtrain_protocols.messages.log import (
    Append,
    AppendReply,
)
from tests.protocols.log_world import (
    World,
)


def test_generation_grows_and_older_leaders_are_refused() -> None:
    world = World(11, "abc").settled("abc")
    world.propose(body=Rewound(1, "test", (), (), ()))
    world.run(1.0)
    assert world.caught_up()
    site = next(s for s in world.sites.values() if s is not world.leader())
    core, leader = site.core, world.leader()
    assert core is not None and core.generation == 1 and leader is not None
    log = core._s.log
    stale = Append(0, core.term + 1, 0, log.last_index + 1, log.last.chain_hash)
    core.receive(world.now, leader.id, stale)
    (reply,) = [e.message for e in core.drain() if isinstance(e, Send)]
    assert isinstance(reply, AppendReply) and not reply.ok and core.term == stale.term - 1
