"""One control connection: an asyncio protocol around a ``SessionCore``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from swarmtrain_peer.admission import MEANINGS
from swarmtrain_peer.bulk import BulkPool
from swarmtrain_peer.sockets import address_of
from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId, short_id
from swarmtrain_protocols.errors import (
    NoPeerReachable,
    NotAuthorised,
    RunMismatch,
    SwarmError,
    VersionMismatch,
)
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.session import SessionCore
from swarmtrain_protocols.session_events import Closed, SessionEvent

_ERRORS: dict[str, tuple[type[SwarmError], str]] = {
    "wrong_run": (RunMismatch, "use a ticket of the run that this address serves"),
    "version": (VersionMismatch, "install the same release on both sides"),
    **{code: (NotAuthorised, todo) for code, (_, todo) in MEANINGS.items()},
}


class DialFailed(Exception):
    """Why a connection did not open; ``code`` is unreachable, timeout or one of ``Refused``."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason

    def to_error(self, address: str) -> SwarmError:
        """The typed error for whoever asked for this address by hand."""
        kind, todo = _ERRORS.get(self.code, (NoPeerReachable, "check the address and the network"))
        return kind(f"cannot join through {address}", f"{self.code}: {self.reason}", todo)


class Link(asyncio.Protocol):
    """Bytes in, events out; writes at most what the socket takes, so that messages can overtake.

    ``outcome`` is for whoever waits for the link: the peer's identity once open, or ``DialFailed``.
    ``gone`` is set once the connection is closed.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        session: SessionCore,
        on_event: Callable[[Link, SessionEvent], None],
        address: str,
        pool: BulkPool,
    ) -> None:
        self.session = session
        self.address = address
        self._up, self._down = pool.up, pool.down
        self.remote: tuple[Any, ...] = ()
        self.via: PeerId | None = None
        """The member that relays it; None: direct."""
        self.outcome: asyncio.Future[PeerId] = loop.create_future()
        self.gone: asyncio.Future[None] = loop.create_future()
        self.sent_bytes = 0
        self.received_bytes = 0
        self.answers = 0
        """Pings of ours that were answered."""
        self._loop = loop
        self._on_event = on_event
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._flush_soon = False
        self._writable = True
        self._closing = False
        self._followed = False

    @property
    def peer(self) -> PeerId | None:
        return self.session.peer

    @property
    def address_now(self) -> str:
        """``host:port`` of the socket at the other end."""
        return address_of(self.remote)

    @property
    def initiator(self) -> bool:
        return self.session.initiator

    def send(self, message: Message, payload: bytes | memoryview = b"") -> bool:
        """Queue a message; what is sent in one turn of the loop leaves in one write."""
        sent = self.session.send(message, payload)
        self.wake()
        return sent

    def wake(self) -> None:
        """The session was called from outside: deliver its events and bytes soon."""
        if not self._flush_soon:
            self._flush_soon = True
            self._loop.call_soon(self._woken)

    def follow(self, other: asyncio.Future[PeerId], reason: str) -> None:
        """Give this dial up in favour of another connection to the same peer."""

        def settle(done: asyncio.Future[PeerId]) -> None:
            if self.outcome.done():
                return
            error = None if done.cancelled() else done.exception()
            if error is not None:
                self.outcome.set_exception(error)
                self.outcome.exception()  # as in ``fail``
            elif not done.cancelled():
                self.outcome.set_result(done.result())

        self._followed = True
        other.add_done_callback(settle)
        self.session.close(self._loop.time(), "superseded", reason)
        self.wake()

    def fail(self, code: str, reason: str) -> None:
        """Settle ``outcome`` unless it is settled."""
        if not self.outcome.done():
            self.outcome.set_exception(DialFailed(code, reason))
            self.outcome.exception()  # not every dial has somebody who waits for it

    # asyncio.Protocol -------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=limits.SEND_BATCH_BYTES)
        self.remote = self._transport.get_extra_info("peername") or ()
        if not self.address and self.remote:
            self.address = address_of(self.remote)
        self._woken()

    def data_received(self, data: bytes) -> None:
        self.received_bytes += len(data)
        self._down.charge(len(data))
        self.session.receive_bytes(self._loop.time(), data)
        self._pump()

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self._writable = False
        if self._timer is not None:
            self._timer.cancel()
        why = str(exc) if exc else "the connection ended"
        self.session.lost(self._loop.time(), why)
        self._deliver()
        if not self.gone.done():
            self.gone.set_result(None)

    # Internals --------------------------------------------------------------------------------

    def _woken(self) -> None:
        self._flush_soon = False
        self._pump()

    def _pump(self) -> None:
        # What is said on this link while its messages are delivered leaves right behind them.
        soon, self._flush_soon = self._flush_soon, True
        try:
            self._deliver()
        finally:
            self._flush_soon = soon
        self._flush()
        self._rearm()

    def _deliver(self) -> None:
        while events := self.session.events():  # taking one may cause another
            for event in events:
                self._on_event(self, event)
                if isinstance(event, Closed) and not self._followed:
                    self.fail(event.code, event.reason)

    def _flush(self) -> None:
        transport = self._transport
        if transport is None:
            return
        while self._writable and not transport.is_closing():
            data = self.session.data_to_send()
            if data:
                self.sent_bytes += len(data)
                self._up.charge(len(data))
                transport.write(data)
            if len(data) < limits.SEND_BATCH_BYTES:
                break  # nothing else may be sent now
        if self.session.closed and not self._closing:
            self._closing = True
            transport.close()  # after what is buffered
            self._loop.call_later(limits.GOODBYE_TIMEOUT_S, transport.abort)

    def _rearm(self) -> None:
        deadline = self.session.deadline()
        if self.session.closed:
            return
        if self._timer is not None:
            if self._timer_at <= deadline:
                return  # an armed timer may be early, and is set again then; never late
            self._timer.cancel()
        self._timer, self._timer_at = self._loop.call_at(deadline, self._timed_out), deadline

    def _timed_out(self) -> None:
        self._timer = None
        now = self._loop.time()
        if now >= self.session.deadline():
            self.session.tick(now)
        self._pump()

    def __repr__(self) -> str:
        peer = short_id(self.peer) if self.peer else "?"
        return f"Link({peer} at {self.address})"
