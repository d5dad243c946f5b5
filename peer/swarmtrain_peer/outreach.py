"""How others reach this site, and how it reaches those that nobody can dial (spec 14).

Puts the reachability check and relaying together with the peer: what the check finds becomes the
site's record in the log, and what the log says of a member decides whether a relay is asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from swarmtrain_peer import host
from swarmtrain_peer.events import EventLog
from swarmtrain_peer.portmapping import PortMapper
from swarmtrain_peer.reaching import Reaching
from swarmtrain_peer.relaying import Relaying
from swarmtrain_peer.settings import PeerSettings
from swarmtrain_peer.transport import Transport
from swarmtrain_protocols import limits, reach, relay
from swarmtrain_protocols.addresses import is_private, join_address, split_address
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.messages import reach as rm
from swarmtrain_protocols.messages.session import Hello
from swarmtrain_protocols.node import NodeCore
from swarmtrain_protocols.portmap import Mapped, NotMapped
from swarmtrain_protocols.relocation import relocate

FIRST_VERDICT_S = 4.0
"""A newcomer says in the log whether it can be dialled; it waits this long to know."""

LOOK_S = 0.01
DOORS_MAX = 3
_OF_REACH = (rm.DialBackRequest, rm.DialBack)
_OF_RELAY = (rm.RelayRequest, rm.RelayReply, rm.RelayOffer)


class Outreach:
    """One per peer: ``start`` when the transport listens, ``serve`` when there is a node."""

    def __init__(self, settings: PeerSettings, transport: Transport, events: EventLog) -> None:
        self.addresses: tuple[str, ...] = ()
        """Where others can dial this site, as far as anybody knows."""
        self._settings = settings
        self._transport = transport
        self._events = events
        self._me = transport.peer_id
        self._node: NodeCore | None = None
        self._run: Callable[[Callable[[float], object]], None] = lambda call: None
        self._claimed: tuple[str, ...] = ()
        self._tasks: set[asyncio.Task[None]] = set()
        self._mapper: asyncio.Task[None] | None = None
        self._mapped: Mapped | None = None
        self._started = False

    def start(self, claimed: tuple[str, ...]) -> None:
        """The transport listens; ``claimed``: where others are told to dial, empty: nowhere."""
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._claimed = self.addresses = claimed
        self.reaching = Reaching(loop, self._transport, self._spawn, self._judged)
        wish = self._settings.relay
        serves = wish == "yes" or (wish == "auto" and not self._settings.trains)
        core = relay.Relay(
            me=self._me,
            entropy=host.entropy,
            dialled_by_others=self.can_be_dialled,
            relays=serves and bool(claimed),
            uses=wish != "no",
        )
        self.relaying = Relaying(loop, self._transport, core, self._spawn, self._tell)
        self._transport.no_route = lambda peer: self.relaying.pump.run(core.want, peer)
        self._transport.open_relayed = self.relaying.bulk
        self._transport.doorway.doors = {
            reach.PREFACE: self.reaching.door,
            relay.PREFACE: self.relaying.door,
        }
        self._started = True
        self.reaching.pump.run(self.reaching.core.listen, claimed)

    def serve(self, node: NodeCore, run: Callable[[Callable[[float], object]], None]) -> None:
        """The node is there: its log tells who can be dialled, and is told what is found here.

        ``run(call)`` calls ``call(now)`` and carries out what the node asks for.
        """
        self._node, self._run = node, run
        self._run(lambda now: relocate(node, now, self.addresses))

    def can_be_dialled(self, peer: PeerId) -> bool | None:
        """As the log says; None: a stranger."""
        known = None if self._node is None else self._node.ledger.members.get(peer)
        return None if known is None else known.reachable

    @property
    def features(self) -> tuple[str, ...]:
        """For the hello: what this site does for others."""
        relays = self._started and self.relaying.core.relays
        return (relay.FEATURE,) if relays and self.verdict.state != "outgoing only" else ()

    @property
    def verdict(self) -> reach.Verdict:
        return self.reaching.core.verdict if self._started else reach.Verdict()

    async def first_verdict(self) -> None:
        """Wait until those who were asked have tried to dial this site, not for long."""
        until_s = host.mono_s() + FIRST_VERDICT_S
        for _ in range(int(FIRST_VERDICT_S / LOOK_S)):
            settled = self.verdict.state != "unknown" or not self.reaching.core.waits
            if settled or host.mono_s() >= until_s:
                return  # if nobody knows it goes on as it claims, and the check goes on too
            await asyncio.sleep(LOOK_S)

    # -- what the peer tells -----------------------------------------------------------------------

    def connected(self, peer: PeerId, hello: Hello) -> None:
        link = self._transport.route(peer)
        if link is None or not self._started:
            return
        direct = link.via is None
        self.reaching.connected(peer)
        core, relays = self.relaying.core, relay.FEATURE in hello.features
        self.relaying.pump.run(core.connected, peer, relays=relays, direct=direct)
        if link.via is not None:
            self._events.emit("link_relayed", peer=peer.hex(), via=link.via.hex())

    def disconnected(self, peer: PeerId) -> None:
        if self._started:
            self.reaching.pump.run(self.reaching.core.disconnected, peer)
            self.relaying.pump.run(self.relaying.core.disconnected, peer)

    def message(self, peer: PeerId, message: Message) -> bool:
        """True if it was for this part of the site."""
        part: Reaching | Relaying
        if isinstance(message, _OF_REACH):
            part = self.reaching
        elif isinstance(message, _OF_RELAY):
            part = self.relaying
        else:
            return False
        try:
            part.pump.run(part.core.receive, peer, message)
        except PeerFault as fault:
            self._events.emit("peer_fault", peer=peer.hex(), fault=fault.code, why=fault.why)
        return True

    async def close(self) -> None:
        if self._started:
            self.reaching.pump.close()
            self.relaying.close()
        for task in self._tasks:
            task.cancel()
        if self._mapper is not None:
            self._mapper.cancel()  # which gives the mapping back
            await asyncio.wait([self._mapper], timeout=limits.UPNP_TIMEOUT_S)

    # -- what is found -----------------------------------------------------------------------------

    def _judged(self, verdict: reach.Verdict) -> None:
        fields = {"state": verdict.state, "agree": verdict.agree, "asked": verdict.asked}
        self._events.emit("reachability", **fields, seen=verdict.seen)
        node = self._node
        if verdict.state == "outgoing only":
            self._ask_the_gateway()
        if verdict.state != "unknown":
            self.addresses = self._found(verdict)
            if node is not None:
                self._run(lambda now: relocate(node, now, self.addresses))

    def _ask_the_gateway(self) -> None:
        """Others cannot dial this site, but perhaps its router sends a port on to it."""
        wanted = self._settings.port_mapping and self._claimed and not self._settings.announce
        if not wanted or self._mapper is not None or "." not in self._claimed[0]:
            return
        client, port = split_address(self._claimed[0])
        if client.startswith("127.") or not is_private(self._claimed[0]):
            return
        work = PortMapper(host.default_gateway(), client, port, self._mapping_changed).run()
        self._mapper = self._loop.create_task(work)

    def _mapping_changed(self, news: Mapped | NotMapped) -> None:
        """A mapped port is a claim like another: others have to try it."""
        before = self._mapped
        self._mapped = news if isinstance(news, Mapped) else None
        if isinstance(news, Mapped):
            address = join_address(news.external, news.port)
            fields = {"protocol": news.protocol, "lease_s": news.lease_s}
            self._events.emit("port_mapped", address=address, **fields)
            claims: tuple[str, ...] = (address, *self._claimed)
        else:
            self._events.emit("port_mapping_failed", reason=news.reason)
            claims = self._claimed
        if before is not None or self._mapped is not None:
            self.reaching.pump.run(self.reaching.core.listen, claims)

    def _found(self, verdict: reach.Verdict) -> tuple[str, ...]:
        if verdict.state == "outgoing only":
            return ()
        seen = join_address(verdict.seen, verdict.port) if verdict.seen and verdict.port else ""
        if seen and not is_private(seen) and not self._settings.announce:
            private = tuple(a for a in self._claimed if a != seen)
            return (seen, *private)[:2]
        return self._claimed

    def _tell(self, event: object) -> None:
        if isinstance(event, relay.Relayed):
            fields = {"peer": event.a.hex(), "other": event.b.hex(), "bytes": event.nbytes}
            name = "relay_ended" if event.code else "relay_began"
            self._events.emit(name, **fields, reason=event.code)
        elif isinstance(event, relay.RelayFailed):
            self._events.emit("relay_failed", peer=event.peer.hex(), reason=event.code)

    def document(self) -> dict[str, Any]:
        """For ``status``."""
        verdict, core = self.verdict, self.relaying.core
        return {
            "reachability": {
                "state": verdict.state,
                "agree": verdict.agree,
                "asked": verdict.asked,
                "seen": verdict.seen or None,
                "mapped": self._mapped.protocol if self._mapped is not None else None,
            },
            "relay": {
                "serves": core.relays,
                "streams": core.streams,
                "relayed_bytes": core.relayed_bytes,
            },
        }

    def doors(self) -> tuple[str, ...]:
        """Addresses for a ticket: this site's, or of members that can be dialled, stewards first.

        Any member lets newcomers in, so a site that nobody can dial can still invite them.
        """
        if self.addresses or self._node is None:
            return self.addresses
        ledger = self._node.ledger
        open_ = [m for m in ledger.ordered_members() if m.reachable and m.addresses]
        open_.sort(key=lambda m: (m.id not in ledger.voters, m.joined_index, m.ordinal))
        return tuple(dict.fromkeys(m.addresses[0] for m in open_))[:DOORS_MAX]

    def path(self, peer: PeerId, recorded: bool) -> dict[str, Any]:
        """For ``peers``: how this site is linked to a member, and what is known of reaching it.

        What the log records is the member's own claim, checked by others before it entered; this
        site knows only of those whom it has dialled itself.
        """
        link = self._transport.route(peer)
        via = None if link is None else link.via
        state = "unknown" if recorded else "outgoing only"
        if peer == self._me:
            state = self.verdict.state
        elif recorded and link is not None and link.initiator and via is None:
            state = "reachable"
        return {
            "reachability": state,
            "path": None if link is None else "direct" if via is None else "relayed",
            "via": None if via is None else via.hex(),
        }

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
