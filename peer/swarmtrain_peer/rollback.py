"""Going back to an earlier round on the founder's order: which states there are, and taking one up.

An order names the hash of the state it goes back to. The founder's site believes a hash that the
log pins, or that of a checkpoint on its own disk, which is verified when it is read; what members
merely say they hold is offered by them and checked against that.
"""

from __future__ import annotations

import asyncio
from typing import Any

from swarmtrain_peer.runtime import PeerRuntime
from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.errors import CheckpointError, ConfigError
from swarmtrain_protocols.messages import member as mm
from swarmtrain_protocols.node_events import LedgerChanged

Document = dict[str, Any]

OFFERS_WAIT_S = 2.0
"""How long members are listened to; whoever answers later still serves what was found."""


async def held(runtime: PeerRuntime) -> dict[int, list[bytes]]:
    """State hashes by round, one per state channel in the log's order: where the run can go back.

    Only rounds before the present one, whose states of all channels somebody holds and whose
    hashes are certain.
    """
    node = runtime.node
    channels = node.ledger.train_channels()
    offered: dict[str, dict[int, list[bytes]]] = {c.name: {} for c in channels}

    def note(channel: str, number: int, root: bytes) -> None:
        roots = offered.get(channel, {}).setdefault(number, [])
        if root not in roots:
            roots.append(root)

    def heard(peer: PeerId, offer: mm.SnapshotOffer) -> None:
        for number, root in zip(offer.rounds, offer.roots, strict=False):
            note(offer.channel, number, root)

    own: dict[tuple[str, int], bytes] = {}
    for name, have in node.catchup.snapshots.items():
        for number, root in have:
            own[name, number] = root
            note(name, number, root)
    runtime.offer_listeners.append(heard)
    try:
        peers = [m.id for m in node.ledger.ordered_members() if m.holds_state and m.id != node.me]
        for peer in peers:
            for channel in channels:
                runtime.transport.send(PeerId(peer), mm.SnapshotQuery(channel.name))
        if peers:
            await asyncio.sleep(OFFERS_WAIT_S)
    finally:
        runtime.offer_listeners.remove(heard)
    found: dict[int, list[bytes]] = {}
    for number in sorted(set().union(*(offered[c.name] for c in channels)) if channels else ()):
        roots: list[bytes] = []
        for channel in channels:
            pinned = channel.pinned_hash(number) or own.get((channel.name, number))
            if number < channel.round and pinned in offered[channel.name].get(number, []):
                assert pinned is not None
                roots.append(pinned)
        if len(roots) == len(channels):
            found[number] = roots
    return found


async def order(runtime: PeerRuntime, number: int, reason: str) -> tuple[e.EntryBody, Document]:
    """The entry that takes the run back to the state before round ``number``.

    Raises:
        ConfigError: a pipeline, or nothing to go back from.
        CheckpointError: nobody in reach holds that state.
    """
    ledger = runtime.node.ledger
    channels = ledger.train_channels()
    if ledger.pipeline.stages:
        why = "stages of a pipeline keep copies of their newest states only"
        raise ConfigError(f"rollback to {number}", why, "export a checkpoint and found a new run")
    if not channels:
        raise ConfigError(f"rollback to {number}", "there is no model yet")
    if number >= min(c.round for c in channels):
        here = min(c.round for c in channels)
        raise ConfigError(f"rollback to {number}", f"the run is at round {here}", "name an earlier")
    states = await held(runtime)
    roots = states.get(number)
    if roots is None:
        listed = ", ".join(str(one) for one in states) or "none"
        why = "no member in reach holds the state of that round"
        raise CheckpointError(f"rollback to {number}", why, f"rounds that somebody holds: {listed}")
    names = tuple(c.name for c in channels)
    why = reason or f"back to round {number} by the founder's order"
    rounds = (number,) * len(names)
    body = e.Rewound(ledger.generation + 1, why, names, rounds, tuple(roots), ordered=True)
    return body, {"round": number, "generation": body.generation}


def watch(runtime: PeerRuntime) -> None:
    """From now on, go on from this site's own checkpoint after every rewind."""
    tasks: list[asyncio.Future[None]] = []

    def done(task: asyncio.Future[None]) -> None:
        tasks.remove(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            runtime.fail(error)

    def heard(event: object) -> None:
        if isinstance(event, LedgerChanged):
            for _, body, taken in event.entries:
                if taken and isinstance(body, e.Rewound):
                    tasks.append(asyncio.ensure_future(take_up(runtime, body)))
                    tasks[-1].add_done_callback(done)

    runtime.listeners.append(heard)


async def take_up(runtime: PeerRuntime, body: e.Rewound) -> None:
    """After a rewind: go on from this site's own checkpoint, if it has the very state.

    Otherwise it comes from other members like any state that is missed.
    """
    keeper, node = runtime.keeper, runtime.node
    if keeper is None:
        return
    for channel, number, root in zip(body.channels, body.rounds, body.roots, strict=True):
        state = await keeper.state_at(channel, number, root)
        if state is None:
            continue

        def idle(name: str = channel) -> bool:
            track = node.catchup.tracks.get(name)
            return track is None or not track.busy

        await runtime.until(idle, OFFERS_WAIT_S)
        track = node.catchup.tracks.get(channel)
        missing = track is None or track.state_hash is None
        if idle() and missing and node.ledger.generation == body.generation:
            runtime.adopt_state(state)
