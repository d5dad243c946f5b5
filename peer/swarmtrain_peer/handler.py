"""What the layers above the transport and the driver hear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from swarmtrain_protocols.core import Effect, PeerId
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.messages.pipeline import HopReply, HopRequest
from swarmtrain_protocols.messages.session import Hello


class TransportHandler(Protocol):
    """``transport.Transport`` calls it, on the loop thread."""

    def connected(self, peer: PeerId, hello: Hello, outgoing: bool) -> None: ...

    def disconnected(self, peer: PeerId, code: str, reason: str) -> None: ...

    def answered(self, peer: PeerId, rtt_s: float) -> None:
        """A ping came back."""

    def message(self, peer: PeerId, message: Message) -> None:
        """Everything except session and fetch messages."""

    def refused(self, address: str, peer: PeerId | None, code: str, reason: str) -> None:
        """A dial of this site failed or was refused, by either side."""

    def turned_away(self, address: str, peer: PeerId | None, code: str, reason: str) -> None:
        """Somebody who dialled this site was refused."""

    def peer_fault(self, peer: PeerId | None, code: str, why: str) -> None: ...

    def fetched(self, ticket: int) -> None: ...

    def fetch_failed(self, ticket: int, reason: str) -> None:
        """``reason``: refused:<code>, timeout, disconnected or corrupt."""

    def sent(self, root: bytes, nbytes: int, begin_s: float) -> None: ...

    def broken(self, error: BaseException) -> None:
        """A thread of the transport has ended by an error of this program."""


class Guest(Protocol):
    """Who else fetches, with tickets of ``GUEST_TICKETS``."""

    def fetched(self, ticket: int, leaves: Sequence[bytes]) -> None: ...

    def fetch_failed(self, ticket: int, reason: str) -> None: ...


class Stages(Protocol):
    """Who carries out the effects of a pipeline (``stage_desk.StageDesk``)."""

    def execute(self, effect: Effect) -> bool: ...

    def arrived(self, peer: PeerId, message: HopRequest | HopReply) -> None: ...

    def fetched(self, ticket: int, leaves: Sequence[bytes]) -> None: ...

    def fetch_failed(self, ticket: int, reason: str) -> None: ...
