"""OS3: whoever counts as a holder, or contributes, has had the pinned state before that.

A late joiner is fetched, verified and replayed first; only then do its bytes and its word count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.testing.checks.oracle import Invariant, Oracle

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host
    from swarmtrain_protocols.testing.site import Site
    from swarmtrain_protocols.testing.world import World


class JoinersAreReady(Invariant):
    """``reached``: states that each site has ever had, as (channel, round, hash)."""

    def __init__(self, oracle: Oracle) -> None:
        super().__init__(oracle)
        self.reached: dict[bytes, set[tuple[str, int, bytes]]] = {}
        self._last: dict[bytes, dict[str, tuple[int, bytes]]] = {}
        """What of it was seen last, by channel."""

    def always(self, world: World, host: Host) -> None:
        last = self._last.get(host.peer)
        if last is None:
            last = self._last[host.peer] = {}
        node: Site = host.node
        for channel, track in node.core.catchup.tracks.items():
            if track.state_hash is None:
                continue
            seen = last.get(channel)
            if seen is None or seen[0] != track.round or seen[1] != track.state_hash:
                last[channel] = (track.round, track.state_hash)
                mine = self.reached.setdefault(host.peer, set())
                mine.add((channel, track.round, track.state_hash))

    def opened(self, world: World, body: e.RoundOpened) -> None:
        key = body.key
        if key.channel not in self.oracle.states or self.oracle.rebuilt:
            return  # who had a state that was given up for a rebuilt one finds out later
        for member in body.holders:
            slot = (key.channel, key.round, body.state_hash)
            if slot not in self.reached.get(member, set()):
                world.violation("OS3", f"{key} counts on a holder that has never had its state")
        parts = self.oracle.truth.parts
        for item in body.contributors:
            if not parts[self.oracle.truth.name_of(item.member)].holds_state:
                continue
            # Which state it was is seen by OS1 and AR6; a bit of it may have flipped since.
            rounds = [n for name, n, _ in self.reached.get(item.member, ()) if name == key.channel]
            if item.base_round not in rounds:
                world.violation("OS3", f"{key}: {item} has never had its base")
