"""Whether this site's states keep up with the log, for people."""

from __future__ import annotations

from swarmtrain_protocols.node import NodeCore


def is_behind(node: NodeCore, channel: str) -> bool:
    """The state here is neither the newest nor the one before it, which is being moved on.

    A step of a pipeline may be shorter than a second: whoever applies the last one is in step.
    """
    track, state = node.catchup.tracks.get(channel), node.ledger.channels.get(channel)
    if track is None or state is None or track.state_hash is None:
        return True
    return track.round not in (state.round, state.round - 1)
