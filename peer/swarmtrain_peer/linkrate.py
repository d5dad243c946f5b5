"""How fast a bulk connection drains, and whether packing a chunk for it pays.

The kernel's buffer takes the first bytes at once, so the rate is measured only between moments at
which it was full: what it took in between is what the path carried away.
"""

from __future__ import annotations

from swarmtrain_peer import host
from swarmtrain_protocols.packing import SAMPLE_BYTES, SAVING_MIN, pack, sample_saving

WINDOW_S = 0.1
FAST_BYTES_PER_S = 100e6
"""On a faster path nothing is even looked at: only text would gain, and little."""
MARGIN = 3.0
"""The processors have other work: time saved on the path must be that many times what it costs."""
BOTH_WAYS = 1.6
"""Packing and unpacking together take that many times what packing alone takes."""


class LinkRate:
    """Bytes per second that one connection carries away; None until its buffer was full."""

    def __init__(self) -> None:
        self.bytes_per_s: float | None = None
        self._full_s: float | None = None
        self._full_bytes = 0

    def full(self, now: float, sent_bytes: int) -> None:
        """The kernel takes no more; ``sent_bytes`` have been handed over since the start.

        Nothing sent is no rate: the window goes on until something is.
        """
        if self._full_s is None:
            self._full_s, self._full_bytes = now, sent_bytes
        elif now - self._full_s >= WINDOW_S and sent_bytes > self._full_bytes:
            self.bytes_per_s = (sent_bytes - self._full_bytes) / (now - self._full_s)
            self._full_s, self._full_bytes = now, sent_bytes

    def idle(self) -> None:
        """There was nothing more to send: the buffer may run empty."""
        self._full_s = None

    def packed(self, chunk: memoryview) -> bytes | None:
        """The chunk packed, if that makes its transfer shorter; None to send it as it is."""
        rate = self.bytes_per_s
        if rate is None or rate > FAST_BYTES_PER_S:
            return None
        begin_s = host.thread_cpu_s()  # what it costs, not how long others kept the processor
        saving = sample_saving(chunk)
        spent_s = max(1e-6, host.thread_cpu_s() - begin_s)
        if not pays(saving, min(SAMPLE_BYTES, chunk.nbytes) / spent_s, rate):
            return None
        return pack(chunk)


def pays(saving: float, packing_bytes_per_s: float, link_bytes_per_s: float) -> bool:
    """Whether the seconds saved on the path are worth those of two processors."""
    cost_s_per_byte = MARGIN * BOTH_WAYS / packing_bytes_per_s
    return saving >= SAVING_MIN and saving / link_bytes_per_s > cost_s_per_byte
