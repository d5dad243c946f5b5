"""Carries out the effects of a ``NodeCore`` with real sockets, disks and threads.

The only place where effects become I/O. Everything here runs on the event loop's thread; work on
bytes runs on a pool and comes back by ``call_soon_threadsafe``. Effects behind a ``Persist`` wait
until the record is on disk.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

from swarmtrain_peer import host
from swarmtrain_peer.alarm import DiskAlarm
from swarmtrain_peer.allotment import Allotment
from swarmtrain_peer.datawork import INLINE_BYTES_MAX, DataWork
from swarmtrain_peer.handler import Guest, Stages
from swarmtrain_peer.journal import Journal
from swarmtrain_peer.keeper import Keeper
from swarmtrain_peer.recordfile import RecordFile
from swarmtrain_peer.roundclock import RoundClock
from swarmtrain_peer.tensors import FIRST_TICKET
from swarmtrain_peer.transport import Transport
from swarmtrain_protocols.core import (
    CancelFetch,
    Connect,
    Disconnect,
    Effect,
    Emit,
    Fetch,
    Learn,
    PeerId,
    Persist,
    Probe,
    Send,
)
from swarmtrain_protocols.dataplane import DataPlane
from swarmtrain_protocols.errors import LocalProtocolError, PeerFault, SwarmError
from swarmtrain_protocols.messages import Message, RoundKey, dht
from swarmtrain_protocols.messages.pipeline import HopReply, HopRequest
from swarmtrain_protocols.messages.session import Hello
from swarmtrain_protocols.node import NodeCore
from swarmtrain_protocols.rounds import effects as fx

FETCH_TIMEOUT_S = 600.0
"""The core has its own, shorter deadlines; this one only bounds a forgotten transfer."""
GUEST_TICKETS = range(-(1 << 40) + 1, 0)
"""Those of the node count upwards from 1."""


@dataclass(slots=True)
class _Asked:
    """A fetch under way."""

    purpose: object
    first: int
    nbytes: int
    begin_s: float


class Driver:
    """One node on real sockets.

    ``on_event`` gets every event of the core, in order, on the loop's thread. ``on_state`` is
    called on a pool thread with a channel whose state has just moved and holds still.
    """

    def __init__(
        self,
        *,
        node: NodeCore,
        transport: Transport,
        data: DataPlane,
        records: RecordFile | None,
        keeper: Keeper | None,
        alarm: DiskAlarm,
        pool: Executor,
        on_event: Callable[[object], None],
        on_state: Callable[[str], None],
        clock: RoundClock,
        mono_s: Callable[[], float] = host.mono_s,
    ) -> None:
        self.node = node
        self.data = data
        self._transport = transport
        self._journal: Journal | None = None
        if records is not None:
            failed, blocked = self._journal_failed, self._journal_blocked
            self._journal = Journal(records, pool, alarm, failed=failed, blocked=blocked)
        self._work = DataWork(self, data, keeper, clock, on_event, on_state)
        self._pool = pool
        self._on_event = on_event
        self._clock = clock
        self._mono_s = mono_s
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Effect] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._only_dht = False
        """Since the timer was set nothing but the DHT has moved."""
        self._persisting = False
        self._pumping = False
        self._asked: dict[int, _Asked] = {}
        self.allotment = Allotment()
        self._closed = False
        transport.on_leaves(self.leaves_known)
        self.guest: Guest | None = None
        self.stages: Stages | None = None

    # -- the loop -----------------------------------------------------------------------------

    def run(self, call: Callable[..., Any], *args: Any) -> Any:
        """Call a method of the node with the time first, then carry out what follows."""
        self._only_dht = False
        result = call(self._mono_s(), *args)
        self.pump()
        return result

    def pump(self) -> None:
        if self._closed or self._pumping:
            return
        self._pumping = True
        try:
            while True:
                self._take(self.node.drain())
                if not self._queue or self._persisting:
                    break
                self._execute(self._queue.popleft())
        finally:
            self._pumping = False
        self._arm()

    def _take(self, effects: list[Effect]) -> None:
        """Queue what has its place in an order; who is asked for a sign of life is asked now."""
        for effect in effects:
            if not isinstance(effect, Probe):
                self._queue.append(effect)
            elif self._transport.probe(effect.peer):
                self._loop.call_soon(self.run, self.node.heard, effect.peer)

    def _arm(self) -> None:
        """A timer that is set already may be early, and is set again then; never late."""
        if self._closed or self.stuck:
            self._disarm()
            return
        deadline = (self.node.dht if self._only_dht else self.node).deadline()
        self._only_dht = True
        if self._timer is not None and self._timer_at <= deadline:
            return
        self._disarm()
        if deadline < math.inf:  # -inf: at once
            delay = max(0.001, deadline - self._mono_s())
            self._timer, self._timer_at = self._loop.call_later(delay, self._tick), deadline

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        self._timer = None
        self._only_dht = False
        if self._mono_s() < self.node.deadline():
            self._arm()
        else:
            self.run(self.node.tick)

    def close(self) -> None:
        self._closed = True
        self._disarm()
        if self._journal is not None:
            self._journal.close()
        self._queue.clear()

    # -- effects ------------------------------------------------------------------------------

    def _execute(self, effect: Effect) -> None:
        if isinstance(effect, Send):
            if not self._transport.send(effect.peer, effect.message) and _is_dht(effect.message):
                self._loop.call_soon(self.unreachable, effect.peer)
        elif isinstance(effect, Emit):
            self._on_event(effect.event)
        elif isinstance(effect, Persist):
            self._persist(effect)
        elif isinstance(effect, Fetch):
            self._fetch(effect)
        elif isinstance(effect, CancelFetch):
            self._asked.pop(effect.ticket, None)
            self._transport.cancel(effect.ticket)
        elif isinstance(effect, Learn):
            self._transport.learn(effect.peer, effect.addresses)
        elif isinstance(effect, Connect):
            if effect.addresses:
                self._transport.learn(effect.peer, effect.addresses)
            self._transport.connect(effect.peer)
        elif isinstance(effect, Disconnect):
            self._transport.disconnect(effect.peer, effect.code, effect.reason)
        elif not (self._work.execute(effect) or (self.stages and self.stages.execute(effect))):
            raise AssertionError(f"unknown effect {effect!r}")

    def offload(
        self,
        work: Callable[[], Any],
        done: Callable[[Any], None],
        failed: Callable[[SwarmError], None] | None = None,
        *,
        nbytes: int = INLINE_BYTES_MAX,
    ) -> None:
        """Do ``work`` on the pool, or here if it is tiny, then ``done`` on the loop."""
        if nbytes < INLINE_BYTES_MAX:
            self._loop.call_soon(self._finish, self._attempt(work), done, failed)
            return

        def on_pool() -> None:
            outcome = self._attempt(work)
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._finish, outcome, done, failed)

        self._pool.submit(on_pool)

    @staticmethod
    def _attempt(work: Callable[[], Any]) -> tuple[Any, BaseException | None]:
        try:
            return work(), None
        except Exception as error:  # noqa: BLE001, handed to the loop's thread
            return None, error

    def _finish(
        self,
        outcome: tuple[Any, BaseException | None],
        done: Callable[[Any], None],
        failed: Callable[[SwarmError], None] | None,
    ) -> None:
        if self._closed:
            return
        value, error = outcome
        if error is None:
            done(value)
        elif failed is not None and isinstance(error, SwarmError):
            failed(error)
        else:
            raise error

    # -- the log's disk -----------------------------------------------------------------------

    def _persist(self, effect: Persist) -> None:
        """Write this record and those right behind it with one sync."""
        batch = [effect]
        while self._queue and isinstance(self._queue[0], Persist):
            batch.append(self._queue.popleft())  # type: ignore[arg-type]
        if self._journal is not None:
            self._persisting = True
            self._journal.write(batch, self._persisted)

    def _persisted(self) -> None:
        self._persisting = False
        self.pump()

    def _journal_failed(self, error: BaseException) -> None:
        """A vote or entry that is not durable must never be acknowledged: stop, do not guess."""
        self.close()
        self._on_event(error)

    @property
    def stuck(self) -> bool:
        """The disk is full, and others wait for what should be on it: this site stands still."""
        return self._journal is not None and self._journal.stuck

    def _journal_blocked(self) -> None:
        """Let the others elect a leader and close rounds without this site until it is back."""
        for peer in self._transport.connected_peers():
            self._transport.disconnect(peer, "disk_full", "no space for the log")

    # -- fetches ------------------------------------------------------------------------------

    def _fetch(self, effect: Fetch) -> None:
        try:
            total = self.data.total_chunks(effect.purpose)
            if isinstance(effect.purpose, fx.SnapshotLeaves):
                self._fetch_hashes(effect, total)
                return
            if not self._fits(effect):
                self._loop.call_soon(self.fetch_failed, effect.ticket, "no_room")
                return
            places = self.data.destinations(effect.purpose, effect.first, effect.count)
        except LocalProtocolError:
            # The attempt was released meanwhile; the core no longer waits for the answer.
            self._loop.call_soon(self.fetch_failed, effect.ticket, "released")
            return
        self._asked[effect.ticket] = _Asked(effect.purpose, effect.first, 0, host.mono_s())
        purpose, span = effect.purpose, (effect.first, effect.count)
        incoming = self.data.incoming(purpose) if isinstance(purpose, fx.Snapshot) else None
        if incoming is not None and incoming.was_asked_for(effect.first):
            ask = partial(self._ask, effect, total, places)
            self.offload(partial(incoming.missing, *span), ask)
        else:
            self._ask(effect, total, places, span)

    def _fits(self, effect: Fetch) -> bool:
        """Whether there is room for what others have chosen the size of."""
        nbytes = self.data.guest_nbytes(effect.purpose, self.node.me)
        if not nbytes or not isinstance(effect.purpose, fx.ContributionPart):
            return True
        return self.allotment.reserve(effect.purpose, effect.peer, nbytes)

    def _ask(
        self, effect: Fetch, total: int, places: list[memoryview], span: tuple[int, int]
    ) -> None:
        """``span``: what is not here; another fetch of the range may have failed late."""
        ticket, (first, count) = effect.ticket, span
        asked = self._asked.get(ticket)
        if asked is None:
            return  # cancelled meanwhile
        if not count:
            self.fetched(ticket, ())
            return
        places = places[first - effect.first :][:count]
        asked.first, asked.nbytes = first, sum(place.nbytes for place in places)
        self._transport.fetch(
            ticket, effect.peer, effect.root, first, total, places, FETCH_TIMEOUT_S
        )

    def leaves_known(self, ticket: int, first: int, leaves: Sequence[bytes]) -> None:
        """Leaf hashes of chunks that are on their way are proven: remember them."""
        if (asked := self._asked.get(ticket)) is not None:
            self.data.expect(asked.purpose, first, leaves)

    def _fetch_hashes(self, effect: Fetch, total: int) -> None:
        self._asked[effect.ticket] = _Asked(effect.purpose, effect.first, 0, host.mono_s())
        ticket, first, count = effect.ticket, effect.first, effect.count
        fetch = self._transport.fetch_hashes
        fetch(ticket, effect.peer, effect.root, first, count, total, FETCH_TIMEOUT_S)

    def fetched(self, ticket: int, leaves: Sequence[bytes]) -> None:
        """The transport has verified chunks in place; check that they are valid values."""
        if ticket in GUEST_TICKETS and self.guest is not None:
            self.guest.fetched(ticket, leaves)
            return
        if ticket <= FIRST_TICKET and self.stages is not None:
            self.stages.fetched(ticket, leaves)
            return
        asked = self._asked.pop(ticket, None)
        if asked is None:
            return
        purpose = asked.purpose
        self._time_fetch(asked)
        if isinstance(purpose, fx.Snapshot) and (found := self.data.incoming(purpose)):
            found.proven(asked.first, leaves)
        if isinstance(purpose, fx.WholeResult | fx.Snapshot | fx.SnapshotLeaves):
            self.run(self.node.fetched, ticket)
            return
        self.offload(
            partial(self.data.accept, purpose, leaves),
            lambda _: self.run(self.node.fetched, ticket),
            lambda error: self.run(self.node.fetch_failed, ticket, _failure(error)),
            nbytes=self._work.attempt_bytes(purpose),
        )

    def fetch_failed(self, ticket: int, reason: str) -> None:
        if ticket in GUEST_TICKETS and self.guest is not None:
            self.guest.fetch_failed(ticket, reason)
            return
        if ticket <= FIRST_TICKET and self.stages is not None:
            self.stages.fetch_failed(ticket, reason)
            return
        self._asked.pop(ticket, None)
        self.run(self.node.fetch_failed, ticket, reason)

    def _time_fetch(self, asked: _Asked) -> None:
        purpose = asked.purpose
        if isinstance(purpose, fx.ContributionPart | fx.ResultPart):
            key: RoundKey | None = purpose.key
        elif isinstance(purpose, fx.WholeResult):
            key = self._clock.latest(purpose.channel, purpose.round)
        else:
            key = None  # a snapshot belongs to no round
        if key is not None:
            self._clock.received(key, asked.nbytes, asked.begin_s, host.mono_s())

    # -- links --------------------------------------------------------------------------------

    def connected(self, peer: PeerId, hello: Hello, outgoing: bool) -> None:
        self.run(self.node.connected, peer, hello.listen)

    def disconnected(self, peer: PeerId, code: str, reason: str) -> None:
        self.run(self.node.disconnected, peer)

    def answered(self, peer: PeerId, rtt_s: float) -> None:
        """A ping was answered; most answers change nothing."""
        if self.node.answered(self._mono_s(), peer, rtt_s):
            self._only_dht = False
            self.pump()

    def unreachable(self, peer: PeerId) -> None:
        """A dial failed, or is not even tried yet because the one before has just failed."""
        self.run(self.node.unreachable, peer)

    def message(self, peer: PeerId, message: Message) -> None:
        if isinstance(message, HopRequest | HopReply) and self.stages is not None:
            self.stages.arrived(peer, message)  # its tensors come first
        else:
            self.deliver(peer, message)

    def deliver(self, peer: PeerId, message: Message) -> None:
        """Hand a message to the node; what is wrong with it is its sender's fault."""
        try:
            if not _is_dht(message):
                self.run(self.node.receive, peer, message)
                return
            if not self.node.receive_dht(self._mono_s(), peer, message):
                self._only_dht = False
            self.pump()
        except PeerFault as fault:
            fields: dict[str, object] = {"peer": peer.hex(), "fault": fault.code, "why": fault.why}
            self._on_event(fx.Notice("peer_fault", fields))


def _is_dht(message: Message) -> bool:
    return type(message).__module__ == dht.__name__


def _failure(error: SwarmError) -> str:
    """A fetch whose bytes match their root and are not a valid vector is nobody's transport."""
    return "invalid" if isinstance(error, PeerFault) else "released"
