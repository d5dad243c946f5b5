"""What a state holder keeps on disk and serves from it: checkpoints, results, generations.

Writes happen on one thread of their own; training never waits for them except where the round
protocol asks for a durable result. Bookkeeping runs on the loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from swarmtrain_peer import host
from swarmtrain_peer.alarm import DiskAlarm
from swarmtrain_peer.copies import Copies
from swarmtrain_peer.events import EventLog
from swarmtrain_peer.files import FileSystem, write_atomic
from swarmtrain_peer.incomingfile import IncomingFile, find_begun
from swarmtrain_peer.offers import Offers
from swarmtrain_peer.pruning import Curator
from swarmtrain_peer.store import StateStore
from swarmtrain_protocols import limits
from swarmtrain_protocols.dataplane import DataPlane
from swarmtrain_protocols.entries import Rewound
from swarmtrain_protocols.errors import ConfigError, DiskFull, SwarmError
from swarmtrain_protocols.incoming import Incoming
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.rounds.effects import Snapshot
from swarmtrain_protocols.state import CanonicalState


@dataclass(frozen=True, slots=True)
class _Kept:
    """A result that joiners and members that missed it may fetch."""

    channel: str
    round: int
    blob: Blob


class Keeper:
    """The disk of one site in one run.

    Args:
        snapshots: the list that the catch-up core offers from, by channel (round, state hash).
        every_rounds: a checkpoint is due when the round is a multiple; 0: only the first.
        kept: how many checkpoints stay, on disk and on offer.
        replicas_min: a stage with fewer members is saved as often as the disk can follow.
    """

    def __init__(
        self,
        folder: Path,
        *,
        data: DataPlane,
        snapshots: dict[str, list[tuple[int, bytes]]],
        events: EventLog,
        alarm: DiskAlarm,
        disk: Executor,
        every_rounds: int,
        kept: int,
        replicas_min: int = 0,
    ) -> None:
        self.store = StateStore(folder)
        self.offers = Offers(data, snapshots, kept, host.mono_s)
        self.copies = Copies(folder / "copies", offers=self.offers, events=events, disk=disk)
        self._folder = folder
        self._data = data
        self._events = events
        self._alarm = alarm
        self._disk = disk
        self.every_rounds = every_rounds
        self._kept = kept
        self._loop = asyncio.get_running_loop()
        self._results: dict[bytes, _Kept] = {}
        self._based: dict[str, int] = {}
        """Of which round the newest state was, by channel; the disk leads there."""
        self._replicas_min = replicas_min
        self._endangered: tuple[str, ...] = ()
        self._rooted: dict[str, int] = {}
        """Of which checkpoint on disk the results there lead on, by channel."""
        self._newest: dict[str, int] = {}
        self._gaps: dict[str, tuple[int, int]] = {}
        """First and last round whose results are not on disk, by channel: a later state must be."""
        self._saving: dict[str, int] = {}
        self._generation_path = folder / "generation"
        data.room = self.room

    async def recover(
        self,
        restored: Callable[[CanonicalState], None],
        stored: Callable[[str, int, bytes], None],
    ) -> None:
        """Load the newest good checkpoint of each channel, and what results lie behind it.

        ``stored`` gets (channel, round, root) of every such result: the last ones may belong to
        attempts that were never committed, which only the log can tell.
        """
        loaded = await self._loop.run_in_executor(self._disk, self.store.load)
        for refused in loaded.refused:
            self._events.emit("checkpoint_refused", reason=str(refused))
        for channel in sorted(loaded.channels):
            found = loaded.channels[channel]
            state = found.state
            self._based[channel] = state.round
            for item in found.results:
                self.keep_result(channel, item.round, item.blob)
                self._data.adopt_result(item.blob, state.layout.values, item.codec, channel)
                stored(channel, item.round, item.root)
            blob = await self._loop.run_in_executor(
                self._disk, self.store.checkpoint, channel, state.round
            )
            self._rooted[channel] = found.number
            self.offers.add(channel, state.round, blob)
            self._data.states[channel] = state
            restored(state)
        await self.copies.recover()

    def room(self, snapshot: Snapshot, sizes: Sequence[int]) -> Incoming:
        """Where a snapshot is received: on disk, so that a restart goes on with it. Any thread."""
        try:
            return IncomingFile(self._folder / "incoming", snapshot, sizes)
        except SwarmError as error:
            what = "the state comes into memory: a restart begins anew"
            self._events.emit("fallback", what=what, why=str(error))
            return Incoming.in_memory(snapshot.root, sizes)

    def begun(self) -> list[tuple[str, int, bytes]]:
        """(channel, round, hash) of snapshots that an earlier life has begun to fetch."""
        found = find_begun(self._folder / "incoming")
        known = self._data.states
        for item in found:
            state = known.get(item.head.channel)
            if state is not None and state.round >= item.head.round:
                item.path.unlink(missing_ok=True)  # it was got in another way
        return [(i.head.channel, i.head.round, i.head.root) for i in found if i.path.exists()]

    def curate(self, action: str, number: int, keep: int) -> dict[str, Any]:
        """What people ask of the checkpoints here; disk thread. See ``pruning.Curator``.

        Raises:
            CheckpointError: it must stay, or there is no such one. ConfigError: no such action.
        """
        curator = Curator(self.store, self.offers.fetched_now)
        if action == "prune" and keep >= 1:
            return curator.prune(keep)
        if action == "remove":
            return curator.remove(number)
        if action in ("pin", "unpin"):
            return curator.pin(number, action == "pin")
        raise ConfigError(f"{action!r:.20} of checkpoints", "no such action", "prune, pin or unpin")

    def look(self, ledger: Ledger) -> None:
        """The ledger moved: which stages may be lost with the next member?"""
        pipeline = ledger.pipeline
        self._endangered = tuple(
            stage_channel(stage)
            for stage in range(len(pipeline.stages))
            if len(pipeline.serving(stage)) < self._replicas_min
        )

    def advanced(self, state: CanonicalState) -> None:
        """``state`` has just moved and holds still; called on any thread.

        One that does not follow from what is saved (the first, or one that was fetched) is saved in
        any case: later results need something to follow.
        """
        channel = state.channel
        due = self.every_rounds and state.round % self.every_rounds == 0
        if channel in self._gaps and not self._saving.get(channel):
            due = True  # what is written from here on leads nowhere without it
        if channel in self._endangered and not self._saving.get(channel):
            due = True  # others may want a copy of the newest state at any time
        follows = self._based.get(channel) == state.round - 1
        self._based[channel] = state.round
        if due or not follows:
            self.save(state.copy())

    async def adopt(self, state: CanonicalState) -> None:
        """Write a state that was made here and that nobody else has; on offer on return.

        If the disk fails, that is told, and the state is in memory alone.
        """
        self._based[state.channel] = state.round
        await asyncio.wrap_future(self.save(state.copy()))

    def save(self, state: CanonicalState) -> Future[None]:
        """Write ``state``, which nobody moves, in the background; then serve it to joiners."""
        self._newest[state.channel] = state.round
        self._saving[state.channel] = self._saving.get(state.channel, 0) + 1
        return self._disk.submit(self._save, state)

    def _save(self, state: CanonicalState) -> None:
        started = host.mono_s()
        try:
            self._alarm.need(state.nbytes)
            number = self.store.save([state])
            self.store.prune(self._kept, self.offers.oldest())
            blob = self.store.checkpoint(state.channel, state.round)
        except SwarmError as error:
            if state.channel not in self._rooted:
                self._miss(state.channel, state.round - 1)  # results alone lead nowhere
            self._failed("checkpoints", error)
            self._offer_memory(state)
            if isinstance(error, DiskFull) and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._try_later, state)
            return
        finally:
            self._saving[state.channel] -= 1
        self._alarm.written("checkpoints")
        self._rooted[state.channel] = number
        if self._gaps.get(state.channel, (0, state.round))[1] < state.round:
            self._gaps.pop(state.channel, None)
        self._events.emit(
            "checkpoint_saved",
            state_hash=state.root().hex(),
            channel=state.channel,
            round=state.round,
            bytes=state.nbytes,
            save_s=round(host.mono_s() - started, 6),
        )
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._saved, state.channel, state.round, blob)

    def _try_later(self, state: CanonicalState) -> None:
        self._loop.call_later(limits.DISK_FULL_RETRY_S, self._try_again, state)

    def _try_again(self, state: CanonicalState) -> None:
        if state.channel in self._based and self._newest[state.channel] == state.round:
            self.save(state)  # no newer one is on its way

    def _offer_memory(self, state: CanonicalState) -> None:
        """Whoever joins or comes back gets it from memory, as long as the disk fails."""
        blob = state.blob()
        fields = {"state_hash": blob.root.hex(), "bytes": state.nbytes}
        self._events.emit("memory_offered", channel=state.channel, round=state.round, **fields)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._saved, state.channel, state.round, blob)

    def _saved(self, channel: str, round_number: int, blob: Blob) -> None:
        if channel not in self._based:
            return  # the stage was given up meanwhile
        self.offers.add(channel, round_number, blob)
        oldest = self.offers.oldest().get(channel, 0)
        for root, kept in list(self._results.items()):
            if kept.channel == channel and kept.round < oldest:
                del self._results[root]  # its file may go, and the mapping with it

    def drop_state(self, channel: str) -> None:
        """This site serves the stage no more: nothing of it is offered or kept any longer."""
        self.offers.withdraw(channel)
        for root in [r for r, kept in self._results.items() if kept.channel == channel]:
            del self._results[root]
        self._based.pop(channel, None)
        self._gaps.pop(channel, None)
        self._rooted.pop(channel, None)
        self._disk.submit(self._forget, channel)

    def _forget(self, channel: str) -> None:
        if channel in self._based:
            return  # it is served again; what is newer stands beside the old
        try:
            self.store.forget(channel)
        except SwarmError as error:
            self._events.emit("checkpoint_refused", reason=str(error), path=str(self._folder))

    def store_result(self, channel: str, round_number: int, blob: Blob, codec: str) -> bool:
        """Write the result of a round; any thread.

        True: it is on disk, and so is everything that leads up to it.
        """
        try:
            self.store.store_result(channel, round_number, blob.root, codec, blob.chunks)
        except SwarmError as error:
            self._miss(channel, round_number)
            self._failed("results", error)
            self._loop.call_soon_threadsafe(self.keep_result, channel, round_number, blob)
            return False
        self._alarm.written("results")
        if self._gaps.get(channel) == (round_number, round_number):
            self._gaps.pop(channel, None)  # another attempt of the only one that is missing
        if channel in self._rooted and not self.store.has(self._rooted[channel]):
            del self._rooted[channel]
            self._miss(channel, round_number)
            self._events.emit("fallback", what="checkpoint", why="its files are gone: saved again")
        mapped = blob
        with contextlib.suppress(SwarmError):  # removed at once: memory has it
            mapped = self.store.mapped_result(channel, round_number, blob.leaves)
        self._loop.call_soon_threadsafe(self.keep_result, channel, round_number, mapped)
        return channel not in self._gaps

    def _miss(self, channel: str, round_number: int) -> None:
        first, last = self._gaps.get(channel, (round_number, round_number))
        self._gaps[channel] = min(first, round_number), max(last, round_number)

    def _failed(self, writer: str, error: SwarmError) -> None:
        if isinstance(error, DiskFull):
            self._alarm.full(writer, error)
        else:
            self._events.emit("checkpoint_refused", reason=str(error), path=str(self._folder))

    def keep_result(self, channel: str, round_number: int, blob: Blob) -> None:
        """Serve a result when the data plane lets go of it.

        Over its mapped file, which may be removed: what one member holds must not hang on a name
        on its disk. In memory if the disk fails.
        """
        self._results[blob.root] = _Kept(channel, round_number, blob)
        while len(self._results) > limits.HISTORY_ROUNDS * limits.CHANNELS_SERVED_MAX:
            del self._results[next(iter(self._results))]

    def provide(self, root: bytes, found: Blob | None = None) -> Blob | None:
        """``found`` in memory, or a result over its mapped file; any thread.

        Hashes nothing: whoever fetches checks every chunk.
        """
        self.offers.used(root)
        if found is not None:
            return found
        kept = self._results.get(root)
        return None if kept is None else kept.blob

    def is_history(self, root: bytes) -> bool:
        """A snapshot, or a result that memory has let go: no round waits for it."""
        if self.offers.knows(root):
            return True
        return root in self._results and self._data.provide(root) is None

    def rewound(self, body: Rewound) -> None:
        """Forget the old generation's later results, once, however often the log is replayed."""
        for channel, number in zip(body.channels, body.rounds, strict=True):
            self.offers.retire_beyond(channel, number)
        self._disk.submit(self._rewind, body)

    async def state_at(self, channel: str, number: int, root: bytes) -> CanonicalState | None:
        """The state of this hash before round ``number``, if a good checkpoint here has it.

        Whatever lies beyond it is of an older generation and goes.
        """
        work = partial(self._read_state, channel, number, root)
        state = await self._loop.run_in_executor(self._disk, work)
        if state is not None:
            self._based[channel] = number  # it is on disk, so what follows leads somewhere
        return state

    def _read_state(self, channel: str, number: int, root: bytes) -> CanonicalState | None:
        for checkpoint in self.store.checkpoints()[0]:
            entry = checkpoint.entry(channel)
            if entry is None or (entry.round, entry.root) != (number, root):
                continue
            try:
                self.store.rewind({channel: number})
                return self.store.state(checkpoint, entry)
            except SwarmError as error:
                self._events.emit("checkpoint_refused", reason=str(error), path=str(self._folder))
        return None

    def _rewind(self, body: Rewound) -> None:
        try:
            known = int(self._generation_path.read_text())
        except (FileNotFoundError, ValueError):
            known = 0
        if body.generation <= known:
            return
        if not body.ordered:
            self._events.emit("data_loss", reason=body.reason, generation=body.generation)
        try:
            self.store.rewind(dict(zip(body.channels, body.rounds, strict=True)))
            write_atomic(FileSystem(), self._generation_path, [str(body.generation).encode()])
        except (SwarmError, OSError) as error:
            self._events.emit("checkpoint_refused", reason=str(error), path=str(self._folder))
