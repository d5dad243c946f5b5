"""Keeps a log that the founder has replaced out of the one that replaced it (spec 04 §2.8).

Whoever speaks for a replaced log, a steward that was thought lost for example, is told so with the
founder's signature, and nothing else is done with what it says.
"""

from __future__ import annotations

import math

from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.log.state import LogState
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.messages.log import Recovered, Recovery, Subscribe


class Fence:
    """One per log core; remembers per link when the proof was sent there last."""

    def __init__(self, state: LogState) -> None:
        self._s = state
        self._told: dict[PeerId, float] = {}
        self._with_us: dict[PeerId, None] = {}
        self._again_at = -math.inf

    def connected(self, peer: PeerId) -> None:
        """Two halves of a replaced set would never ask anybody else: they are told."""
        if self._s.recovery is not None:
            self._tell(peer, self._s.recovery)

    def disconnected(self, peer: PeerId) -> None:
        self._told.pop(peer, None)
        self._with_us.pop(peer, None)

    def deadline(self) -> float:
        if self._s.recovery is None or len(self._with_us) >= len(self._s.links):
            return math.inf
        return self._again_at

    def tick(self) -> None:
        """Tell those again who have not said yet that they have the new log."""
        s = self._s
        if s.recovery is None or s.now < self._again_at:
            return
        self._again_at = s.now + s.timeouts.lease_s
        for peer in s.links:
            if peer not in self._with_us:
                self._tell(peer, s.recovery)

    def refuses(self, peer: PeerId, message: Message) -> bool:
        """Whether ``message`` is of a log that was replaced; its sender is told, at times.

        A subscription is still served by whoever has the new log.
        """
        s = self._s
        recovery, generation = s.recovery, getattr(message, "generation", None)
        if recovery is None or generation is None:
            return False
        if generation >= recovery.generation:
            if peer in s.links:
                self._with_us[peer] = None
            return False
        self._tell(peer, recovery)
        return not (isinstance(message, Subscribe) and s.superseded is None)

    def proven(self, peer: PeerId, recovery: Recovery) -> bool:
        """Take in what ``peer`` says; True if it is proof that the log held here is void."""
        s = self._s
        if s.recovery is not None and recovery.generation <= s.recovery.generation:
            return False
        try:
            s.check_recovery(recovery)
        except PeerFault as fault:
            s.fault(peer, fault)
            return False
        s.tell_superseded(recovery)
        s.superseded = recovery
        self._with_us.clear()
        for other in s.links:
            if other != peer:
                self._tell(other, recovery)
        return True

    def _tell(self, peer: PeerId, recovery: Recovery) -> None:
        """Send the proof, at most once per heartbeat and link."""
        s = self._s
        if s.now >= self._told.get(peer, -math.inf) + s.timeouts.heartbeat_s:
            if peer in s.links:
                self._told[peer] = s.now
            s.send(peer, Recovered(recovery))
