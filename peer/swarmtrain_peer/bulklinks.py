"""Which bulk connections exist: made on demand by whoever dialled the control link, few, evicted.

The side that dialled the control link can dial again, so it makes the bulk connections of that
pair, whoever fetches. Runs on the loop thread; ``begin``, ``end`` and ``closed`` come from pool
threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from swarmtrain_peer.bulk import BulkConnection, BulkPool
from swarmtrain_peer.sockets import receive_exactly, tune
from swarmtrain_protocols import bulklink, limits
from swarmtrain_protocols.bulklink import BulkKeys, Header
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.messages.fetch import BulkClosed
from swarmtrain_protocols.noise import TAG_BYTES

_DIAL_ATTEMPTS = 3
_DIAL_PAUSE_S = 0.1


class BulkUsers(Protocol):
    """Fetches and servings, as this module sees them."""

    def wants_bulk(self, peer: PeerId) -> bool: ...

    def rtt_s(self, peer: PeerId) -> float | None: ...

    def bulk_up(self, conn: BulkConnection) -> None: ...

    def bulk_lost(self, conn: BulkConnection, fault: PeerFault | None) -> None:
        """Tell the other side (``BulkClosed``), then settle what was on it."""

    def bulk_missed(self, peer: PeerId) -> None:
        """The other side has lost a connection that is not known here."""

    def no_bulk(self, peer: PeerId) -> None: ...

    def begin(self, conn: BulkConnection, header: Header) -> memoryview | None: ...

    def end(self, conn: BulkConnection, header: Header, ok: bool) -> None: ...


OneMore = Callable[[], Awaitable[socket.socket]]
"""Makes one more connection the way the control link goes."""


@dataclass(slots=True)
class _Pair:
    """What the control link to a peer allows; ``one_more`` is None if the other side dials."""

    secret: bytes
    one_more: OneMore | None
    connections: list[BulkConnection]
    past: deque[bytes]
    task: asyncio.Task[None] | None = None


class BulkLinks:
    """All bulk connections of this process."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pool: BulkPool,
        entropy: Callable[[int], bytes],
        users: BulkUsers,
    ) -> None:
        self._loop = loop
        self._pool = pool
        self._entropy = entropy
        self._users = users
        self._pairs: dict[PeerId, _Pair] = {}
        self._by_tag: dict[bytes, PeerId] = {}
        self._used_at: dict[BulkConnection, float] = {}
        self._past_bytes: dict[PeerId, tuple[int, int]] = {}
        self._making = 0
        self.congestion: dict[str, int] = {}
        self.evicted = 0
        self.refused = 0

    def peer_up(self, peer: PeerId, secret: bytes, one_more: OneMore | None) -> None:
        """A control link opened. ``one_more``: how to connect again if this side dialled it."""
        past: deque[bytes] = deque(maxlen=2 * limits.BULK_CONNECTIONS_MAX)
        self._pairs[peer] = _Pair(secret, one_more, [], past)
        self._by_tag[bulklink.link_tag(secret)] = peer
        if self._users.wants_bulk(peer):
            self.need(peer)

    def peer_lost(self, peer: PeerId) -> None:
        """The control link is gone and its bulk connections with it."""
        pair = self._pairs.pop(peer, None)
        if pair is None:
            return
        del self._by_tag[bulklink.link_tag(pair.secret)]
        if pair.task is not None:
            pair.task.cancel()
        for conn in pair.connections:
            conn.abandon()

    def receive(self, peer: PeerId, message: BulkClosed) -> None:
        """The other side has lost a connection, which may still look alive here."""
        pair = self._pairs.get(peer)
        if pair is None or message.connection in pair.past:
            return  # known to be gone, and settled
        for conn in pair.connections:
            if conn.name == message.connection:
                conn.abandon()
                return
        self._users.bulk_missed(peer)  # it never came up here

    def connections(self, peer: PeerId) -> list[BulkConnection]:
        """Those to ``peer`` that are up; marks them as used."""
        pair = self._pairs.get(peer)
        alive = [conn for conn in pair.connections if conn.alive] if pair else []
        for conn in alive:
            self._used_at[conn] = self._loop.time()
        return alive

    def _streams(self, peer: PeerId) -> int:
        """Loss on a long path halves one connection's rate for many round trips, not all four."""
        rtt_s = self._users.rtt_s(peer)
        if rtt_s is None or rtt_s < limits.LONG_PATH_RTT_S:
            return limits.BULK_STREAMS_PER_PEER
        return limits.BULK_STREAMS_LONG_PATH

    def need(self, peer: PeerId) -> None:
        """Make connections if there are too few and this side is the one to dial."""
        pair = self._pairs.get(peer)
        if pair is None or pair.one_more is None or pair.task is not None:
            return
        if len(self.connections(peer)) < self._streams(peer):
            pair.task = self._loop.create_task(self._dial(peer, pair))

    def byte_counts(self) -> dict[PeerId, tuple[int, int]]:
        """Per peer: bytes (sent, received) on bulk connections since the start."""
        counts = dict(self._past_bytes)
        for conn in self._used_at:
            sent, received = counts.get(conn.peer, (0, 0))
            counts[conn.peer] = (sent + conn.sent_bytes, received + conn.received_bytes)
        return counts

    def received_bytes(self, peer: PeerId) -> int:
        """On the bulk connections to ``peer`` that there are at the moment."""
        pair = self._pairs.get(peer)
        return sum(conn.received_bytes for conn in pair.connections) if pair else 0

    # Making connections -----------------------------------------------------------------------

    def _make_room(self) -> bool:
        """True if one more connection is allowed; ends the idle one that was used longest ago."""
        alive = [conn for conn in self._used_at if conn.alive]
        if len(alive) + self._making < limits.BULK_CONNECTIONS_MAX:
            return True
        idle = [c for c in alive if c.idle and not self._users.wants_bulk(c.peer)]
        if not idle:
            return False
        self.evicted += 1
        min(idle, key=lambda c: self._used_at[c]).abandon()
        return True

    @contextlib.contextmanager
    def _slot(self) -> Iterator[None]:
        """Keeps the room that ``_make_room`` found while a connection is made."""
        self._making += 1
        try:
            yield
        finally:
            self._making -= 1

    async def _dial(self, peer: PeerId, pair: _Pair) -> None:
        failures = 0
        while self._users.wants_bulk(peer) and self._pairs.get(peer) is pair:
            if len(self.connections(peer)) >= self._streams(peer):
                break
            if not self._make_room():
                await asyncio.sleep(_DIAL_PAUSE_S)  # all are busy: wait for one to become idle
                continue
            try:
                with self._slot():
                    await self._dial_once(peer, pair)
            except (OSError, PeerFault, TimeoutError):
                failures += 1
                if failures == _DIAL_ATTEMPTS:
                    pair.task = None
                    self._users.no_bulk(peer)
                    return
                await asyncio.sleep(_DIAL_PAUSE_S * failures)
        pair.task = None

    async def _dial_once(self, peer: PeerId, pair: _Pair) -> None:
        assert pair.one_more is not None
        with contextlib.ExitStack() as stack:
            async with asyncio.timeout(limits.HANDSHAKE_TIMEOUT_S):
                sock = stack.enter_context(await pair.one_more())
                self._count(tune(sock, bulk=True))
                nonce = self._entropy(bulklink.NONCE_BYTES)
                opening = bulklink.PREFACE + bulklink.link_tag(pair.secret) + nonce
                await self._loop.sock_sendall(sock, opening)
                answer = await receive_exactly(self._loop, sock, bulklink.ANSWER_BYTES)
                theirs = answer[: bulklink.NONCE_BYTES]
                keys = BulkKeys(pair.secret, nonce, theirs, initiator=True)
                keys.check(answer[bulklink.NONCE_BYTES :])
                await self._loop.sock_sendall(sock, keys.prove())
            stack.pop_all()
            self._add(peer, pair, sock, keys, nonce)

    async def accept(self, sock: socket.socket) -> None:
        """Take a connection whose preface was a bulk one; closes it if it proves nothing."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(sock)
            self._count(tune(sock, bulk=True))
            try:
                async with asyncio.timeout(limits.HANDSHAKE_TIMEOUT_S):
                    rest = bulklink.OPENING_BYTES - len(bulklink.PREFACE)
                    opening = await receive_exactly(self._loop, sock, rest)
                    peer = self._by_tag.get(opening[: bulklink.LINK_TAG_BYTES])
                    if peer is None or not self._make_room():
                        self.refused += 1
                        return
                    stack.enter_context(self._slot())
                    pair = self._pairs[peer]
                    nonce = self._entropy(bulklink.NONCE_BYTES)
                    theirs = opening[bulklink.LINK_TAG_BYTES :]
                    keys = BulkKeys(pair.secret, theirs, nonce, initiator=False)
                    await self._loop.sock_sendall(sock, nonce + keys.prove())
                    keys.check(await receive_exactly(self._loop, sock, TAG_BYTES))
            except (OSError, PeerFault, TimeoutError):
                self.refused += 1
                return
            if self._pairs.get(peer) is pair:
                # The pool owns a duplicate: the stack closes the original and frees the slot.
                self._add(peer, pair, sock.dup(), keys, theirs)

    def _add(
        self, peer: PeerId, pair: _Pair, sock: socket.socket, keys: BulkKeys, name: bytes
    ) -> None:
        conn = self._pool.add(sock, peer, keys, self, name)
        pair.connections.append(conn)
        self._used_at[conn] = self._loop.time()
        self._users.bulk_up(conn)

    def _count(self, congestion: str) -> None:
        self.congestion[congestion] = self.congestion.get(congestion, 0) + 1

    # From pool threads ------------------------------------------------------------------------

    def begin(self, conn: BulkConnection, header: Header) -> memoryview | None:
        """See ``bulk.Sink``."""
        return self._users.begin(conn, header)

    def end(self, conn: BulkConnection, header: Header, ok: bool) -> None:
        """See ``bulk.Sink``."""
        self._users.end(conn, header, ok)

    def closed(self, conn: BulkConnection, fault: PeerFault | None) -> None:
        """See ``bulk.Sink``."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._closed, conn, fault)

    def _closed(self, conn: BulkConnection, fault: PeerFault | None) -> None:
        self._used_at.pop(conn, None)
        sent, received = self._past_bytes.get(conn.peer, (0, 0))
        self._past_bytes[conn.peer] = (sent + conn.sent_bytes, received + conn.received_bytes)
        pair = self._pairs.get(conn.peer)
        if pair is not None and conn in pair.connections:
            pair.connections.remove(conn)
            pair.past.append(conn.name)
        self._users.bulk_lost(conn, fault)
        if self._users.wants_bulk(conn.peer):
            # After a pause, or a side that accepts and closes again would make a busy loop.
            self._loop.call_later(_DIAL_PAUSE_S, self.need, conn.peer)
