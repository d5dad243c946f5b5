"""Events for user code: kept from any thread, handed out on the training thread.

Callbacks run between two steps, or while the hook waits, so that user code needs no locks. What
they take is their own time: it is measured, and does not count as time that the hook has blocked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from swarmtrain.training.port import Document
from swarmtrain_peer import host

Callback = Callable[[Document], None]

EVENTS_KEPT_MAX = 1024


class Mailbox:
    """``seen`` hears of each event before user code does; ``any`` gets all of them."""

    def __init__(
        self, seen: Callable[[str, Document], None], any_event: Callback | None = None
    ) -> None:
        self._seen = seen
        self._any = any_event
        self._callbacks: dict[str, list[Callback]] = {}
        self._events: deque[tuple[str, Document]] = deque(maxlen=EVENTS_KEPT_MAX)
        self.spent_s = 0.0
        """In callbacks while the hook waited; set back by whoever counts it."""

    def on(self, name: str, callback: Callback) -> None:
        """Have ``callback`` called for each event of that name."""
        self._callbacks.setdefault(name, []).append(callback)

    def put(self, name: str, fields: Document) -> None:
        """From any thread: keep an event until the training thread comes by."""
        self._events.append((name, fields))

    def deliver(self) -> None:
        """On the training thread."""
        while self._events:
            name, fields = self._events.popleft()
            self._seen(name, fields)
            document = {"event": name, **fields}
            if self._any is not None:
                self._any(document)
            for callback in self._callbacks.get(name, ()):
                callback(document)

    def deliver_while_waiting(self) -> None:
        """Callbacks may work meanwhile, and that is not time the hook has blocked."""
        if self._events:
            began_s = host.mono_s()
            self.deliver()
            self.spent_s += host.mono_s() - began_s
