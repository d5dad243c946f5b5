"""Where peers may be dialled, when, and what waits for them meanwhile.

A wish for a peer (``want``, ``queue``) starts a dial of its addresses in turn. After a failure the
next dial waits, twice as long each time, with jitter; it comes by itself as long as somebody has
asked for the peer lately. What waits is bounded and dropped when the dial fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from swarmtrain_peer.admission import MEANINGS
from swarmtrain_peer.link import DialFailed
from swarmtrain_protocols import limits
from swarmtrain_protocols.addresses import split_address
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.messages import Message

_HOPELESS = ("wrong_run", "version", *MEANINGS)
"""Refusals that soon asking again will not change: the longest pause at once."""


@dataclass(slots=True)
class _Target:
    addresses: list[str] = field(default_factory=list)
    pending: deque[Message] = field(default_factory=deque)
    wanted_until: float = 0.0
    failures: int = 0
    not_before: float = 0.0
    task: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None


class Dialler:
    """``dial(peer, address)`` makes the link or raises DialFailed; ``failed`` hears the last."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        rng: random.Random,
        dial: Callable[[PeerId | None, str], Awaitable[PeerId]],
        failed: Callable[[PeerId, str, DialFailed], None],
    ) -> None:
        self._loop = loop
        self._rng = rng
        self._dial = dial
        self._failed = failed
        self._targets: dict[PeerId, _Target] = {}
        self._slots = asyncio.Semaphore(limits.DIALS_IN_FLIGHT_MAX)
        self._closed = False

    def learn(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """New addresses first; malformed ones and those over the bound are dropped."""
        good: list[str] = []
        for address in addresses:
            with contextlib.suppress(ValueError):  # said by others: nothing of ours is wrong
                split_address(address)
                good.append(address)
        if peer not in self._targets:
            self._make_room()
        target = self._targets.setdefault(peer, _Target())
        merged = list(dict.fromkeys([*good, *target.addresses]))
        target.addresses = merged[: limits.ADDRESSES_PER_PEER_MAX]

    def forget(self, peer: PeerId) -> None:
        """It cannot be dialled any more, as it says."""
        if target := self._targets.get(peer):
            target.addresses.clear()

    def _make_room(self) -> None:
        """Forget somebody whom nobody waits for; those whose last dial failed go first."""
        if len(self._targets) < limits.DIAL_TARGETS_MAX:
            return
        idle = (p for p, t in self._targets.items() if not (t.task or t.timer or t.pending))
        gone = max(idle, key=lambda p: self._targets[p].failures > 0, default=None)
        if gone is not None:
            del self._targets[gone]

    def addresses(self, peer: PeerId) -> list[str]:
        """Known addresses, best first."""
        target = self._targets.get(peer)
        return list(target.addresses) if target else []

    def pause_s(self, peer: PeerId) -> float:
        """Seconds until the next dial may start; 0 if it may now."""
        target = self._targets.get(peer)
        return max(0.0, target.not_before - self._loop.time()) if target else 0.0

    def want(self, peer: PeerId) -> bool:
        """Dial now, or when the pause is over; False if no address is known."""
        target = self._targets.get(peer)
        if target is None or not target.addresses or self._closed:
            return False
        now = self._loop.time()
        target.wanted_until = now + limits.DIAL_DEMAND_S
        if target.task is None and target.timer is None:
            if now >= target.not_before:
                target.task = self._loop.create_task(self._run(peer, target))
            else:
                target.timer = self._loop.call_at(target.not_before, self._retry, peer, target)
        return True

    def queue(self, peer: PeerId, message: Message) -> bool:
        """Want the peer and keep a message for it; False if that cannot be, or not soon."""
        if not self.want(peer):
            return False
        target = self._targets[peer]
        if target.task is None or len(target.pending) >= limits.MESSAGES_PENDING_PER_PEER_MAX:
            return False
        target.pending.append(message)
        return True

    def opened(self, peer: PeerId) -> list[Message]:
        """A link is open, whoever made it: returns what waited."""
        target = self._targets.get(peer)
        if target is None:
            return []
        target.failures = 0
        target.not_before = 0.0
        if target.timer is not None:
            target.timer.cancel()
            target.timer = None
        waiting = list(target.pending)
        target.pending.clear()
        return waiting

    def forget_wish(self, peer: PeerId) -> None:
        """No retry by itself any more."""
        if target := self._targets.get(peer):
            target.wanted_until = 0.0

    def close(self) -> None:
        """Cancel all dials."""
        self._closed = True
        for target in self._targets.values():
            if target.timer is not None:
                target.timer.cancel()
            if target.task is not None:
                target.task.cancel()

    async def open(self, address: str) -> socket.socket:
        """A connected, non-blocking socket. Raises DialFailed."""
        try:
            host, port = split_address(address)
        except ValueError as error:
            raise DialFailed("unreachable", f"{address}: {error}") from None
        try:
            async with asyncio.timeout(limits.DIAL_TIMEOUT_S):
                return await self._connect(host, port)
        except TimeoutError:
            raise DialFailed("timeout", f"{address} does not answer") from None
        except OSError as error:
            raise DialFailed("unreachable", f"{address}: {error.strerror or error}") from None

    async def _connect(self, host: str, port: int) -> socket.socket:
        last: OSError = OSError("the name has no address")
        found = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, address in found:
            with contextlib.ExitStack() as stack:
                sock = stack.enter_context(socket.socket(family, kind, protocol))
                sock.setblocking(False)
                try:
                    await self._loop.sock_connect(sock, address)
                except OSError as error:
                    last = error
                    continue
                stack.pop_all()
                return sock
        raise last

    async def _run(self, peer: PeerId, target: _Target) -> None:
        last = DialFailed("unreachable", "no address")
        where = ""
        try:
            async with self._slots:
                for where in list(target.addresses):
                    try:
                        await self._dial(peer, where)
                        return
                    except DialFailed as failed:
                        last = failed
                        if failed.code in _HOPELESS:
                            break
        finally:
            target.task = None
        self._gave_up(peer, target, where, last)

    def _gave_up(self, peer: PeerId, target: _Target, where: str, last: DialFailed) -> None:
        target.failures += 1
        pause_s = min(
            limits.DIAL_BACKOFF_S_MAX, limits.DIAL_BACKOFF_S_MIN * 2 ** min(target.failures, 16)
        )
        if last.code in _HOPELESS:
            pause_s = limits.DIAL_BACKOFF_S_MAX
        now = self._loop.time()
        target.not_before = now + pause_s * self._rng.uniform(0.5, 1.0)
        target.pending.clear()
        if target.wanted_until > target.not_before and not self._closed:
            target.timer = self._loop.call_at(target.not_before, self._retry, peer, target)
        self._failed(peer, where, last)

    def _retry(self, peer: PeerId, target: _Target) -> None:
        target.timer = None
        if target.task is None and self._loop.time() < target.wanted_until:
            target.task = self._loop.create_task(self._run(peer, target))
