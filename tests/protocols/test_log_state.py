"""Shared state: durable records rebuild it, and a conflict ends it."""

from __future__ import annotations

import random

from swarmtrain_protocols.core import Emit, Send
from swarmtrain_protocols.entries import Paused
from swarmtrain_protocols.log.core import LogCore
from swarmtrain_protocols.log.events import Conflict
from swarmtrain_protocols.messages.log import (
    Subscribe,
)
from tests.protocols.log_world import (
    FOUNDER,
    RUN,
    TIMEOUTS,
    instant,
)


def test_two_certificates_that_conflict_halt_the_log_with_a_proof() -> None:
    """Run the steward twice from the same disk: its two lives sign different entries."""
    world = instant("abc")
    world.start("a")
    world.run(0.0)
    fork = list(world.sites["a"].disk)
    world.start("bc")
    world.run(1.0)
    world.propose(body=Paused("for b"))
    world.run(1.0)
    liar = LogCore(
        run=RUN, founder=FOUNDER.peer_id, keyring=world.sites["a"].keyring, now=0.0,
        rng=random.Random(1), records=fork, genesis=None, snapshot_of=bytes, timeouts=TIMEOUTS,
    )  # fmt: skip
    liar.propose(0.0, Paused("for nobody else"))
    liar.drain()
    b = world.sites["b"].core
    assert b is not None
    # Its second life led from term 2 on, and contradicts what b has verified at index 2.
    liar.receive(0.0, world.sites["b"].id, Subscribe(0, 2, 2))
    for effect in liar.drain():
        if isinstance(effect, Send):
            b.receive(world.now, world.sites["a"].id, effect.message)
    events = [e.event for e in b.drain() if isinstance(e, Emit)]
    (conflict,) = [e for e in events if isinstance(e, Conflict)]
    assert b.halted and conflict.proof.index == 2 and conflict.proof.adds_up()
    assert len(conflict.proof.theirs_after) == 1
    b.tick(world.now + 100)
    assert b.drain() == [] and b.deadline() == float("inf")
