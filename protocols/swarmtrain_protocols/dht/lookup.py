"""One iterative lookup (Kademlia §2.3): ask the nearest known, learn of nearer ones, converge.

At most α requests are awaited at a time. A request that is slow stops counting against α and
against convergence, so a dead peer costs a fraction of its timeout; a late answer still counts.
The lookup is over when the k nearest peers that neither failed nor are slow have all answered
(or, where there are fewer than k, when nobody is left to wait for).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from enum import Enum

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.dht.ids import Contact


class _State(Enum):
    KNOWN = 0
    ASKED = 1
    SLOW = 2
    ANSWERED = 3
    FAILED = 4


class Lookup:
    """Finds the k peers nearest to ``target``, starting from ``contacts``; never asks ``own``."""

    def __init__(
        self,
        target: int,
        contacts: Iterable[Contact],
        *,
        own: PeerId,
        k: int = limits.DHT_K,
        alpha: int = limits.DHT_ALPHA,
    ) -> None:
        self.target = target
        self._own = own
        self._k = k
        self._alpha = alpha
        self._contacts: dict[PeerId, Contact] = {}
        self._states: dict[PeerId, _State] = {}
        self._order: list[tuple[int, PeerId]] = []
        self._awaited = 0
        self._slow = 0
        self.answers = 0
        self.failures = 0
        self.stopped = False
        self.learn(contacts)

    def knows(self, peer: PeerId) -> bool:
        """True if ``peer`` needs not be learned: it is a candidate already, or this node."""
        return peer in self._states or peer == self._own

    def learn(self, contacts: Iterable[Contact]) -> None:
        """Add candidates; known ones are ignored, and only the nearest few hundred are kept."""
        for contact in contacts:
            if self.knows(contact.peer):
                continue
            place = (contact.id ^ self.target, contact.peer)
            if len(self._order) >= limits.DHT_CANDIDATES_MAX:
                last = self._order[-1]
                if place >= last or self._states[last[1]] is not _State.KNOWN:
                    continue
                self._order.pop()
                del self._states[last[1]], self._contacts[last[1]]
            insort(self._order, place)
            self._contacts[contact.peer] = contact
            self._states[contact.peer] = _State.KNOWN

    def next_queries(self) -> list[Contact]:
        """Contacts to be asked now; each is asked once and must end in answered() or failed()."""
        found: list[Contact] = []
        if self.stopped:
            return found
        considered = 0
        for _, peer in self._order:
            if considered >= self._k or self._awaited >= self._alpha:
                break
            state = self._states[peer]
            if state in (_State.FAILED, _State.SLOW):
                continue
            considered += 1
            if state is _State.KNOWN:
                self._states[peer] = _State.ASKED
                self._awaited += 1
                found.append(self._contacts[peer])
        return found

    def slow(self, peer: PeerId) -> None:
        """The answer of ``peer`` takes longer than answers usually take."""
        if self._states.get(peer) is _State.ASKED:
            self._states[peer] = _State.SLOW
            self._awaited -= 1
            self._slow += 1

    def answered(self, peer: PeerId, contacts: Iterable[Contact]) -> None:
        if self._settle(peer, _State.ANSWERED):
            self.answers += 1
            self.learn(contacts)

    def failed(self, peer: PeerId) -> None:
        if self._settle(peer, _State.FAILED):
            self.failures += 1

    def stop(self) -> None:
        """Ask nobody any more; what has answered so far is the result."""
        self.stopped = True

    @property
    def done(self) -> bool:
        if self.stopped:
            return True
        considered = answered = 0
        for _, peer in self._order:
            if considered >= self._k:
                break
            state = self._states[peer]
            if state in (_State.FAILED, _State.SLOW):
                continue
            considered += 1
            answered += state is _State.ANSWERED
        if answered < considered:
            return False
        return considered >= self._k or self._slow == 0

    def closest(self) -> list[Contact]:
        """The k nearest peers that have answered, nearest first."""
        near = [
            self._contacts[peer] for _, peer in self._order if self._states[peer] is _State.ANSWERED
        ]
        return near[: self._k]

    def _settle(self, peer: PeerId, state: _State) -> bool:
        before = self._states.get(peer)
        if before is _State.ASKED:
            self._awaited -= 1
        elif before is _State.SLOW:
            self._slow -= 1
        else:
            return False
        self._states[peer] = state
        return True
