"""Activations and gradients on their way: small ones travel in messages, large ones are fetched.

A tensor is named by the Merkle root of its bytes in chunks of 1 MiB, so what a driver kept is what
every retry carries, and a worker that recomputes a forward sees the same bytes. Everything here is
forgotten when its step is over; the bytes in store never exceed a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.messages.pipeline import HopReply, HopRequest, Tensor

CHUNK_BYTES = limits.FRAME_BYTES_BULK_MAX
FETCH_TIMEOUT_S = 120.0
"""The cores have shorter deadlines; this one bounds a transfer that everybody has forgotten."""
FIRST_TICKET = -(1 << 40)
"""Tickets of tensors lie below this; those of the cores are positive."""


def _chunks(data: bytes | bytearray | memoryview) -> list[memoryview]:
    view = memoryview(data).cast("B")
    starts = range(0, max(1, view.nbytes), CHUNK_BYTES)
    return [view[start : start + CHUNK_BYTES] for start in starts]


def blob_of(data: bytes | bytearray | memoryview) -> Blob:
    """The bytes of a tensor as a blob of whole chunks; hashes them."""
    return Blob.of(_chunks(data))


class Fetcher(Protocol):
    """What is needed of ``transport.Transport``."""

    def fetch(
        self,
        ticket: int,
        peer: PeerId,
        root: bytes,
        first: int,
        total_chunks: int,
        destinations: list[memoryview],
        timeout_s: float,
    ) -> None: ...


class Registry(Protocol):
    """What is needed of ``dataplane.DataPlane``: others fetch what is registered."""

    def register(self, blob: Blob) -> None: ...

    def drop(self, root: bytes) -> None: ...


@dataclass(slots=True)
class _Kept:
    blob: Blob
    step: int
    data: bytes | bytearray


@dataclass(slots=True)
class _Wanted:
    """A message that waits for its tensors."""

    missing: dict[bytes, None]
    go_on: Callable[[], None]
    failed: Callable[[str], None]
    step: int
    asked: dict[int, tuple[bytes, bytearray]] = field(default_factory=dict)


class TensorStore:
    """Large tensors of one site, by root. Use from the event loop's thread only.

    Args:
        bytes_max: of all tensors kept and under way; what does not fit is refused.
        clock: stands for the step, where there are none: see ``over``.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        registry: Registry,
        bytes_max: int,
        clock: Callable[[], int] | None = None,
    ) -> None:
        self._fetcher = fetcher
        self._registry = registry
        self._bytes_max = bytes_max
        self._clock = clock
        self._kept: dict[bytes, _Kept] = {}
        self._wanted: dict[int, _Wanted] = {}
        self._ticket = FIRST_TICKET
        self.nbytes = 0

    def keep(self, data: bytes | bytearray, blob: Blob, step: int) -> Tensor:
        """Name a tensor made here; ``blob`` is ``blob_of(data)``, hashed where there was time.

        What is made is kept, beyond the budget if need be: a gradient may be in a sum already, and
        its reply must not get lost. Ask ``has_room`` before anything is made.
        """
        if not len(data):
            return Tensor(bytes(32), 0)
        if len(data) <= limits.HOP_INLINE_BYTES_MAX:
            return Tensor(blob.root, len(data), bytes(data))
        self._put(blob.root, _Kept(blob, step, data), made=True)
        return Tensor(blob.root, len(data))

    @property
    def has_room(self) -> bool:
        """Whether more may be made here: the budget is not used up."""
        return self.nbytes < self._bytes_max

    def serve(self, tensor: Tensor, step: int) -> None:
        """A message will name a tensor by its root alone that came with its bytes.

        Raises:
            LocalProtocolError: the budget is used up.
        """
        self._put(tensor.root, _Kept(blob_of(tensor.data), step, tensor.data))

    def data_of(self, tensor: Tensor) -> bytes | bytearray:
        """The bytes of a tensor that came inline, was kept or was fetched.

        Raises:
            LocalProtocolError: it is not here (any more).
        """
        if tensor.data or not tensor.nbytes:
            return tensor.data
        kept = self._kept.get(tensor.root)
        if kept is None:
            raise LocalProtocolError("a tensor is gone", tensor.root.hex()[:8])
        return kept.data

    def resolve(
        self,
        peer: PeerId,
        message: HopRequest | HopReply,
        go_on: Callable[[], None],
        failed: Callable[[str], None],
    ) -> None:
        """Have all tensors of ``message`` here, fetched from ``peer``, then call ``go_on``.

        ``failed`` gets the reason if one cannot be had.
        """
        tensors = (
            (message.inputs, message.gradient)
            if isinstance(message, HopRequest)
            else (message.output,)
        )
        lacking = {t.root: t for t in tensors if t.nbytes and not t.data}
        lacking = {root: t for root, t in lacking.items() if root not in self._kept}
        if not lacking:
            go_on()
            return
        wanted = _Wanted(dict.fromkeys(lacking), go_on, failed, message.id.step)
        if sum(t.nbytes for t in lacking.values()) + self.nbytes > self._bytes_max:
            failed("no room for tensors")
            return
        for tensor in lacking.values():
            self._ask(peer, tensor, wanted)

    def fetched(self, ticket: int, leaves: Sequence[bytes]) -> None:
        """The transport has put the bytes of ``ticket`` in place, verified by these leaf hashes."""
        wanted = self._wanted.pop(ticket, None)
        if wanted is None:
            return
        root, data = wanted.asked.pop(ticket)
        self.nbytes -= len(data)
        self._put(root, _Kept(Blob(_chunks(data), leaves), wanted.step, data))
        wanted.missing.pop(root, None)
        if not wanted.missing:
            wanted.go_on()

    def fetch_failed(self, ticket: int, reason: str) -> None:
        wanted = self._wanted.pop(ticket, None)
        if wanted is None:
            return
        for other, (_, data) in wanted.asked.items():
            self._wanted.pop(other, None)
            self.nbytes -= len(data)
        wanted.failed(reason)

    def over(self, step: int) -> None:
        """Forget the tensors of ``step`` and of steps before it."""
        for root in [r for r, kept in self._kept.items() if kept.step <= step]:
            self.nbytes -= len(self._kept.pop(root).data)
            self._registry.drop(root)

    # -- inside ----------------------------------------------------------------------------

    def _put(self, root: bytes, kept: _Kept, *, made: bool = False) -> None:
        if self._clock is not None:
            kept.step = self._clock()
        known = self._kept.get(root)
        if known is not None:
            known.step = max(known.step, kept.step)
            return
        if not made and self.nbytes + len(kept.data) > self._bytes_max:
            raise LocalProtocolError("no room for tensors", f"{self._bytes_max} bytes are in use")
        self.nbytes += len(kept.data)
        self._kept[root] = kept
        self._registry.register(kept.blob)

    def _ask(self, peer: PeerId, tensor: Tensor, wanted: _Wanted) -> None:
        data = bytearray(tensor.nbytes)
        self.nbytes += len(data)
        self._ticket -= 1
        wanted.asked[self._ticket] = (tensor.root, data)
        self._wanted[self._ticket] = wanted
        places = _chunks(data)
        self._fetcher.fetch(
            self._ticket, peer, tensor.root, 0, len(places), places, FETCH_TIMEOUT_S
        )
