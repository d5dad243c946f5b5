"""Who of those one waits for is frozen: a failure detector that asks, and measures (spec 02 §2.5).

Unreliable on purpose (Chandra & Toueg 1996): it suspects, whoever is suspected keeps its link, and
one word from it ends the suspicion. So a wrong one costs what is decided meanwhile and no more. The
time that an answer may take is TCP's retransmission timer (RFC 6298) of the delays measured on that
link, with what a busy machine stands still for in place of the clock's granularity.

Only members that somebody here waits for are asked, so idle links carry nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Effect, Emit, PeerId, Probe
from swarmtrain_protocols.rounds.effects import Notice
from swarmtrain_protocols.silence import SAMPLES_MIN, RoundTrips

AGAIN_S = 0.4
"""Between two questions without an answer: a datagram may be lost, a stream loses none."""
SUSPECT_AGAIN_S = 5.0
FRESH_S = 5.0
"""Somebody who talks all the time is asked this often, for its delay."""
LATE_S = 0.1
"""Whoever looks this much later than it meant to has stood still itself."""


@dataclass(slots=True)
class _Known:
    """Of one link."""

    trips: RoundTrips = field(default_factory=RoundTrips)
    heard_at: float = -math.inf
    asked_at: float = math.inf
    """When the oldest question without an answer was asked."""
    again_at: float = -math.inf
    """No other question before."""
    measured_at: float = -math.inf

    @property
    def answer_s(self) -> float:
        """How long an answer may take."""
        trips = self.trips
        if trips.samples < SAMPLES_MIN:
            return limits.ANSWER_S_UNKNOWN
        answer_s = trips.smoothed_s + max(limits.STALL_S, 4 * trips.deviation_s)
        return min(answer_s, limits.SILENCE_S_MIN)


class FailureDetector:
    """Of one node. ``look`` is due at ``deadline``; ``wake`` says whether anybody is waited for."""

    def __init__(self, out: list[Effect]) -> None:
        self.suspected: dict[PeerId, float] = {}
        """Since when they were last heard of."""
        self._out = out
        self._known: dict[PeerId, _Known] = {}
        self._look_at = math.inf
        self._watching = False

    # -- what others say -------------------------------------------------------------------

    def heard(self, now: float, peer: PeerId) -> bool:
        """Anything came from ``peer``; True if it was suspected until now."""
        known = self._known.get(peer)
        if known is None:
            return False
        known.heard_at, known.asked_at = now, math.inf
        since = self.suspected.pop(peer, None)
        if since is None:
            return False
        fields: dict[str, object] = {"peer": peer.hex(), "silent_s": round(now - since, 3)}
        self._out.append(Emit(Notice("peer_answers", fields)))
        return True

    def answered(self, now: float, peer: PeerId, rtt_s: float) -> bool:
        """A question, of this node or of the link's own, was answered after ``rtt_s``."""
        known = self._known.setdefault(peer, _Known())
        known.trips.took(rtt_s)
        known.measured_at = now
        return self.heard(now, peer)

    def doubt(self, now: float, peer: PeerId) -> None:
        """Suspect a linked peer at once, for a reason of the caller's, until it answers."""
        known = self._known.setdefault(peer, _Known())
        known.asked_at, known.again_at = now, now + SUSPECT_AGAIN_S
        self._look_at = min(self._look_at, known.again_at)
        if peer not in self.suspected:
            self._suspect(now, peer, known)
        self._out.append(Probe(peer))

    def disconnected(self, peer: PeerId) -> None:
        """The link is gone, and what was measured on it."""
        self._known.pop(peer, None)
        self.suspected.pop(peer, None)

    # -- time ------------------------------------------------------------------------------

    def wake(self, now: float, waiting: bool) -> None:
        """Somebody is waited for (or nobody): look soon, unless that is planned already."""
        if waiting == self._watching:
            return
        self._watching = waiting
        if waiting:
            self._look_at = min(self._look_at, now + limits.PROBE_INTERVAL_S)
        elif not self.suspected and not self._open():
            self._look_at = math.inf

    def _open(self) -> list[PeerId]:
        """Who owes an answer, though perhaps nobody waits for it any more."""
        return [
            peer
            for peer, known in self._known.items()
            if known.asked_at < math.inf and peer not in self.suspected
        ]

    def deadline(self) -> float:
        return self._look_at

    def look(self, now: float, waited: Iterable[PeerId]) -> list[PeerId]:
        """Ask those who are waited for and silent; returns who is suspected from now on.

        ``waited``: peers with a link. Called before it is due, it does nothing.
        """
        late_s = now - self._look_at
        if late_s < 0:
            return []
        people = dict.fromkeys(waited)
        if late_s > LATE_S:  # this side stood still: answers lie here that it has not read yet
            for known in self._known.values():
                known.asked_at += late_s
        interval_s = max(limits.PROBE_INTERVAL_S, len(people) / limits.PROBES_PER_S_MAX)
        found = []
        for peer in self._open():
            known = self._known[peer]
            if now >= known.asked_at + known.answer_s:
                self._suspect(now, peer, known)
                found.append(peer)
        for peer in [*people, *(p for p in self.suspected if p not in people)]:
            self._ask(now, peer, self._known.setdefault(peer, _Known()), interval_s)
        due = [self._known[p].asked_at + self._known[p].answer_s for p in self._open()]
        if people or self._watching:
            due.append(now + interval_s)
        elif self.suspected:
            due.append(now + SUSPECT_AGAIN_S)
        self._look_at = min(due, default=math.inf)
        return found

    def _ask(self, now: float, peer: PeerId, known: _Known, interval_s: float) -> None:
        if now < known.again_at:
            return
        quiet = now >= known.heard_at + interval_s
        unknown = known.trips.samples < SAMPLES_MIN or now >= known.measured_at + FRESH_S
        if not quiet and not unknown:
            return
        known.asked_at = min(known.asked_at, now)
        suspected = peer in self.suspected
        known.again_at = now + (SUSPECT_AGAIN_S if suspected else max(AGAIN_S, interval_s))
        self._out.append(Probe(peer))

    def _suspect(self, now: float, peer: PeerId, known: _Known) -> None:
        self.suspected[peer] = max(known.heard_at, known.asked_at - limits.PROBE_INTERVAL_S)
        fields: dict[str, object] = {
            "peer": peer.hex(),
            "silent_s": round(now - self.suspected[peer], 3),
            "answer_s": round(known.answer_s, 3),
        }
        self._out.append(Emit(Notice("peer_silent", fields)))
