"""Transports on loopback for tests: every event is recorded and can be waited for."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from swarmtrain_peer.transport import Transport
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.identity import Ed25519Keyring
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.messages.session import Hello, Refused

HELLO = Hello(version=1, run=b"r" * 32, name="test", listen=())
WAIT_S = 10.0


class Node:
    """One transport with its recorder; use ``async with``."""

    def __init__(
        self,
        seed: int = 0,
        *,
        admit: Callable[[PeerId, Hello], Refused | None] = lambda peer, hello: None,
        down_bytes_per_s: int = 0,
        **hello: Any,
    ) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.answers: list[tuple[PeerId, float]] = []
        self.blobs: dict[bytes, Blob] = {}
        self.history: dict[bytes, None] = {}
        """Roots that make way for others."""
        self.sent_bytes: dict[bytes, int] = {}
        self.leaves: tuple[bytes, ...] = ()
        """Of the newest fetch that was done."""
        self._changed = asyncio.Event()
        self.address = ""
        self.transport = Transport(
            keyring=Ed25519Keyring(seed.to_bytes(32, "big") if seed else os.urandom(32)),
            static_key=os.urandom(32),
            entropy=os.urandom,
            hello=lambda: msgspec.structs.replace(HELLO, **hello),
            admit=admit,
            handler=self,
            provide=self.blobs.get,
            threads=2,
            caps_bytes_per_s=(0, down_bytes_per_s),
            yields=lambda root: root in self.history,
            rng=random.Random(seed),
        )
        self.id = self.transport.peer_id

    async def __aenter__(self) -> Node:
        self.address = await self.transport.start("127.0.0.1:0")
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.transport.close()

    async def join(self, other: Node) -> None:
        """Dial the other and wait until both sides see the link."""
        assert await self.transport.connect_address(other.address, WAIT_S) == other.id
        await other.until("connected", self.id)

    def hold(self, blob: Blob) -> Blob:
        """Serve ``blob``."""
        self.blobs[blob.root] = blob
        return blob

    def fetch(
        self,
        ticket: int,
        other: Node,
        blob: Blob,
        first: int = 0,
        count: int | None = None,
        timeout_s: float = WAIT_S,
    ) -> list[bytearray]:
        """Begin a fetch into fresh buffers, which are returned."""
        last = len(blob.chunks) if count is None else first + count
        buffers = [bytearray(chunk.nbytes) for chunk in blob.chunks[first:last]]
        views = [memoryview(buffer) for buffer in buffers]
        self.transport.fetch(ticket, other.id, blob.root, first, len(blob.chunks), views, timeout_s)
        return buffers

    async def until(self, *want: Any) -> tuple[Any, ...]:
        """Wait for an event that begins with ``want``, take it out and return it."""
        try:
            async with asyncio.timeout(WAIT_S):
                while True:
                    for event in self.events:
                        if event[: len(want)] == want:
                            self.events.remove(event)
                            return event
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"no {want}, only {self.events}") from None

    async def bulk_flows(self, nbytes: int) -> None:
        """Wait until that many more bytes than now have come over bulk connections."""
        start = self.transport.stats["bulk_received_bytes"]
        async with asyncio.timeout(WAIT_S):
            while True:
                await asyncio.sleep(0)
                if self.transport.stats["bulk_received_bytes"] > start + nbytes:
                    return

    def saw(self, *want: Any) -> bool:
        """An event that begins with ``want`` is there."""
        return any(event[: len(want)] == want for event in self.events)

    def _add(self, *event: Any) -> None:
        self.events.append(event)
        self._changed.set()

    def connected(self, peer: PeerId, hello: Hello, outgoing: bool) -> None:
        self._add("connected", peer, outgoing, hello)

    def answered(self, peer: PeerId, rtt_s: float) -> None:
        self.answers.append((peer, rtt_s))

    def disconnected(self, peer: PeerId, code: str, reason: str) -> None:
        self._add("disconnected", peer, code, reason)

    def message(self, peer: PeerId, message: Message) -> None:
        self._add("message", peer, message)

    def refused(self, address: str, peer: PeerId | None, code: str, reason: str) -> None:
        self._add("refused", code, peer, address, reason)

    def turned_away(self, address: str, peer: PeerId | None, code: str, reason: str) -> None:
        self._add("refused", code, peer, address, reason)

    def sent(self, root: bytes, nbytes: int, begin_s: float) -> None:
        self.sent_bytes[root] = self.sent_bytes.get(root, 0) + nbytes

    def peer_fault(self, peer: PeerId | None, code: str, why: str) -> None:
        self._add("fault", peer, code, why)

    def fetched(self, ticket: int) -> None:
        self.leaves = self.transport.proven_leaves
        self._add("fetched", ticket)

    def fetch_failed(self, ticket: int, reason: str) -> None:
        self._add("failed", ticket, reason)

    def broken(self, error: BaseException) -> None:
        self._add("broken", error)


def blob_of(*sizes: int, seed: int = 1) -> Blob:
    """A blob with random chunks of these sizes."""
    rng = random.Random(seed)
    return Blob.of([rng.randbytes(size) for size in sizes])


def same(buffers: Sequence[bytearray], blob: Blob, first: int = 0) -> bool:
    """The buffers hold the blob's chunks from ``first`` on."""
    return all(b == c for b, c in zip(buffers, blob.chunks[first:], strict=False))
