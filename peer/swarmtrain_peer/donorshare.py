"""How much of its uplink a site spends on members that fetch state, old results or a corpus.

Rounds come first. What the uplink carries is measured while there is more to carry: what has left
the kernel's send buffers in a time in which one of them never ran empty. A share of the most that
was seen may go to those who are catching up, and a smaller one while chunks of a round wait to be
sent or lie unsent in the kernel. Before anything was measured there is no limit: whatever fills a
buffer is measured within a moment.
"""

from __future__ import annotations

import fcntl
import math
import socket
import struct
import sys
import termios
import threading
from typing import Protocol

from swarmtrain_peer import host
from swarmtrain_peer.caps import BURST_S, QUANTUM_BYTES, Cap

SHARE = 0.2
BUSY_FACTOR = 0.25
"""Of that share, while a round's bytes are on their way: with the default 5 % of the uplink."""
REMEMBER_S = 300.0
"""The uplink is the most that was seen in the last one to two times that long."""
WINDOW_S = 0.2
"""What the uplink carries is measured over that time at least."""
LOOK_S = 0.05
"""How often it is looked at, at most, and only while somebody is fetching."""
WAIT_S_MAX = 0.1
FULL_BYTES = 16 * 1024
"""So much unsent means that the path was busy."""
BYTES_PER_S_MIN = 16 * 1024
"""A donor that sends less would be given up (``limits.FETCH_RATE_BYTES_PER_S_MIN``)."""
UNKNOWN_BYTES_PER_S = 256 * 1024
"""Beside a round's bytes, before anything was measured."""
FRAME_BYTES = 64 * 1024
"""Frames of what is held back: a round's chunk waits for the rest of one at most."""


class Sender(Protocol):
    """A connection, as far as it matters here."""

    def round_bytes_wait(self) -> bool:
        """Chunks of a round are queued, or handed to the kernel and not sent."""

    def progress(self) -> tuple[int, int]:
        """Bytes handed to the kernel since the start, and how many of them are not sent."""


def unsent_bytes(sock: socket.socket) -> int:
    """Bytes in the kernel's send buffer; 0 where it does not tell."""
    if not sys.platform.startswith("linux"):
        return 0
    try:
        answer = fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0\0\0\0")
    except (OSError, ValueError):  # it was closed meanwhile
        return 0
    return int(struct.unpack("i", answer)[0])


class DonorShare(Cap):
    """A cap that follows the measured uplink. Any thread.

    Args:
        share: of the uplink, above 0, at most 1.
        up_bytes_per_s: what the user allows in total; 0: nothing said.
    """

    def __init__(self, share: float = SHARE, up_bytes_per_s: int = 0) -> None:
        super().__init__(0)
        assert 0.0 < share <= 1.0
        self.share = share
        self._allowed = float(up_bytes_per_s)
        self._all: dict[Sender, None] = {}
        self._window: tuple[float, int] | None = None  # (since, bytes that had been carried)
        self._looked_s = -math.inf
        self._peaks = [(-math.inf, 0.0), (-math.inf, 0.0)]  # (since, bytes per second), newest last
        self._senders: dict[Sender, None] = {}
        self._left = float(QUANTUM_BYTES)
        self._refilled_s = host.mono_s()
        self._senders_lock = threading.Lock()

    # -- what is measured ------------------------------------------------------------------

    def add(self, sender: Sender) -> None:
        """A connection is there."""
        with self._senders_lock:
            self._all[sender] = None

    def look(self) -> None:
        """See what all connections have carried since the last look, if one was busy throughout."""
        now = host.mono_s()
        with self._senders_lock:
            if now - self._looked_s < LOOK_S:
                return
            self._looked_s = now
            progress = [sender.progress() for sender in self._all]
            carried = sum(handed - unsent for handed, unsent in progress)
            if not any(unsent >= FULL_BYTES for _, unsent in progress):
                self._window = None
                return
            if self._window is None:
                self._window = now, carried
                return
            since, before = self._window
            if now - since < WINDOW_S:
                return
            self._window = now, carried
        self.measured(now, max(0, carried - before) / (now - since))

    def measured(self, now: float, bytes_per_s: float) -> None:
        """So much was carried while there was more to carry."""
        with self._lock:
            since, peak = self._peaks[-1]
            if now - since > REMEMBER_S:
                self._peaks = [self._peaks[-1], (now, bytes_per_s)]
            elif bytes_per_s > peak:
                self._peaks[-1] = (since, bytes_per_s)

    @property
    def uplink_bytes_per_s(self) -> float | None:
        """The most that it has carried lately, or what the user allows; None: not known."""
        peak = max(rate for _, rate in self._peaks)
        if self._allowed:
            return min(peak, self._allowed) if peak else self._allowed
        return peak or None

    def busy(self, sender: Sender) -> None:
        """Chunks of a round were queued on this connection."""
        with self._senders_lock:
            self._senders[sender] = None

    def rounds_wait(self) -> bool:
        """Chunks of a round are on their way out of this site."""
        with self._senders_lock:
            senders = list(self._senders)
        for sender in senders:
            if sender.round_bytes_wait():
                return True
            with self._senders_lock:
                if not sender.round_bytes_wait():
                    self._senders.pop(sender, None)
        return False

    def forget(self, sender: Sender) -> None:
        """The connection is gone."""
        with self._senders_lock:
            self._senders.pop(sender, None)
            self._all.pop(sender, None)
            self._window = None

    def allowed_bytes_per_s(self) -> float:
        """What may be spent now; infinity before the uplink was measured."""
        self.look()
        uplink, rounds_wait = self.uplink_bytes_per_s, self.rounds_wait()
        if uplink is None:
            return UNKNOWN_BYTES_PER_S if rounds_wait else math.inf
        factor = BUSY_FACTOR if rounds_wait else 1.0
        return max(float(BYTES_PER_S_MIN), uplink * self.share * factor)

    # -- as a cap --------------------------------------------------------------------------

    def take(self, wanted: int) -> int:
        rate = self.allowed_bytes_per_s()
        with self._lock:
            self._fill(rate)
            if rate == math.inf:
                return wanted
            if self._left < min(wanted, QUANTUM_BYTES):
                return 0
            granted = min(wanted, int(self._left))
            self._left -= granted
            return granted

    def charge(self, nbytes: int) -> None:
        with self._lock:
            self._left -= nbytes

    def wait_s(self) -> float:
        rate = self.allowed_bytes_per_s()
        with self._lock:
            self._fill(rate)
            if rate == math.inf:
                return 0.0
            return min(WAIT_S_MAX, max(0.0, (QUANTUM_BYTES - self._left) / rate))

    def _fill(self, rate: float) -> None:
        now = host.mono_s()
        took_s, self._refilled_s = now - self._refilled_s, now
        if rate == math.inf:
            self._left = float(QUANTUM_BYTES)
        else:
            most = max(float(QUANTUM_BYTES), rate * BURST_S)
            self._left = min(most, self._left + took_s * rate)
