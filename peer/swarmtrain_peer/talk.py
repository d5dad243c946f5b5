"""The asking side of ``writer.py``: a text from the swarm, piece by piece."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from swarmtrain_peer.control import ControlClosed, ControlTimeout, error_from_dict

Document = dict[str, Any]

CALL_TIMEOUT_S = 15.0
PIECE_TIMEOUT_S = 60.0
"""Beyond what the peer process itself waits for one token."""


class Client(Protocol):
    """The part of ``ControlClient`` that is needed; one text at a time for each connection."""

    def call(self, name: str, args: Document | None = None, timeout_s: float = 30.0) -> Document:
        """Make one call."""

    def subscribe(self, callback: Callable[[Document], None]) -> None:
        """Hear pushes."""

    def on_close(self, callback: Callable[[], None]) -> None:
        """Hear the end."""


class Talk:
    """One text. ``begun`` is the peer process's answer to the request (``writer.generate``).

    Raises:
        SwarmError: the typed refusal.
    """

    def __init__(self, client: Client, args: Document) -> None:
        self._pushes: queue.SimpleQueue[Document | None] = queue.SimpleQueue()
        self._timeout_s = float(args.get("timeout_s") or 0.0) + PIECE_TIMEOUT_S
        client.subscribe(self._pushed)
        client.on_close(lambda: self._pushes.put(None))
        self.begun = client.call("generate", args, CALL_TIMEOUT_S)

    def _pushed(self, push: Document) -> None:
        if push.get("event") == "generated":
            self._pushes.put(push)

    def pieces(self) -> Iterator[Document]:
        """Each token's ``token``, ``text`` and ``version``, and last the one with ``finish``.

        Raises:
            SwarmError: why it went no further.
            ControlClosed: the peer process went away.
        """
        while True:
            try:
                push = self._pushes.get(timeout=self._timeout_s)
            except queue.Empty:
                why = f"waited {self._timeout_s:g} s"
                raise ControlTimeout("the peer process says nothing more", why) from None
            if push is None:
                raise ControlClosed(
                    "the peer process went away", "before the text was done", "try again"
                )
            if push.get("error"):
                raise error_from_dict(push["error"])
            yield push
            if push.get("finish"):
                return
