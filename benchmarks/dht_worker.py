"""One process of `dht.py`: a member of a run without training, `swarmtrain.Peer` as it ships.

Only the compiled codecs are not loaded, because thirty-two processes would spend a minute on them
and the DHT has no use for them. Commands come as JSON lines on standard input, answers go out as
JSON lines. Times are those of the blocking public call.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import sys
import time
from pathlib import Path

from swarmtrain_peer.peer import Peer
from swarmtrain_peer.settings import PeerSettings


class LeanPeer(Peer):
    """Without numba; everything else is the product's."""

    def _settings(
        self, ticket: str | None, listen: str, name: str | None, identity: str | Path | None
    ) -> PeerSettings:
        settings = super()._settings(ticket, listen, name, identity)
        return dataclasses.replace(settings, fast_kernels=False, threads=1)

    def known(self, contacts: int, limit_s: float) -> None:
        """Return once so many other nodes are in the routing table, or after ``limit_s``."""
        self._call(self._known(contacts, limit_s), limit_s + 5)

    def rest(self, limit_s: float) -> None:
        """Return once this node waits for no answer any more, or after ``limit_s``."""
        self._call(self._rest(limit_s), limit_s + 5)

    def contacts(self) -> int:
        return len(self._runtime.node.dht.table)

    def links(self) -> int:
        return len(self._runtime.transport.connected_peers())

    async def _known(self, contacts: int, limit_s: float) -> None:
        linked = asyncio.Event()

        def listener(_: object) -> None:
            linked.set()

        listeners = self._runtime.link_listeners
        listeners.append(listener)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while self.contacts() < contacts:
                    linked.clear()
                    await linked.wait()
        listeners.remove(listener)

    async def _rest(self, limit_s: float) -> None:
        dht = self._runtime.node.dht
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while len(dht.requests) or len(dht.searches):  # noqa: ASYNC110, no event tells
                    await asyncio.sleep(POLL_S)


POLL_S = 0.002


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def main(name: str, ticket: str | None) -> None:
    began = time.perf_counter()
    peer = LeanPeer.start(ticket=ticket, name=name)
    say(ticket=peer.ticket, id=peer.id, join_s=time.perf_counter() - began)
    for line in sys.stdin:
        what = json.loads(line)
        begin = time.perf_counter()
        if what["do"] == "store":
            peer.dht.store(what["key"], what["value"], 600.0)
            say(took_s=time.perf_counter() - begin)
        elif what["do"] == "get":
            value = peer.dht.get(what["key"])
            say(took_s=time.perf_counter() - begin, value=value)
        elif what["do"] == "rest":
            peer.rest(what["limit_s"])
            say()
        else:
            peer.known(what["contacts"], what["limit_s"])
            say(contacts=peer.contacts(), links=peer.links())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
