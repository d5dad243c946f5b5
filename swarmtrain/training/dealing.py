"""What this trainer trains on where the data are dealt in shards (spec 13): ``swarm.deal``.

A *dealer* hands out samples that this member holds. What becomes of them is known to the phase of
the first channel: its hand-overs claim what was trained on, an abort lets it ride along with the
next one, and progress that is dropped gives its samples back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray

from swarmtrain.training.port import Document
from swarmtrain_protocols.errors import ConfigError, DataUnavailable
from swarmtrain_protocols.messages.common import Span, Spans
from swarmtrain_protocols.order import samples_at
from swarmtrain_protocols.shards import LeaseBook

I64 = NDArray[np.int64]
Batch = TypeVar("Batch")


def data_digest(*parts: object) -> bytes:
    """32 bytes that name data by what they are made of."""
    return blake3("\0".join(str(part) for part in parts).encode()).digest()


class Dealer:
    """Samples for one trainer, on the training thread.

    Args:
        samples: in an epoch.
        seed: of the run; None: samples come in their own order.
        hurry: have the step that comes next be the last one before a hand-over.
        starved: hand over what there is, and wait a moment.
        stopped: the run asks this trainer to end.
    """

    def __init__(
        self,
        samples: int,
        digest: bytes,
        seed: int | None,
        hurry: Callable[[], None],
        starved: Callable[[], None],
        stopped: Callable[[], bool],
    ) -> None:
        self.book = LeaseBook()
        self.samples = samples
        self.args: Document = {"samples": samples, "digest": digest.hex()}
        self.epochs: I64 = np.zeros(0, np.int64)
        """Of each sample that was taken last."""
        self._seed = seed
        self._hurry = hurry
        self._starved = starved
        self._stopped = stopped

    def stop_when(self, stopped: Callable[[], bool]) -> None:
        """Another reason not to wait any longer."""
        before = self._stopped
        self._stopped = lambda: before() or stopped()

    def update(self, leases: Document) -> None:
        """News of what this member holds, as ``shard_desk.ShardDesk.leases`` says it."""
        held, listed = _spans(leases["held"]), _spans(leases["listed"])
        self.book.update(int(leases["generation"]), int(leases["round"]), held, listed)

    def has_some(self) -> bool:
        """Whether something is left to train on."""
        return bool(self.book.available())

    def take(self, count: int) -> I64:
        """Numbers of the samples to train on in the next step, int64 [1 … ``count``].

        Waits while none is left to this member. Empty: the run is over.
        """
        while not self._stopped():
            positions = self.book.take(count)
            if positions:
                if self.book.full or not self.has_some():
                    self._hurry()
                found = np.array(positions, np.int64)
                self.epochs, numbers = np.divmod(found, self.samples)
                if self._seed is None:
                    return numbers
                return samples_at(found, self.samples, self._seed)
            self._starved()
        return np.zeros(0, np.int64)


def by_turns(
    loader: Iterable[Batch],
    site: str,
    members: Callable[[], Sequence[str]],
    stopped: Callable[[], bool],
) -> Iterator[Batch]:
    """Batch ``i`` of a loader if it is the turn of ``site``; all of them if it is no member."""
    for index, batch in enumerate(loader):
        if stopped():
            return
        known = members()
        if site not in known or known.index(site) == index % len(known):
            yield batch


def _spans(pairs: Iterable[tuple[int, int]]) -> Spans:
    return tuple(Span(first, count) for first, count in pairs)


def dealt(
    loader: Any, name: str, rows: int, deal: Callable[[int, bytes, bool], Dealer]
) -> Iterator[Any]:
    """Batches of ``loader`` that this member is to train on; see ``Batches``."""
    batches = Batches(loader, torch.utils.data.default_collate, rows)
    digest = data_digest("dataset", name)
    return batches.each(deal(batches.samples, digest, not batches.in_order))


class InOrder:
    """The first ``rows`` of data that can only be read in order, by number.

    Numbers that go up are read on; another one begins anew, with ``skip`` where the data have it,
    as streams of Hugging Face do.
    """

    def __init__(self, data: Iterable[Any], rows: int) -> None:
        self._data = data
        self._rows = rows
        self._next = 0
        self._reading: Iterator[Any] | None = None

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, number: int) -> Any:
        """Row ``number``.

        Raises:
            DataUnavailable: there are fewer rows than was said.
        """
        if self._reading is None or number < self._next:
            skip = getattr(self._data, "skip", None)
            self._reading = iter(self._data if skip is None else skip(number))
            self._next = 0 if skip is None else number
        for row in self._reading:
            self._next += 1
            if self._next > number:
                return row
        self._reading = None
        why = f"there is no row {number}, {self._rows} were promised"
        raise DataUnavailable("the data that are streamed", why, "say rows=… as many as there are")


class Batches:
    """Samples by number, from a loader or a dataset of the map style.

    A loader gives its ``dataset``, ``batch_size`` and ``collate_fn``; its workers and its sampler
    are not used: what is fetched ahead would count as trained on. ``rows``: of an epoch of data
    that can only be read in order, which are read in order then.

    Raises:
        ConfigError: it has no length or cannot be indexed.
    """

    def __init__(self, loader: Any, collate: Callable[[list[Any]], Any], rows: int = 0) -> None:
        self._data: Any = getattr(loader, "dataset", loader)
        self.in_order = bool(rows)
        if rows:
            self._data = InOrder(self._data, rows)
        self.size = int(getattr(loader, "batch_size", None) or 1)
        self._collate = getattr(loader, "collate_fn", None) or collate
        if not (hasattr(self._data, "__len__") and hasattr(self._data, "__getitem__")):
            raise ConfigError(
                f"swarm.data: a {type(self._data).__name__} without length",
                "this run deals its data in shards, sample by sample",
                "give one with __len__ and __getitem__, or say rows=…, or found with shards = 0",
            )
        self.samples = len(self._data)

    def each(self, dealer: Dealer) -> Iterator[Any]:
        """Batches that this member is to train on, epoch after epoch, until the run ends."""
        while (numbers := dealer.take(self.size)).size:
            yield self._collate([self._data[int(number)] for number in numbers])
