"""Caps on bytes per second, over all connections of a site: ``--up`` and ``--down``.

A token bucket: what was not used in the last tenth of a second is forgotten. Control messages are
never held back, but what they take is missing for bulk. Whoever finds the bucket empty is called
again when there is something in it, in the order of asking.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from swarmtrain_peer import host
from swarmtrain_peer.workers import Broken, only_told, start_thread

BURST_S = 0.1
QUANTUM_BYTES = 16 * 1024
"""Less is not handed out unless nobody wants more: system calls for a few bytes are dear."""


class Cap:
    """One direction's cap; 0: none. Any thread."""

    def __init__(self, bytes_per_s: int) -> None:
        self.bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self.burst_bytes = max(float(QUANTUM_BYTES), bytes_per_s * BURST_S)
        self._tokens = self.burst_bytes
        self._at = host.mono_s()

    def take(self, wanted: int) -> int:
        """How many of ``wanted`` bytes may pass now; 0: wait."""
        if not self.bytes_per_s:
            return wanted
        with self._lock:
            self._refill()
            if self._tokens < min(wanted, QUANTUM_BYTES):
                return 0
            granted = min(wanted, int(self._tokens))
            self._tokens -= granted
            return granted

    def charge(self, nbytes: int) -> None:
        """Bytes that have passed without asking; a negative number was granted and not used."""
        if self.bytes_per_s:
            with self._lock:
                self._tokens -= nbytes

    def wait_s(self) -> float:
        """Seconds until a quantum is there."""
        if not self.bytes_per_s:
            return 0.0
        with self._lock:
            self._refill()
            return max(0.0, (QUANTUM_BYTES - self._tokens) / self.bytes_per_s)

    def _refill(self) -> None:
        now = host.mono_s()
        self._tokens = min(self.burst_bytes, self._tokens + (now - self._at) * self.bytes_per_s)
        self._at = now


class Queue:
    """Calls back those who wait for a cap, first come, first served, on a thread of its own.

    The thread lives while somebody has ever waited: a site without caps has none. ``broken`` hears
    what ends it.
    """

    def __init__(self, cap: Cap, broken: Broken = only_told) -> None:
        self._cap = cap
        self._broken = broken
        self._waiting: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def wait(self, call: Callable[[], None]) -> None:
        """Have ``call`` called when bytes may pass again."""
        with self._changed:
            if self._thread is None:
                self._thread = start_thread("cap", self._work, self._broken)
            self._waiting.append(call)
            self._changed.notify()

    def close(self) -> None:
        """Nobody is called any more; blocks until the thread has ended."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                wait_s = self._cap.wait_s()
                if wait_s > 0:
                    self._changed.wait(wait_s)
                    continue
                call = self._waiting.popleft()
            call()
            # It takes its share on another thread; the next one is called then and may find none.
