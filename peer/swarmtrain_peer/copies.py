"""Copies of other stages' states, kept for the day when nobody else has them (spec 11).

They lie on disk like checkpoints, are offered to others like own snapshots, and never become a
state of this node. Together they stay below a number of bytes; the oldest makes room.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from swarmtrain_peer.events import EventLog
from swarmtrain_peer.offers import Offers
from swarmtrain_peer.store import StateStore
from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import DiskFull, SwarmError
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.state import CanonicalState


@dataclass(slots=True)
class _Copy:
    """``root`` is what is offered, empty as long as nothing is on disk."""

    round: int
    root: bytes
    nbytes: int


class Copies:
    """The copies of one site. Bookkeeping on the loop's thread, writing on the disk's."""

    def __init__(
        self,
        folder: Path,
        *,
        offers: Offers,
        events: EventLog,
        disk: Executor,
        bytes_max: int = limits.COPIES_BYTES_MAX,
    ) -> None:
        self._store = StateStore(folder)
        self._folder = folder
        self._offers = offers
        self._events = events
        self._disk = disk
        self._bytes_max = bytes_max
        self._loop = asyncio.get_running_loop()
        self._kept: dict[str, _Copy] = {}

    async def recover(self) -> None:
        """Offer what an earlier life has kept; broken files are refused by name."""
        loaded = await self._loop.run_in_executor(self._disk, self._store.load)
        for refused in loaded.refused:
            self._events.emit("checkpoint_refused", reason=str(refused))
        for channel in sorted(loaded.channels):
            state = loaded.channels[channel].state
            blob = await self._loop.run_in_executor(
                self._disk, self._store.checkpoint, channel, state.round
            )
            self._kept[channel] = _Copy(state.round, b"", state.nbytes)
            self._written(channel, state.round, blob)

    def keep(self, state: CanonicalState) -> bool:
        """Write a state, which nobody moves, in the background, then offer it.

        It takes the place of an older copy of its channel. False: it is larger than all room.
        """
        if state.nbytes > self._bytes_max:
            why = f"{state.nbytes} bytes, at most {self._bytes_max}"
            self._events.emit("fallback", what="no copy of another stage", why=why)
            return False
        old = self._kept.pop(state.channel, None)
        left = sum(kept.nbytes for kept in self._kept.values()) + state.nbytes
        for channel in list(self._kept):  # the order in which they came
            if left <= self._bytes_max:
                break
            left -= self._kept[channel].nbytes
            self.drop(channel)
        offered = b"" if old is None else old.root
        self._kept[state.channel] = _Copy(state.round, offered, state.nbytes)
        self._disk.submit(self._save, state)
        return True

    def drop(self, channel: str) -> None:
        """The copy of this channel is not needed any more."""
        kept = self._kept.pop(channel, None)
        if kept is not None:
            self._offers.retire(kept.root)
            self._disk.submit(self._forget, channel)

    def rounds(self) -> dict[str, int]:
        """Of which state there is a copy, by channel, oldest copy first."""
        return {channel: kept.round for channel, kept in self._kept.items()}

    def _save(self, state: CanonicalState) -> None:
        channel, blob = state.channel, None
        try:
            self._store.save([state])
            self._store.prune(1)
            blob = self._store.checkpoint(channel, state.round)
        except SwarmError as error:
            self._failed(error)
        else:
            fields = {"state_hash": blob.root.hex(), "bytes": state.nbytes}
            self._events.emit("copy_saved", channel=channel, round=state.round, **fields)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._written, channel, state.round, blob)

    def _written(self, channel: str, round_number: int, blob: Blob | None) -> None:
        """A copy is on disk, or could not be written; meanwhile it may be unwanted or outdated."""
        kept = self._kept.get(channel)
        if kept is None or kept.round != round_number:
            return
        if blob is None:
            del self._kept[channel]
            self._offers.retire(kept.root)
            return
        self._offers.add(channel, round_number, blob)
        if kept.root != blob.root:
            self._offers.retire(kept.root)
        kept.root = blob.root

    def _forget(self, channel: str) -> None:
        try:
            self._store.forget(channel)
        except SwarmError as error:
            self._failed(error)

    def _failed(self, error: SwarmError) -> None:
        name = "disk_full" if isinstance(error, DiskFull) else "checkpoint_refused"
        self._events.emit(name, reason=str(error), path=str(self._folder))
