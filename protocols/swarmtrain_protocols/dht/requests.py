"""Requests in flight: pacing per peer, timeouts from measured round trips, answers to their asker.

Whoever asks sends no faster than the other side is bound to serve, so that no honest request is
ever dropped for its rate; what exceeds the pace waits in a bounded queue. A callback is never
called from inside ``ask``: outcomes are collected and handed over by ``settle``.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Connect, Effect, PeerId, Send
from swarmtrain_protocols.dht.ids import Contact
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.messages.dht import Reply

if TYPE_CHECKING:
    from swarmtrain_protocols.messages import Message

Done = Callable[[float, Reply | None], None]
"""Called once with the answer, or with None for a timeout, a lost link or a full queue."""

_ROUND_TRIP_S_AT_START = 0.1
_SLOW_ROUND_TRIPS = 4.0


@dataclass(slots=True)
class Meter:
    """A token bucket: ``rate_per_s`` on average, ``burst`` at once."""

    rate_per_s: float
    burst: float
    tokens: float = field(init=False)
    at: float = -math.inf
    reported: bool = False
    """Somebody was told that this meter ran dry."""

    def __post_init__(self) -> None:
        self.tokens = self.burst

    def wait_s(self, now: float) -> float:
        """Seconds until a token is there; 0 if there is one."""
        if now > self.at:
            self.tokens = min(self.burst, self.tokens + self._earned(now))
            self.at = now
        return 0.0 if self.tokens >= 1.0 else (1.0 - self.tokens) / self.rate_per_s

    def take(self, now: float) -> bool:
        if self.wait_s(now) > 0.0:
            return False
        self.tokens -= 1.0
        return True

    def _earned(self, now: float) -> float:
        return 0.0 if self.at == -math.inf else (now - self.at) * self.rate_per_s


@dataclass(slots=True)
class _Ask:
    number: int
    contact: Contact
    message: Message
    wanted: type[Reply]
    done: Done
    slow: Callable[[float], None] | None
    sent_at: float = math.inf


@dataclass(slots=True)
class _Lane:
    """What is being said to one peer."""

    meter: Meter
    waiting: deque[_Ask] = field(default_factory=deque)
    sent: dict[int, _Ask] = field(default_factory=dict)
    paced: bool = False
    """A timer is set for when the meter lets the next one out."""


class Requests:
    """Requests of one core. Effects go to ``out``; ``linked`` tells which peers have a link.

    Numbers begin at the clock (``now``, monotonic, in microseconds), so that those of a later life
    of the site are greater than all of an earlier one, whose answers may still be on their way.
    """

    def __init__(
        self, out: list[Effect], linked: Callable[[PeerId], bool], now: float = 0.0
    ) -> None:
        self._out = out
        self._linked = linked
        self._lanes: dict[PeerId, _Lane] = {}
        self._timers: list[tuple[float, int, str, PeerId]] = []
        self._outcomes: deque[Callable[[float], None]] = deque()
        self._next = 1 + int(now * 1e6)
        self._round_trip_s = _ROUND_TRIP_S_AT_START
        self.late = 0
        """Answers that came after their timeout, or to an earlier life."""

    def __len__(self) -> int:
        """Requests in flight or waiting."""
        return sum(len(lane.sent) + len(lane.waiting) for lane in self._lanes.values())

    @property
    def slow_s(self) -> float:
        """Seconds after which an answer counts as slow."""
        wanted = _SLOW_ROUND_TRIPS * self._round_trip_s
        return min(limits.DHT_SLOW_S_MAX, max(limits.DHT_SLOW_S_MIN, wanted))

    def next_number(self) -> int:
        self._next += 1
        return self._next - 1

    def ask(
        self,
        now: float,
        contact: Contact,
        message: Message,
        wanted: type[Reply],
        done: Done,
        slow: Callable[[float], None] | None = None,
    ) -> None:
        """Send ``message``, numbered by ``next_number``, as soon as the pace allows."""
        number: int = message.request  # type: ignore[attr-defined]  # every request has one
        ask = _Ask(number, contact, message, wanted, done, slow)
        lane = self._lanes.get(contact.peer)
        if lane is None:
            meter = Meter(limits.DHT_RATE_SENT_PER_S, limits.DHT_BURST_SENT)
            lane = self._lanes[contact.peer] = _Lane(meter)
        if len(lane.waiting) >= limits.DHT_REQUESTS_QUEUED_PER_PEER_MAX:
            self._outcomes.append(lambda at: done(at, None))
            return
        lane.waiting.append(ask)
        self._pump(now, contact.peer, lane)

    def answer(self, peer: PeerId, message: Reply, now: float) -> PeerFault | None:
        """An answer came in. Returns a fault if nobody asked this peer for such a thing."""
        lane = self._lanes.get(peer)
        ask = lane.sent.get(message.request) if lane else None
        if lane is None or ask is None:
            if not 0 < message.request < self._next:
                return PeerFault("dht_unasked", "an answer to a request never made", peer)
            self.late += 1
            return None
        if type(message) is not ask.wanted:
            return PeerFault("dht_unasked", "an answer of another kind than asked for", peer)
        del lane.sent[message.request]
        self._round_trip_s += (now - ask.sent_at - self._round_trip_s) / 8
        done = ask.done
        self._outcomes.append(lambda at: done(at, message))
        return None

    def lost(self, now: float, peer: PeerId) -> None:
        """The link to ``peer`` broke or could not be made: all requests to it have failed."""
        lane = self._lanes.pop(peer, None)
        if lane is None:
            return
        # The lane's meter goes too: the next link is a new one for the other side's meter as well.
        for ask in [*lane.sent.values(), *lane.waiting]:
            self._fail(ask)

    def tick(self, now: float) -> None:
        """Send what may go now, and give up on what took too long."""
        while self._timers and self._timers[0][0] <= now:
            _, number, kind, peer = heapq.heappop(self._timers)
            lane = self._lanes.get(peer)
            if lane is None:
                continue
            if kind == "pace":
                lane.paced = False
                self._pump(now, peer, lane)
                continue
            ask = lane.sent.get(number)
            if ask is None:
                continue
            if kind == "slow":
                if ask.slow is not None:
                    self._outcomes.append(ask.slow)
                continue
            del lane.sent[number]
            self._fail(ask)

    def settle(self, now: float) -> bool:
        """Hand one outcome to whoever asked; False if there is none."""
        if not self._outcomes:
            return False
        self._outcomes.popleft()(now)
        return True

    def deadline(self) -> float:
        while self._timers:
            at, number, kind, peer = self._timers[0]
            lane = self._lanes.get(peer)
            if lane is not None and (number in lane.sent or (kind == "pace" and lane.paced)):
                return at
            heapq.heappop(self._timers)
        return math.inf

    def sweep(self, now: float) -> None:
        """Forget peers that nothing is said to and whose meter is full again."""
        idle = [
            peer
            for peer, lane in self._lanes.items()
            if not lane.sent and not lane.waiting and self._rested(lane, now)
        ]
        for peer in idle:
            del self._lanes[peer]

    @staticmethod
    def _rested(lane: _Lane, now: float) -> bool:
        lane.meter.wait_s(now)
        return lane.meter.tokens >= lane.meter.burst

    def _pump(self, now: float, peer: PeerId, lane: _Lane) -> None:
        while lane.waiting:
            wait_s = lane.meter.wait_s(now)
            if wait_s > 0.0:
                if not lane.paced:
                    lane.paced = True
                    heapq.heappush(self._timers, (now + wait_s + 1e-6, 0, "pace", peer))
                return
            lane.meter.take(now)
            ask = lane.waiting.popleft()
            if not self._linked(peer) and not lane.sent:
                self._out.append(Connect(peer, ask.contact.addresses))
            ask.sent_at = now
            lane.sent[ask.number] = ask
            self._out.append(Send(peer, ask.message))
            heapq.heappush(self._timers, (now + self.slow_s, ask.number, "slow", peer))
            timeout_at = now + limits.DHT_REQUEST_TIMEOUT_S
            heapq.heappush(self._timers, (timeout_at, ask.number, "timeout", peer))

    def _fail(self, ask: _Ask) -> None:
        done = ask.done
        self._outcomes.append(lambda at: done(at, None))
