"""What happened, as one hash: equal seeds must give equal traces on every machine."""

from __future__ import annotations

import struct
from collections import deque

import blake3

HASHED_EVENTS = 512
_HEAD = struct.Struct("<dHHI")
RECENT_EVENTS = 400
"""Events kept in readable form for the report of a failure."""


class Trace:
    """BLAKE3 over (time, node, kind, bytes) of every event, in order."""

    def __init__(self) -> None:
        self._hash = blake3.blake3()
        self._waiting: list[tuple[float, str, str, bytes]] = []
        """Recorded and not hashed yet: long runs of bytes are hashed several times as fast."""
        self._recent: deque[tuple[float, str, str, bytes]] = deque(maxlen=RECENT_EVENTS)
        self.events = 0

    def record(self, time_s: float, node: str, kind: str, data: bytes = b"") -> None:
        """Add one event. ``data`` is hashed with its length, so that events cannot run together."""
        self.events += 1
        self._waiting.append((time_s, node, kind, data))
        if len(self._waiting) >= HASHED_EVENTS:
            self._hash_waiting()

    def _hash_waiting(self) -> None:
        pieces: list[bytes] = []
        for time_s, node, kind, data in self._waiting:
            pieces.append(_HEAD.pack(time_s, len(node), len(kind), len(data)))
            pieces.append((node + kind).encode())
            pieces.append(data)
        self._hash.update(b"".join(pieces))
        self._recent += self._waiting
        self._waiting.clear()

    def digest(self) -> str:
        """Hex hash of everything recorded so far."""
        self._hash_waiting()
        return self._hash.hexdigest()

    def tail(self, count: int = 40) -> list[str]:
        """The last events, for people."""
        self._hash_waiting()
        lines = list(self._recent)[-count:]
        return [f"{t:10.4f} {node:10} {kind} {data[:48]!r}" for t, node, kind, data in lines]
