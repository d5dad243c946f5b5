"""The record file of a node in the background, through times without space.

What others rely on (votes, entries that a steward acknowledges) holds back everything behind it
until it is durable, however long the disk is full. What nobody relies on waits for space in memory
while the site goes on. Records reach the file in their order, and none is left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from swarmtrain_peer.alarm import DiskAlarm
from swarmtrain_peer.recordfile import RecordFile
from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Persist
from swarmtrain_protocols.errors import DiskFull

WRITER = "log"


class Journal:
    """All calls on the loop's thread; the disk is written on ``pool``, one batch at a time.

    ``failed`` hears of errors that waiting does not mend; nothing is written after one.
    ``blocked`` is called once when records that others rely on have found no space for
    ``DISK_FULL_PATIENCE_S``: the site cannot answer for itself any more.
    """

    def __init__(
        self,
        file: RecordFile,
        pool: Executor,
        alarm: DiskAlarm,
        *,
        failed: Callable[[BaseException], None],
        blocked: Callable[[], None],
        retry_s: float = limits.DISK_FULL_RETRY_S,
        patience_s: float = limits.DISK_FULL_PATIENCE_S,
    ) -> None:
        self._file = file
        self._pool = pool
        self._alarm = alarm
        self._failed = failed
        self._blocked = blocked
        self._retry_s = retry_s
        self._patience_s = patience_s
        self._loop = asyncio.get_running_loop()
        self._waiting: list[Persist] = []
        self._writing = 0
        self._done: Callable[[], None] | None = None
        self._full_since_s: float | None = None
        self._told = False
        self._timer: asyncio.TimerHandle | None = None
        self._busy = False
        self._closed = False

    @property
    def stuck(self) -> bool:
        """True from the call of ``blocked`` until the records are written."""
        return self._told

    def write(self, batch: Sequence[Persist], done: Callable[[], None]) -> None:
        """Append records; ``done`` is called when what follows them may take place.

        One batch at a time: the next comes after ``done``.
        """
        assert self._done is None
        self._waiting += batch
        self._done = done
        if self._timer is None and not self._busy:
            self._start()
        else:
            self._release()  # the disk is full: the next try takes these along

    def close(self) -> None:
        """Nothing is called any more; a write under way ends by itself."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start(self) -> None:
        self._timer = None
        self._busy = True
        resets = [i for i, item in enumerate(self._waiting) if item.reset]
        if resets:
            del self._waiting[: resets[-1]]  # it takes the place of everything before it
        self._writing = len(self._waiting)
        self._pool.submit(self._work, [(item.record, item.reset) for item in self._waiting])

    def _work(self, records: list[tuple[bytes, bool]]) -> None:
        error: BaseException | None = None
        try:
            self._file.write(records)
        except Exception as caught:  # noqa: BLE001, told on the loop's thread
            error = caught
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._written, error)

    def _written(self, error: BaseException | None) -> None:
        if self._closed:
            return
        self._busy = False
        if error is None:
            del self._waiting[: self._writing]
            self._full_since_s = None
            self._told = False
            self._alarm.written(WRITER)
            if self._waiting:
                self._start()
            self._release()
        elif isinstance(error, DiskFull):
            self._alarm.full(WRITER, error)
            now = self._loop.time()
            self._full_since_s = self._full_since_s or now
            self._timer = self._loop.call_later(self._retry_s, self._start)
            self._release()
            if self._done is not None and now - self._full_since_s >= self._patience_s:
                self._give_notice()
        else:
            self.close()
            self._failed(error)

    def _release(self) -> None:
        """Go on if nobody relies on what is still to be written."""
        relied = any(item.relied for item in self._waiting)
        if self._done is None or relied or len(self._waiting) > limits.RECORDS_WAITING_MAX:
            return
        done, self._done = self._done, None
        done()

    def _give_notice(self) -> None:
        if not self._told:
            self._told = True
            self._blocked()
