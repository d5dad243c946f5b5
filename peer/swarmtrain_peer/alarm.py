"""The alarm of a full disk: raised once when it begins, taken back once when everything fits."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from swarmtrain_peer import host
from swarmtrain_peer.events import EventLog
from swarmtrain_protocols.errors import DiskFull


class DiskAlarm:
    """One per site; any thread. Writers report under a name of their own.

    Each failed writer tries again by itself: the alarm lasts until the last of them succeeded.
    """

    def __init__(self, events: EventLog, folder: Path) -> None:
        self._events = events
        self._folder = folder
        self._lock = threading.Lock()
        self._failing: dict[str, None] = {}
        self._since_s = 0.0

    @property
    def failing(self) -> tuple[str, ...]:
        """Names of the writers that wait for space, in the order in which they failed."""
        with self._lock:
            return tuple(self._failing)

    def need(self, nbytes: int) -> None:
        """Look before a large write: trying would take the last space from small ones.

        Raises:
            DiskFull: fewer than ``nbytes`` bytes are free.
        """
        free = self._free_bytes()
        if free is not None and free < nbytes:
            why = f"{nbytes} bytes are needed, {free} are free"
            raise DiskFull(f"cannot write to {self._folder}", why, "Free some space.")

    def full(self, writer: str, error: Exception) -> None:
        """``writer`` could not write for want of space."""
        with self._lock:
            first = not self._failing
            self._failing[writer] = None
            if first:
                self._since_s = host.mono_s()
        if first:
            fields = {"reason": str(error), "path": str(self._folder)}
            self._events.emit("disk_full", what=writer, free_bytes=self._free_bytes(), **fields)

    def written(self, writer: str) -> None:
        """``writer`` has written."""
        with self._lock:
            last = self._failing.pop(writer, writer) is None and not self._failing
            full_s = host.mono_s() - self._since_s
        if last:
            self._events.emit("disk_freed", full_s=round(full_s, 3), path=str(self._folder))

    def attempt(self, writer: str, work: Callable[[], object]) -> bool:
        """Do ``work`` and report; False if there was no space for it."""
        try:
            work()
        except DiskFull as error:
            self.full(writer, error)
            return False
        self.written(writer)
        return True

    def _free_bytes(self) -> int | None:
        try:
            return shutil.disk_usage(self._folder).free
        except OSError:
            return None
