"""How long to wait for a leader: as long as links and this machine are slow (Ongaro 2014, §3.9:
broadcast time well below the election timeout)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.node import NodeCore

ROUND_TRIPS = 3
"""An election takes two, and a heartbeat must be in time when one is lost."""
MEASURE_S = 5.0
LATE_KEPT = 0.97
"""What is left of a measured lateness at the next look: half after six seconds of four a second."""
CHANGE = 1.2
"""Smaller changes than this factor are not worth a new patience."""


class Links(Protocol):
    """What is asked of ``transport.Transport``."""

    def recent_rtt_s(self, peer: PeerId) -> float | None: ...

    def measure(self, peer: PeerId) -> None: ...


class Patience:
    """Keeps the log's timeouts in proportion to measured delays; ``look`` four times a second.

    ``run`` calls a method of a core with the time first (``driver.Driver.run``).

    What counts is the round trip to a majority of stewards: a minority on slow links does not slow
    the others down, and has patience itself.
    """

    def __init__(self, node: NodeCore, links: Links, run: Callable[..., object]) -> None:
        self._node = node
        self._links = links
        self._run = run
        self._late_s = 0.0
        self._measure_at_s = 0.0
        self.factor = 1.0

    def look(self, now: float, late_s: float) -> None:
        """``late_s``: by how much this look came later than it was meant to."""
        self._late_s = max(self._late_s * LATE_KEPT, late_s)
        if now >= self._measure_at_s:
            self._measure_at_s = now + MEASURE_S
            for steward in self._others():
                self._links.measure(steward)
        delay_s = self._majority_rtt_s() + 2 * self._late_s
        wanted = ROUND_TRIPS * delay_s / limits.ELECTION_TIMEOUT_S
        factor = min(max(wanted, 1.0), limits.LOG_PATIENCE_FACTOR_MAX)
        near = self.factor / CHANGE <= factor <= self.factor * CHANGE
        if factor != self.factor and (not near or factor == 1.0):
            self.factor = factor
            self._run(self._node.log.set_patience, factor)

    def _others(self) -> list[PeerId]:
        return [PeerId(v) for v in self._node.ledger.voters if v != self._node.me]

    def _majority_rtt_s(self) -> float:
        """Round trip within which a majority of stewards answers, as far as links are measured."""
        voters = self._node.ledger.voters
        found = [self._links.recent_rtt_s(peer) for peer in self._others()]
        if not voters:  # not a member yet: whoever lets this site in
            found = [self._links.recent_rtt_s(peer) for peer in self._node.linked()]
        known = sorted(rtt for rtt in found if rtt is not None)
        if self._node.me in voters:
            known.insert(0, 0.0)
        if not known:
            return 0.0
        return known[min(len(known) - 1, len(voters) // 2)]
