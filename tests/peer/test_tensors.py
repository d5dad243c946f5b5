"""Large activations: named by root, fetched once, forgotten with their step."""

from __future__ import annotations

import pytest

from swarmtrain_peer.tensors import CHUNK_BYTES, TensorStore, blob_of
from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.messages.pipeline import EMPTY, HopId, HopReply, HopRequest, Tensor

PEER = PeerId(bytes(32))
LARGE = bytes(range(256)) * (CHUNK_BYTES // 256) + b"tail"


class Fetcher:
    """Remembers what was asked for; ``deliver`` puts the bytes in place as the transport does."""

    def __init__(self) -> None:
        self.asked: dict[int, tuple[bytes, list[memoryview]]] = {}

    def fetch(self, ticket, peer, root, first, total_chunks, destinations, timeout_s):
        assert first == 0 and total_chunks == len(destinations) and ticket < 0
        self.asked[ticket] = (root, destinations)

    def deliver(self, ticket: int, data: bytes) -> None:
        at = 0
        for place in self.asked.pop(ticket)[1]:
            place[:] = data[at : at + place.nbytes]
            at += place.nbytes


class Registry:
    """What others can fetch."""

    def __init__(self) -> None:
        self.blobs: dict[bytes, Blob] = {}

    def register(self, blob: Blob) -> None:
        self.blobs[blob.root] = blob

    def drop(self, root: bytes) -> None:
        del self.blobs[root]


REGISTRY = Registry()


def make(bytes_max: int = 1 << 24) -> tuple[TensorStore, Fetcher]:
    fetcher = Fetcher()
    REGISTRY.blobs.clear()
    return TensorStore(fetcher, REGISTRY, bytes_max), fetcher


def request(inputs: Tensor, gradient: Tensor = EMPTY, step: int = 3) -> HopRequest:
    return HopRequest(
        HopId(0, step, 0, 1, False, 1), "forward", step, 0, (0, 1, 2), inputs, gradient
    )


def reference(data: bytes) -> Tensor:
    return Tensor(blob_of(data).root, len(data))


def test_small_tensors_travel_in_the_message() -> None:
    store, fetcher = make()
    small = b"x" * limits.HOP_INLINE_BYTES_MAX
    tensor = store.keep(small, blob_of(small), 3)
    assert tensor.data == small and store.nbytes == 0
    said: list[str] = []
    store.resolve(PEER, request(tensor), lambda: said.append("go"), said.append)
    assert said == ["go"] and not fetcher.asked
    assert store.data_of(tensor) == small
    assert store.keep(b"", blob_of(b""), 3) == EMPTY and store.data_of(EMPTY) == b""


def test_large_tensors_are_fetched_once_and_served_on() -> None:
    store, fetcher = make()
    said: list[str] = []
    other = LARGE[::-1]
    message = request(reference(LARGE), reference(other))
    store.resolve(PEER, message, lambda: said.append("go"), said.append)
    first, second = fetcher.asked
    fetcher.deliver(first, LARGE)
    store.fetched(first, blob_of(LARGE).leaves)
    assert not said, "the gradient is still on its way"
    fetcher.deliver(second, other)
    store.fetched(second, blob_of(other).leaves)
    assert said == ["go"]
    assert store.data_of(message.inputs) == LARGE and store.data_of(message.gradient) == other
    blob = REGISTRY.blobs.get(message.inputs.root)
    assert blob is not None and b"".join(blob.chunks) == LARGE
    assert store.nbytes == 2 * len(LARGE)
    store.resolve(PEER, message, lambda: said.append("again"), said.append)
    assert said == ["go", "again"] and not fetcher.asked


def test_a_failed_fetch_is_told_once_and_its_room_is_free_again() -> None:
    store, fetcher = make()
    said: list[str] = []
    message = request(reference(LARGE), reference(LARGE[::-1]))
    store.resolve(PEER, message, lambda: said.append("go"), said.append)
    first, second = fetcher.asked
    store.fetch_failed(first, "disconnected")
    store.fetch_failed(second, "disconnected")
    store.fetched(second, ())
    assert said == ["disconnected"]
    assert store.nbytes == 0


def test_tensors_go_with_their_step() -> None:
    store, _ = make()
    old = store.keep(LARGE, blob_of(LARGE), 3)
    new = store.keep(LARGE[::-1], blob_of(LARGE[::-1]), 4)
    store.over(3)
    with pytest.raises(LocalProtocolError, match="gone"):
        store.data_of(old)
    assert store.data_of(new) and old.root not in REGISTRY.blobs
    assert store.nbytes == len(LARGE)


def test_the_same_bytes_in_a_later_step_live_longer() -> None:
    store, _ = make()
    tensor = store.keep(LARGE, blob_of(LARGE), 3)
    assert store.keep(LARGE, blob_of(LARGE), 5) == tensor
    store.over(4)
    assert store.data_of(tensor) == LARGE


def test_the_budget_is_reserved_before_memory_is_taken() -> None:
    store, fetcher = make(bytes_max=len(LARGE) + 10)
    store.keep(LARGE, blob_of(LARGE), 3)
    said: list[str] = []
    reply = HopReply(HopId(0, 3, 0, 1, False, 1), reference(LARGE[::-1]), 0.0, 0, 0.1)
    store.resolve(PEER, reply, lambda: said.append("go"), said.append)
    assert said == ["no room for tensors"] and not fetcher.asked
    with pytest.raises(LocalProtocolError, match="room"):
        store.serve(Tensor(blob_of(LARGE[1:]).root, len(LARGE) - 1, LARGE[1:]), 3)


def test_what_was_made_is_kept_beyond_the_budget_for_its_gradient_counts_already() -> None:
    store, _ = make(bytes_max=len(LARGE) + 10)
    store.keep(LARGE, blob_of(LARGE), 3)
    assert store.has_room
    tensor = store.keep(LARGE[::-1], blob_of(LARGE[::-1]), 4)
    assert store.data_of(tensor) == LARGE[::-1] and not store.has_room
    store.over(4)
    assert store.has_room


def test_a_tensor_that_came_inline_can_be_served_by_its_root() -> None:
    """Two tensors that fit a message one by one, but not beside each other."""
    store, _ = make()
    data = b"y" * 40_000
    inline = Tensor(blob_of(data).root, len(data), data)
    store.serve(inline, 3)
    assert bytes(REGISTRY.blobs[inline.root].chunks[0]) == data
    assert store.data_of(reference(data)) == data
    store.over(3)
    assert REGISTRY.blobs == {} and store.nbytes == 0


def test_without_steps_tensors_go_by_the_clock() -> None:
    seconds = [100]
    REGISTRY.blobs.clear()
    store = TensorStore(Fetcher(), REGISTRY, 1 << 24, lambda: seconds[0])
    old = store.keep(LARGE, blob_of(LARGE), 0)
    seconds[0] = 130
    new = store.keep(LARGE[1:], blob_of(LARGE[1:]), 0)
    store.over(100)
    assert list(REGISTRY.blobs) == [new.root] and old.root != new.root
