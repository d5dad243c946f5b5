"""Which control links exist, and which of two to the same peer is kept.

Two peers keep one link. If both dial at once, the smaller identity decides: it goes on with its own
connection once that has reached the other, else it takes the one that came in; the larger one takes
what comes in. If a link is open and the same identity comes again, the old link must answer a ping
at once, or the new one replaces it: a restarted peer gets in, a second live process with the same
key does not.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from swarmtrain_peer.link import Link
from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.messages.session import Hello
from swarmtrain_protocols.session_events import Closed


class LinkUser(Protocol):
    """Who hears of links that are kept."""

    def link_opened(self, link: Link, peer: PeerId, hello: Hello) -> None: ...

    def link_closed(self, link: Link, peer: PeerId, event: Closed) -> None: ...

    def link_refused(self, link: Link, event: Closed) -> None:
        """An inbound connection of an authenticated peer was turned away."""


class LinkTable:
    """Open links by peer, and those that may become one. Runs on the loop thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, own: PeerId, user: LinkUser) -> None:
        self.links: dict[PeerId, Link] = {}
        self.half_open: dict[Link, str] = {}
        """With the block of hosts that they come from, \"\" for our own dials."""
        self.inbound = 0
        self._loop = loop
        self._own = own
        self._user = user
        self._outgoing: dict[PeerId, Link] = {}
        self._challengers: dict[PeerId, Link] = {}
        self._probes: dict[PeerId, int] = {}

    def dialling(self, peer: PeerId, link: Link) -> None:
        """A connection of ours has reached an address of ``peer``."""
        self._outgoing.setdefault(peer, link)

    def identified(self, link: Link, peer: PeerId) -> None:
        """The other side has proven who it is."""
        if not link.initiator:
            return
        other = self.links.get(peer) or self._outgoing.setdefault(peer, link)
        if other is not link:
            link.follow(other.outcome, "there is a link already")

    def held(self, link: Link, peer: PeerId) -> None:
        """An admitted peer wants in: settle it with the link or the dial that there is."""
        now = self._loop.time()
        old = self.links.get(peer)
        if peer in self._challengers:
            link.session.refuse(now, "busy", "another connection is being judged")
        elif old is not None:
            self._challengers[peer] = link
            self._probes[peer] = old.session.probe(now)
            old.wake()
            wait_s = max(limits.DUPLICATE_PROBE_S, 4 * (old.session.rtt_s or 0.0))
            self._loop.call_later(wait_s, self._replace, old, peer, self._probes[peer])
        elif peer in self._outgoing and self._own < peer:
            self._challengers[peer] = link
        else:
            dial = self._outgoing.pop(peer, None)
            link.session.accept(now)
            if dial is not None:
                dial.follow(link.outcome, "both sides dialled")

    def ponged(self, link: Link, nonce: int) -> None:
        """An open link has answered a ping: perhaps it has to make way no more."""
        peer = link.peer
        if peer is not None and self.links.get(peer) is link and self._probes.get(peer) == nonce:
            self._settle(peer, accept=False)

    def opened(self, link: Link, peer: PeerId, hello: Hello) -> None:
        """The handshake is over on both sides."""
        assert peer not in self.links, "two links to one peer"
        self.half_open.pop(link, None)
        if self._outgoing.get(peer) is link:
            del self._outgoing[peer]
        self.links[peer] = link
        self._settle(peer, accept=False)
        if not link.outcome.done():
            link.outcome.set_result(peer)
        self._user.link_opened(link, peer, hello)

    def closed(self, link: Link, event: Closed) -> None:
        """A link is over, open or not."""
        self.half_open.pop(link, None)
        if not link.initiator:
            self.inbound -= 1
        peer = link.peer
        if peer is None:  # a dial whose other side never said who it is
            peer = next((p for p, dial in self._outgoing.items() if dial is link), None)
        if peer is None:
            return
        if self._challengers.get(peer) is link:
            del self._challengers[peer]
            self._probes.pop(peer, None)
        if self.links.get(peer) is link:
            del self.links[peer]
            self._user.link_closed(link, peer, event)
            self._settle(peer, accept=True)
        elif self._outgoing.get(peer) is link:
            del self._outgoing[peer]
            self._settle(peer, accept=True)
        elif not link.initiator and event.code not in ("duplicate", "busy", "disconnected"):
            self._user.link_refused(link, event)

    def _replace(self, old: Link, peer: PeerId, nonce: int) -> None:
        if self.links.get(peer) is old and self._probes.get(peer) == nonce:
            old.session.close(self._loop.time(), "replaced", "the peer came back")
            old.wake()  # its end lets the new one in

    def _settle(self, peer: PeerId, accept: bool) -> None:
        """Decide on the link that waits for this peer, if there is one."""
        self._probes.pop(peer, None)
        challenger = self._challengers.pop(peer, None)
        if challenger is None or challenger.session.closed:
            return
        if accept:
            challenger.session.accept(self._loop.time())
        else:
            why = "a live connection with this identity is open"
            challenger.session.refuse(self._loop.time(), "duplicate", why)
        challenger.wake()
