"""All connections of a peer process: one listener, control links, dialling, fetches.

The event loop carries control links only; bulk bytes are received, decrypted and hashed on the
threads of ``bulk.BulkPool``. All methods are called on the loop thread.
"""

from __future__ import annotations

import asyncio
import math
import random
import socket
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from swarmtrain_peer.bulk import BulkPool
from swarmtrain_peer.bulklinks import BulkLinks, OneMore
from swarmtrain_peer.bulkuse import BulkUse
from swarmtrain_peer.caps import Cap
from swarmtrain_peer.dialler import Dialler
from swarmtrain_peer.donorshare import SHARE
from swarmtrain_peer.doorway import Doorway
from swarmtrain_peer.gate import Bars
from swarmtrain_peer.handler import TransportHandler
from swarmtrain_peer.link import DialFailed, Link
from swarmtrain_peer.linktable import LinkTable
from swarmtrain_peer.serving import Serving
from swarmtrain_peer.sockets import address_of, attach, connect, fill_host, listen, tune
from swarmtrain_peer.traffic import traffic
from swarmtrain_peer.transfers import Fetches
from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.identity import Keyring
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.messages import Message, fetch
from swarmtrain_protocols.messages.session import Hello, Refused
from swarmtrain_protocols.outbox import SendBudget
from swarmtrain_protocols.session import SessionCore
from swarmtrain_protocols.session_events import (
    Closed,
    Faulted,
    Held,
    Identified,
    Opened,
    Ponged,
    Received,
    SessionEvent,
)
from swarmtrain_protocols.silence import SAMPLES_MIN

_FOR_FETCHES = (fetch.FetchAccepted, fetch.FetchRefused, fetch.FetchChunk)
_FOR_SERVING = (fetch.FetchRequest, fetch.FetchCancel)


class Transport:
    """See the module; ``start`` first, ``close`` last.

    Args:
        keyring: signs as this site.
        static_key: X25519 private key, 32 bytes, of this process.
        entropy: gives n bytes for keys and nonces.
        hello: what this side says of itself, asked for at each connection.
        admit: policy for an authenticated peer.
        handler: hears what happens.
        provide: blob of a root, None if it is not here; called on the loop thread.
        threads: of the pool for bulk connections and hashing.
        donor_share: see ``donorshare``; ``yields``: see ``serving``.
        rng: jitter of retries; seeded from ``entropy`` if not given.
    """

    def __init__(
        self,
        *,
        keyring: Keyring,
        static_key: bytes,
        entropy: Callable[[int], bytes],
        hello: Callable[[], Hello],
        admit: Callable[[PeerId, Hello], Refused | None],
        handler: TransportHandler,
        provide: Callable[[bytes], Blob | None],
        threads: int = limits.BULK_THREADS,
        caps_bytes_per_s: tuple[int, int] = (0, 0),
        donor_share: float = SHARE,
        yields: Callable[[bytes], bool] = lambda root: False,
        rng: random.Random | None = None,
    ) -> None:
        self.peer_id = keyring.peer_id
        self._keyring = keyring
        self._static_key = static_key
        self._entropy = entropy
        self._hello = hello
        self._admit = admit
        self._handler = handler
        self._provide = provide
        self._make_pool = partial(BulkPool, threads, None, caps_bytes_per_s, donor_share)
        self._yields = yields
        self._rng = rng or random.Random(int.from_bytes(entropy(8), "little"))
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: Any = None
        self._started = False
        self._closed = False
        self._counts: dict[str, int] = {}
        self._bars = Bars()
        self.no_route: Callable[[PeerId], None] = lambda peer: None
        self.open_relayed: Callable[[PeerId], Awaitable[socket.socket]] = _no_relay
        self._live: dict[Link, PeerId] = {}
        self._bulk_seen: dict[PeerId, tuple[float, int]] = {}
        self._past: dict[PeerId, tuple[int, int]] = {}

    async def start(self, listen_on: str) -> str:
        """Listen on ``host:port`` (port 0: any); returns the address that was bound.

        An empty ``listen_on`` makes outgoing links only, and returns an empty address.

        Raises:
            OSError: the address cannot be bound.
            ValueError: not an address.
        """
        self._loop = asyncio.get_running_loop()
        self._table = LinkTable(self._loop, self.peer_id, self)
        self._unsent = SendBudget()
        if listen_on:
            host, _, port = listen_on.rpartition(":")
            self._listener = await listen(self._loop, host.strip("[]"), int(port))
        told = self._loop.call_soon_threadsafe
        self._pool = self._make_pool(lambda error: told(self._handler.broken, error))
        use = BulkUse(self._table, self._handler, self._send_open, self._count)
        self._bulk = BulkLinks(self._loop, self._pool, self._entropy, use)
        self._fetches = Fetches(
            self._loop, self._pool, self._handler, self._send_for_fetch, self._bulk.need
        )
        bulk, sent = self._bulk, self._handler.sent
        self._serving = Serving(
            self._loop, self._provide, self._send_open, bulk, sent, self._yields
        )
        use.fetches, use.serving = self._fetches, self._serving
        self._dialler = Dialler(self._loop, self._rng, self._dial_link, self._dial_failed)
        answer = partial(self._make_link, False, None, "")
        self.doorway = Doorway(
            self._loop, self._table, answer, bulk.accept, self._spawn, self._count
        )
        self._started = True
        if self._listener is None:
            return ""
        self._spawn(self.doorway.accept(self._listener))
        return address_of(self._listener.getsockname())

    # Peers ------------------------------------------------------------------------------------

    def learn(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Remember where ``peer`` may be dialled, best first; empty: it can not be any more."""
        if peer != self.peer_id and addresses:
            self._dialler.learn(peer, addresses)
        elif peer != self.peer_id:
            self._dialler.forget(peer)

    def connect(self, peer: PeerId) -> None:
        """Have a link to ``peer`` if an address is known; ``connected`` or ``refused`` follows."""
        if peer != self.peer_id and peer not in self._table.links:
            self._dialler.want(peer)
            self.no_route(peer)

    async def connect_address(self, address: str, timeout_s: float) -> PeerId:
        """Dial an address whose owner is not known yet; returns who answered.

        Raises:
            NoPeerReachable, NotAuthorised, VersionMismatch, RunMismatch
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._dial_link(None, address)
        except TimeoutError:
            failed = DialFailed("timeout", f"no answer in {timeout_s:g} s")
        except DialFailed as error:
            failed = error
        self._handler.refused(address, None, failed.code, failed.reason)
        raise failed.to_error(address)

    def send(self, peer: PeerId, message: Message) -> bool:
        """Send, or dial and keep a bounded number of messages meanwhile.

        False, and counted, if there is no way: no address, a full queue, a pause between dials.
        """
        return self._send(peer, message, b"", dial=True)

    def disconnect(self, peer: PeerId, code: str, reason: str) -> None:
        """Say goodbye; ``disconnected`` follows."""
        self._dialler.forget_wish(peer)
        if link := self._table.links.get(peer):
            link.session.close(self._loop.time(), code, reason)
            link.wake()

    def connected_peers(self) -> list[PeerId]:
        """In order of their ids."""
        return sorted(self._table.links)

    def rtt_s(self, peer: PeerId) -> float | None:
        """Shortest measured round trip of the link, seconds."""
        link = self._table.links.get(peer)
        return link.session.rtt_s if link else None

    def recent_rtt_s(self, peer: PeerId) -> float | None:
        """The newest measured round trip of the link, seconds, waiting in queues included."""
        link = self._table.links.get(peer)
        return link.session.recent_rtt_s if link else None

    def measure(self, peer: PeerId) -> None:
        """Measure the round trip again, if there is a link."""
        if link := self._table.links.get(peer):
            link.session.probe(self._loop.time())
            link.wake()

    def probe(self, peer: PeerId) -> bool:
        """Ask for a sign of life; True if bulk bytes have come since it was asked for just before.

        Those fill the path on which the answer comes, and are a sign themselves.
        """
        self.measure(peer)
        now_s, nbytes = self._loop.time(), self._bulk.received_bytes(peer)
        seen_s, before = self._bulk_seen.get(peer, (-math.inf, 0))
        self._bulk_seen[peer] = now_s, nbytes
        return nbytes > before and now_s - seen_s < limits.STALL_S

    # Fetches ----------------------------------------------------------------------------------

    def fetch(
        self,
        ticket: int,
        peer: PeerId,
        root: bytes,
        first: int,
        total_chunks: int,
        destinations: Sequence[memoryview],
        timeout_s: float,
    ) -> None:
        """Fetch chunks ``first …`` of blob ``root``, one writable buffer of exact size per chunk.

        Every chunk is checked against the root before ``fetched(ticket)``. After any answer, or
        after ``cancel``, nothing writes to the buffers any more.

        Raises:
            LocalProtocolError: ticket in use, range outside of the blob, unusable buffer.
        """
        self._fetches.fetch(ticket, peer, root, first, total_chunks, destinations, timeout_s)

    def fetch_hashes(
        self,
        ticket: int,
        peer: PeerId,
        root: bytes,
        first: int,
        count: int,
        total_chunks: int,
        timeout_s: float,
    ) -> None:
        """Fetch leaf hashes alone, which ``proven_leaves`` has then; otherwise as ``fetch``."""
        fetch = self._fetches.fetch
        fetch(ticket, peer, root, first, total_chunks, (), timeout_s, hashes=count)

    def on_leaves(self, hear: Callable[[int, int, tuple[bytes, ...]], None]) -> None:
        """Have ``hear(ticket, first, leaves)`` called when hashes are proven, before the chunks."""
        self._fetches.on_leaves = hear

    @property
    def proven_leaves(self) -> tuple[bytes, ...]:
        """Within ``handler.fetched``: leaf hashes of what was fetched, so nobody hashes twice."""
        return self._fetches.proven

    def cancel(self, ticket: int) -> None:
        """Forget a fetch; no answer will come."""
        self._fetches.cancel(ticket)

    @property
    def stats(self) -> dict[str, Any]:
        """Bytes since the start, in total and per peer, control and bulk apart; counters."""
        control = dict(self._past)
        for link, peer in self._live.items():
            sent, received = control.get(peer, (0, 0))
            control[peer] = (sent + link.sent_bytes, received + link.received_bytes)
        return {
            **traffic(control, self._bulk.byte_counts()),
            "counts": dict(self._counts),
            "bulk_evicted": self._bulk.evicted,
            "bulk_refused": self._bulk.refused,
            "bulk_congestion": dict(self._bulk.congestion),
        }

    async def close(self) -> None:
        """Say goodbye to all, stop listening and end the threads."""
        if self._closed or not self._started:
            return
        self._closed = True
        self._dialler.close()
        for peer in list(self._table.links):
            self._fetches.peer_lost(peer)
        links = [*self._table.links.values(), *self._table.half_open]
        for link in links:
            link.session.close(self._loop.time(), "closing", "the peer process ends")
            link.wake()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        if gone := [link.gone for link in links if link.remote]:
            await asyncio.wait(gone, timeout=limits.GOODBYE_TIMEOUT_S)
        await self._loop.run_in_executor(None, self._pool.close)

    # Sending ----------------------------------------------------------------------------------

    def _send(
        self, peer: PeerId, message: Message, payload: bytes | memoryview, dial: bool
    ) -> bool:
        link = self._table.links.get(peer)
        if link is not None:
            sent = link.send(message, payload)
        elif dial and peer != self.peer_id and not self._closed:
            sent = self._dialler.queue(peer, message)
            self.no_route(peer)
        else:
            sent = False
        if not sent:
            self._count("send_dropped")
        return sent

    def _send_for_fetch(self, peer: PeerId, message: Message, dial: bool) -> bool:
        if not dial and peer not in self._table.links:
            return False  # a cancellation that nobody waits for: not a loss
        return self._send(peer, message, b"", dial)

    def _send_open(self, peer: PeerId, message: Message, payload: bytes | memoryview) -> bool:
        return self._send(peer, message, payload, dial=False)

    def _count(self, name: str) -> None:
        self._counts[name] = self._counts.get(name, 0) + 1

    def _count_bytes(self, link: Link) -> None:
        """The last byte of a link is sent: keep its figures, let the link go."""
        peer = self._live.pop(link)
        sent, received = self._past.get(peer, (0, 0))
        self._past[peer] = (sent + link.sent_bytes, received + link.received_bytes)

    def _spawn(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Connections ------------------------------------------------------------------------------

    def _make_link(self, initiator: bool, expect: PeerId | None, address: str) -> Link:
        session = SessionCore(
            now=self._loop.time(),
            initiator=initiator,
            keyring=self._keyring,
            static_key=self._static_key,
            ephemeral_key=self._entropy(32),
            hello=self._hello(),
            admit=self._bars.guard(self._admit, self._loop.time),
            expect=expect,
            hold=True,
            budget=self._unsent,
        )
        return Link(self._loop, session, self._on_event, address, self._pool)

    def route(self, peer: PeerId) -> Link | None:
        """The open link, for where it leads: ``remote``, ``initiator``, ``via``."""
        return self._table.links.get(peer)

    @property
    def caps(self) -> tuple[Cap, Cap]:
        """Up and down."""
        return self._pool.up, self._pool.down

    async def dial_socket(self, peer: PeerId) -> socket.socket:
        """A connection to where ``peer`` is said to listen. Raises DialFailed."""
        known = self._dialler.addresses(peer)
        return await self._dialler.open(known[0] if known else "")

    async def _dial_link(self, peer: PeerId | None, address: str) -> PeerId:
        """Dial and shake hands. Raises DialFailed."""
        return await self.greet(peer, await self._dialler.open(address), address)

    async def greet(
        self, peer: PeerId | None, sock: socket.socket, address: str, via: PeerId | None = None
    ) -> PeerId:
        """Shake hands on a connected socket, relayed by ``via`` if given. Raises DialFailed."""
        tune(sock, bulk=False)
        link = self._make_link(True, peer, address)
        link.via = via
        if peer is not None:
            if peer in self._table.links:
                sock.close()
                return peer
            self._table.dialling(peer, link)
        self._table.half_open[link] = ""
        try:
            await attach(self._loop, link, sock)
            return await asyncio.shield(link.outcome)
        finally:
            if not link.outcome.done():  # cancelled or out of time
                link.session.close(self._loop.time(), "timeout", "no answer")
                link.wake()

    def _dial_failed(self, peer: PeerId, address: str, failed: DialFailed) -> None:
        """The dialler gives up for now."""
        if peer in self._table.links:
            return
        self._handler.refused(address, peer, failed.code, failed.reason)
        self._fetches.peer_lost(peer)

    # Events of links --------------------------------------------------------------------------

    def _on_event(self, link: Link, event: SessionEvent) -> None:
        match event:
            case Received(message, payload):
                self._on_message(link, message, payload)
            case Identified(peer):
                self._table.identified(link, peer)
            case Held(peer, _):
                self._table.held(link, peer)
            case Opened(peer, hello):
                self._table.opened(link, peer, hello)
            case Ponged(nonce, rtt_s):
                self._table.ponged(link, nonce)
                link.answers += 1
                if link.answers < SAMPLES_MIN and link.session.is_open:
                    link.session.probe(self._loop.time())  # so that its delay is known at once
                if link.peer is not None and self._table.links.get(link.peer) is link:
                    self._handler.answered(link.peer, rtt_s)
            case Faulted(code, why):
                self._count(f"fault_{code}")
                if self._bars.fault(self._loop.time(), link.peer, code):
                    self._count("barred")
                self._handler.peer_fault(link.peer, code, why)
            case Closed():
                self._table.closed(link, event)

    def _on_message(self, link: Link, message: Message, payload: bytes) -> None:
        peer = link.peer
        assert peer is not None
        if isinstance(message, _FOR_FETCHES):
            self._fetches.receive(peer, message, payload)
        elif isinstance(message, _FOR_SERVING):
            self._serving.receive(peer, message)
        elif isinstance(message, fetch.BulkClosed):
            self._bulk.receive(peer, message)
        else:
            self._handler.message(peer, message)

    def link_opened(self, link: Link, peer: PeerId, hello: Hello) -> None:
        """See ``linktable.LinkUser``."""
        self._live[link] = peer
        link.gone.add_done_callback(lambda _: self._count_bytes(link))
        if link.initiator and link.via is None:
            self._dialler.learn(peer, [link.address])
        # Whoever listens on all interfaces is reached where it was just seen.
        seen = str(link.remote[0]) if link.remote and link.via is None else ""
        self._dialler.learn(peer, [fill_host(address, seen) for address in hello.listen])
        secret = link.session.bulk_secret
        assert secret is not None
        one_more: OneMore = partial(connect, self._loop, link.remote)
        if link.via is not None:
            one_more = partial(self.open_relayed, peer)
        self._bulk.peer_up(peer, secret, one_more if link.initiator else None)
        link.session.probe(self._loop.time())  # the round trip decides on the number of streams
        self._handler.connected(peer, hello, link.initiator)
        for message in self._dialler.opened(peer):
            self._send(peer, message, b"", dial=False)

    def link_closed(self, link: Link, peer: PeerId, event: Closed) -> None:
        """See ``linktable.LinkUser``."""
        self._bulk.peer_lost(peer)
        self._bulk_seen.pop(peer, None)
        self._serving.peer_lost(peer)
        self._fetches.peer_lost(peer)
        self._handler.disconnected(peer, event.code, event.reason)

    def link_refused(self, link: Link, event: Closed) -> None:
        """See ``linktable.LinkUser``."""
        self._handler.turned_away(link.address, link.peer, event.code, event.reason)


async def _no_relay(peer: PeerId) -> socket.socket:
    raise ConnectionError("nobody relays")
