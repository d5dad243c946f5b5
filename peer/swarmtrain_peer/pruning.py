"""Checkpoints that people keep or remove by hand: pins, and what must not go.

A pin is an empty file in the folder of a checkpoint; whatever prunes leaves that checkpoint alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from swarmtrain_peer.store import Checkpoint, StateStore, is_pinned
from swarmtrain_protocols.errors import CheckpointError

Document = dict[str, Any]
NEWEST, PINNED, IN_USE = "among the newest", "pinned", "a member fetches it now"


class Curator:
    """Works on the disk thread of a peer process, or on the folder of a stopped site.

    Args:
        in_use: by channel the rounds whose states members are fetching now.
    """

    def __init__(
        self, store: StateStore, in_use: Callable[[], dict[str, list[int]]] = dict
    ) -> None:
        self._store = store
        self._in_use = in_use

    def prune(self, keep: int) -> Document:
        """Keep the newest ``keep`` good states of each channel; says what went and what stayed.

        Raises:
            CheckpointError: the disk failed.
            LocalProtocolError: ``keep`` is less than one.
        """
        before = {item.number: item for item in self._store.checkpoints()[0]}
        held = {n for n, item in before.items() if self._fetched(item)}
        since = {channel: min(rounds) for channel, rounds in self._in_use().items()}
        broken = self._store.prune(keep, since, held)
        after = {item.number: item for item in self._store.checkpoints()[0]}
        return {
            "removed": sorted(before.keys() - after.keys()),
            "kept": [self._row(item, n in held) for n, item in sorted(after.items())],
            "damaged": [str(error) for error in broken],
        }

    def remove(self, number: int) -> Document:
        """Remove one checkpoint.

        Raises:
            CheckpointError: there is none of that number, or it must stay, and why.
        """
        wanted = self._find(number)
        why = ""
        if is_pinned(wanted.path):
            why = f"{PINNED}: swarmtrain ckpt unpin {number}"
        elif self._fetched(wanted):
            why = IN_USE
        else:
            for entry in wanted.entries:
                if not self._has_another(entry.channel, wanted):
                    why = f"it has the only good state of {entry.channel}"
        if why:
            raise CheckpointError(f"checkpoint {number} stays", why, "nothing was removed")
        self._store.drop(wanted)
        return {"removed": [number], "kept": [], "damaged": []}

    def pin(self, number: int, pinned: bool) -> Document:
        """Keep a checkpoint until it is unpinned.

        Raises:
            CheckpointError: there is none of that number, or the disk failed.
        """
        self._store.pin(self._find(number), pinned)
        return {"number": number, "pinned": pinned}

    def _find(self, number: int) -> Checkpoint:
        for item in self._store.checkpoints()[0]:
            if item.number == number:
                return item
        raise CheckpointError(f"no checkpoint {number}", "not on this disk", "swarmtrain ckpt list")

    def _fetched(self, checkpoint: Checkpoint) -> bool:
        fetched = self._in_use()
        return any(entry.round in fetched.get(entry.channel, ()) for entry in checkpoint.entries)

    def _has_another(self, channel: str, but: Checkpoint) -> bool:
        for item in self._store.checkpoints()[0]:
            entry = item.entry(channel)
            if entry is None or item.number == but.number:
                continue
            try:
                self._store.state(item, entry)
            except CheckpointError:
                continue
            return True
        return False

    def _row(self, item: Checkpoint, held: bool) -> Document:
        why = PINNED if is_pinned(item.path) else IN_USE if held else NEWEST
        rounds = {entry.channel: entry.round for entry in item.entries}
        return {"number": item.number, "rounds": rounds, "why": why}
