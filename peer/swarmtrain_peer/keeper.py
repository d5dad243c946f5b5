"""What a state holder keeps on disk and serves from it: checkpoints, results, generations.

Writes happen on one thread of their own; training never waits for them except where the round
protocol asks for a durable result. Bookkeeping runs on the loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

from swarmtrain_peer import host
from swarmtrain_peer.events import EventLog
from swarmtrain_peer.files import FileSystem, write_atomic
from swarmtrain_peer.store import StateStore
from swarmtrain_protocols import limits
from swarmtrain_protocols.dataplane import DataPlane
from swarmtrain_protocols.entries import Rewound
from swarmtrain_protocols.errors import DiskFull, SwarmError
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.state import CanonicalState


class Keeper:
    """The disk of one site in one run.

    Args:
        snapshots: the list that the catch-up core offers from, by channel (round, state hash).
        every_rounds: a checkpoint is due when the round is a multiple; 0: only the first.
        kept: how many checkpoints stay, on disk and on offer.
    """

    def __init__(
        self,
        folder: Path,
        *,
        data: DataPlane,
        snapshots: dict[str, list[tuple[int, bytes]]],
        events: EventLog,
        disk: Executor,
        every_rounds: int,
        kept: int,
    ) -> None:
        self.store = StateStore(folder)
        self._folder = folder
        self._data = data
        self._snapshots = snapshots
        self._events = events
        self._disk = disk
        self._every = every_rounds
        self._kept = kept
        self._loop = asyncio.get_running_loop()
        self._results: dict[bytes, tuple[str, int, tuple[bytes, ...]]] = {}
        self._based: dict[str, None] = {}
        self._generation_path = folder / "generation"

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
            self._based[channel] = None
            for item in found.results:
                self.keep_result(channel, item.round, item.blob)
                self._data.adopt_result(item.blob, state.layout.values, item.codec)
                stored(channel, item.round, item.root)
            blob = await self._loop.run_in_executor(
                self._disk, self.store.checkpoint, channel, state.round
            )
            self._serve(channel, state.round, blob)
            self._data.states[channel] = state
            restored(state)

    def advanced(self, state: CanonicalState) -> None:
        """``state`` has just moved and holds still; called on any thread.

        The first state of a channel is always saved: later results need something to follow.
        """
        due = self._every and state.round % self._every == 0
        if due or state.channel not in self._based:
            self._based[state.channel] = None
            self.save(state.copy())

    def save(self, state: CanonicalState) -> None:
        """Write ``state``, which nobody moves, in the background; then serve it to joiners."""
        self._disk.submit(self._save, state)

    def _save(self, state: CanonicalState) -> None:
        started = host.mono_s()
        try:
            self.store.save([state])
            self.store.prune(self._kept)
            blob = self.store.checkpoint(state.channel, state.round)
        except SwarmError as error:
            name = "disk_full" if isinstance(error, DiskFull) else "checkpoint_refused"
            self._events.emit(name, reason=str(error), path=str(self._folder))
            return
        self._events.emit(
            "checkpoint_saved",
            state_hash=state.root().hex(),
            channel=state.channel,
            round=state.round,
            bytes=state.nbytes,
            save_s=round(host.mono_s() - started, 6),
        )
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._serve, state.channel, state.round, blob)

    def _serve(self, channel: str, round_number: int, blob: Blob) -> None:
        """Offer a checkpoint to joiners, by its mapped file; the oldest offer goes."""
        have = self._snapshots.setdefault(channel, [])
        if (round_number, blob.root) in have:
            return
        have.append((round_number, blob.root))
        self._data.register(blob)
        while len(have) > self._kept:
            self._data.drop(have.pop(0)[1])

    def drop_state(self, channel: str) -> None:
        """This site serves the stage no more: nothing of it is offered or kept any longer."""
        for _, root in self._snapshots.pop(channel, []):
            self._data.drop(root)
        for root in [r for r, kept in self._results.items() if kept[0] == channel]:
            del self._results[root]
        self._based.pop(channel, None)
        self._disk.submit(self._forget, channel)

    def _forget(self, channel: str) -> None:
        try:
            self.store.forget(channel)
        except SwarmError as error:
            self._events.emit("checkpoint_refused", reason=str(error), path=str(self._folder))

    def keep_result(self, channel: str, round_number: int, blob: Blob) -> None:
        """The result is on disk: serve it from there when memory lets go of it."""
        self._results[blob.root] = (channel, round_number, blob.leaves)
        while len(self._results) > limits.HISTORY_ROUNDS * limits.CHANNELS_SERVED_MAX:
            del self._results[next(iter(self._results))]

    def provide(self, root: bytes) -> Blob | None:
        """A result over its mapped file. Hashes nothing: whoever fetches checks every chunk."""
        kept = self._results.get(root)
        if kept is None:
            return None
        try:
            return self.store.mapped_result(*kept)
        except SwarmError:
            del self._results[root]  # pruned: no longer on offer
            return None

    def rewound(self, body: Rewound) -> None:
        """Forget the old generation's later results, once, however often the log is replayed."""
        self._disk.submit(self._rewind, body)

    def _rewind(self, body: Rewound) -> None:
        try:
            known = int(self._generation_path.read_text())
        except (FileNotFoundError, ValueError):
            known = 0
        if body.generation <= known:
            return
        self._events.emit("data_loss", reason=body.reason, generation=body.generation)
        try:
            self.store.rewind(dict(zip(body.channels, body.rounds, strict=True)))
            write_atomic(FileSystem(), self._generation_path, [str(body.generation).encode()])
        except (SwarmError, OSError) as error:
            self._events.emit("checkpoint_refused", reason=str(error), path=str(self._folder))
