"""One control connection: its timer is never later than its session wants."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from swarmtrain_peer.link import Link


class Session:
    """Wants to be called at ``at``, and remembers when it was."""

    initiator = True
    peer = None
    closed = False

    def __init__(self) -> None:
        self.at = float("inf")
        self.ticked = asyncio.Event()

    def deadline(self) -> float:
        return self.at

    def tick(self, now: float) -> None:
        self.at = float("inf")
        self.ticked.set()

    def events(self) -> list[Any]:
        return []

    def data_to_send(self) -> bytes:
        return b""


def test_a_deadline_that_comes_nearer_is_met() -> None:
    """The handshake may take half a minute; a silent peer is asked after seconds."""

    async def run() -> None:
        loop, session = asyncio.get_running_loop(), Session()
        pool = SimpleNamespace(up=None, down=None)
        link = Link(loop, session, lambda *_: None, "there:1", pool)  # type: ignore[arg-type]
        session.at = loop.time() + 600.0
        link._pump()
        session.at = loop.time() + 0.01
        link._pump()
        async with asyncio.timeout(10.0):
            await session.ticked.wait()
        link._timer is None or link._timer.cancel()

    asyncio.run(run())
