"""Where the processes of a chaos run live, and what can be done to the paths between them.

``Plain``: loopback, and nothing can be done. ``Proxied``: loopback with a proxy in front of every
listener. ``Namespaces``: a network namespace for each site with a router between them, token
buckets of the kernel for rates, and packets that the router drops for partitions; Linux, as root.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

import psutil

from tests.swarm.homenat import Lab, inside
from tests.swarm.proxy import Proxy, Struck

Document = dict[str, Any]
Pairs = frozenset[tuple[str, str]]


def can_have_namespaces() -> bool:
    """Whether this process may make them."""
    return sys.platform == "linux" and os.geteuid() == 0 and os.path.exists("/run/netns/..")


class Plain:
    """Loopback as it is."""

    name = "loopback"

    def config(self, site: str) -> Document:
        """Peer keys of a site that is about to be made."""
        return {"listen": "127.0.0.1:0"}

    def launching(self, site: str) -> contextlib.AbstractContextManager[None]:
        """Processes that are started meanwhile are where the site is."""
        return contextlib.nullcontext()

    def listens(self, site: str, port: int) -> None:
        """The site's peer process listens there now."""

    def cut(self, pairs: Pairs) -> None:
        """From now on nothing gets from the first to the second of each pair."""
        raise NotImplementedError("a ground with paths of its own is needed")

    def rate(self, site: str, bits_per_s: int) -> None:
        """Both directions of a site; 0: as fast as it can."""
        raise NotImplementedError("a ground with paths of its own is needed")

    def close(self) -> None:
        """Leave nothing behind."""


class Proxied(Plain):
    """``pids`` tells the processes of each site, so that a proxy knows who has dialled."""

    name = "loopback, proxies"

    def __init__(self, pids: Callable[[], dict[str, int]]) -> None:
        self.proxies: dict[str, Proxy] = {}
        self._pids = pids

    def config(self, site: str) -> Document:
        proxy = self.proxies[site] = Proxy(site, self._who)
        return {"listen": "127.0.0.1:0", "announce": (proxy.address,)}

    def _who(self, port: int) -> str:
        for site, pid in self._pids().items():
            with contextlib.suppress(psutil.Error):
                for connection in psutil.Process(pid).net_connections("tcp4"):
                    if connection.laddr and connection.laddr.port == port:
                        return site
        return ""

    def listens(self, site: str, port: int) -> None:
        self.proxies[site].target_port = port

    def cut(self, pairs: Pairs) -> None:
        for proxy in self.proxies.values():
            proxy.cut = pairs

    def rate(self, site: str, bits_per_s: int) -> None:
        self.proxies[site].bytes_per_s = bits_per_s / 8

    def struck(self) -> list[tuple[str, Struck]]:
        """What has hit connections so far, by whose listener."""
        return [(site, one) for site, proxy in self.proxies.items() for one in proxy.struck]

    def close(self) -> None:
        for proxy in self.proxies.values():
            proxy.close()


class Namespaces(Plain):
    """One namespace for each site, each with an address of its own network."""

    name = "network namespaces"

    def __init__(self) -> None:
        self._lab = Lab()
        self._lab.__enter__()
        self._addresses: dict[str, str] = {}
        self._namespaces: dict[str, str] = {}

    def config(self, site: str) -> Document:
        address = f"44.{len(self._addresses) + 1}.0.1"
        self._addresses[site] = address
        self._namespaces[site] = self._lab.public(address)
        return {"listen": f"{address}:0"}

    def launching(self, site: str) -> contextlib.AbstractContextManager[None]:
        return inside(self._namespaces[site])

    def cut(self, pairs: Pairs) -> None:
        addresses = self._addresses
        self._lab.cut({(addresses[a], addresses[b]) for a, b in pairs if {a, b} <= set(addresses)})

    def rate(self, site: str, bits_per_s: int) -> None:
        self._lab.shape(self._addresses[site], bits_per_s)

    def close(self) -> None:
        self._lab.__exit__()
