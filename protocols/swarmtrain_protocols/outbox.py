"""What waits to be sent on a control link: three queues and the credit that the other side gave.

Frames of the session itself go first and need no credit; messages go before chunks, and some of the
credit is theirs alone, so that a message never waits for chunks that the other side is slow to take
(spec 02).
"""

from __future__ import annotations

from collections import deque

from swarmtrain_protocols import limits

RESERVED_BYTES = limits.CREDIT_WINDOW_BYTES // 4
"""Credit that chunks may not use."""


class SendBudget:
    """What may wait on all links together; each has ``SEND_QUEUE_RESERVED_BYTES`` of its own.

    So peers that do not take what they are sent cost a bounded amount of memory, however many they
    are, and leave the links of the others usable.
    """

    def __init__(self, total_bytes: int = limits.SEND_QUEUES_BYTES_MAX) -> None:
        self.total_bytes = total_bytes
        self.taken_bytes = 0


class Outbox:
    """Whole frames, at most ``SEND_QUEUE_BYTES_MAX`` of messages and chunks."""

    def __init__(self, budget: SendBudget | None = None) -> None:
        self._budget = budget if budget is not None else SendBudget()
        self._shared = 0
        """Bytes of the budget that are taken here."""
        self._urgent: deque[bytes] = deque()
        self._control: deque[bytes] = deque()
        self._chunks: deque[bytes] = deque()
        self._credit = limits.CREDIT_WINDOW_BYTES
        self.nbytes = 0
        """Of all that waits."""
        self.sent_frames = 0

    @property
    def urgent_frames(self) -> int:
        return len(self._urgent)

    def put(self, frame: bytes, *, chunk: bool) -> bool:
        """False, and nothing is kept, if too much waits already."""
        size = self.nbytes + len(frame)
        shared = max(0, size - limits.SEND_QUEUE_RESERVED_BYTES)
        free = self._budget.total_bytes - self._budget.taken_bytes + self._shared
        if size > limits.SEND_QUEUE_BYTES_MAX or shared > free:
            return False
        self._push(self._chunks if chunk else self._control, frame)
        return True

    def put_first(self, frame: bytes) -> None:
        """A frame of the session itself."""
        self._push(self._urgent, frame)

    def put_last(self, frame: bytes) -> None:
        """The goodbye, behind all messages, however many there are."""
        self._push(self._control, frame)

    def granted(self, nbytes: int) -> bool:
        """The other side has taken so many bytes; False if that is more than it was sent."""
        self._credit += nbytes
        return self._credit <= limits.CREDIT_WINDOW_BYTES

    def drop_chunks(self) -> None:
        """The link ends: messages that wait are still sent, chunks are not."""
        self._count(-sum(len(frame) for frame in self._chunks))
        self._chunks.clear()

    def discard(self) -> None:
        """The connection is gone: nothing here will ever be sent."""
        for queue in (self._urgent, self._control, self._chunks):
            queue.clear()
        self._count(-self.nbytes)

    def take(self, max_bytes: int, *, everything: bool = False) -> bytes:
        """Frames of about ``max_bytes`` that may be sent now.

        ``everything``: the link ends, and credit is no longer asked for.
        """
        taken: list[bytes] = []
        size = 0
        while size < max_bytes:
            if self._urgent:
                frame = self._urgent.popleft()
            elif self._control and (len(self._control[0]) <= self._credit or everything):
                frame = self._control.popleft()
                self._credit -= len(frame)
            elif self._chunks and len(self._chunks[0]) + RESERVED_BYTES <= self._credit:
                frame = self._chunks.popleft()
                self._credit -= len(frame)
            else:
                break
            taken.append(frame)
            size += len(frame)
        self._count(-size)
        self.sent_frames += len(taken)
        return b"".join(taken)

    def _push(self, queue: deque[bytes], frame: bytes) -> None:
        queue.append(frame)
        self._count(len(frame))

    def _count(self, nbytes: int) -> None:
        self.nbytes += nbytes
        shared = max(0, self.nbytes - limits.SEND_QUEUE_RESERVED_BYTES)
        self._budget.taken_bytes += shared - self._shared
        self._shared = shared
