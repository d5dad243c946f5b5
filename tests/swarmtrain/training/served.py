"""A fake peer process behind a real control socket, in a real site folder."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from swarmtrain_peer.config import PeerConfig
from swarmtrain_peer.control import Document
from swarmtrain_peer.controlserver import ControlBackend, ControlConnection, ControlServer
from swarmtrain_peer.site import Site, found_site
from swarmtrain_protocols.manifest import RunKeys
from tests.loop_thread import LoopThread
from tests.swarmtrain.training.fake_peer import FakeRun, FakeSite


class Backend:
    """Hands calls to a fake site; ``ping`` is for whoever looks whether the site is live."""

    def __init__(self, site: FakeSite) -> None:
        self.site = site
        self.said: list[tuple[str, Document]] = []
        self.server: ControlServer | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.handed_over = threading.Event()

    def push(self, document: Document) -> None:
        """Push to every client, from any thread."""
        assert self.loop is not None and self.server is not None
        self.loop.call_soon_threadsafe(self.server.push_all, document)

    async def call(self, name: str, args: Document, connection: ControlConnection) -> Document:
        self.said.append((name, args))
        if name in ("ping", "finished"):
            if name == "finished":
                connection.push({"event": "evaluate", "round": 0})
            return {}
        answer = await asyncio.get_running_loop().run_in_executor(None, self.site.call, name, args)
        if name == "handover":
            self.handed_over.set()
        if name == "evaluated":
            self.site.port.set_should_stop("the test is over")
        return answer


@contextmanager
def serving(
    site: Site, backend: ControlBackend
) -> Iterator[tuple[asyncio.AbstractEventLoop, ControlServer]]:
    """The control socket of ``site``, served until the block ends; and by which loop."""
    with closing(LoopThread()) as thread:
        server = ControlServer(site.control_path, backend)
        thread.do(server.start())
        try:
            yield thread.loop, server
        finally:
            thread.do(server.close())


@contextmanager
def served(
    folder: Path, resolved: Document | None = None, **keys: Any
) -> Iterator[tuple[Site, FakeRun, Backend]]:
    """A founded site in ``folder`` whose control socket is served until the block ends."""
    site = found_site(folder / "home", RunKeys(**keys), PeerConfig())
    run = FakeRun(folder, 1, resolved, **keys)
    backend = Backend(run.sites["site0"])
    with serving(site, backend) as (backend.loop, backend.server):
        yield site, run, backend
