"""What comes in from the transport, and who of a peer process hears of it.

Until the node runs, what is meant for it is kept and handed over in order when it begins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarmtrain_peer import host
from swarmtrain_peer.admission import FINAL, TurnedAway, refused_error
from swarmtrain_peer.enquiry import Enquiry
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.messages import member as mm
from swarmtrain_protocols.messages.session import Hello

if TYPE_CHECKING:
    from swarmtrain_peer.runtime import PeerRuntime


class Arrivals:
    """The ``handler.TransportHandler`` of a ``PeerRuntime``."""

    def __init__(self, runtime: PeerRuntime) -> None:
        self._runtime = runtime
        self._early: list[tuple[str, tuple[object, ...]]] = []
        self._begun = False
        self._turned_away = TurnedAway()
        self.enquiry: Enquiry

    def begin(self) -> None:
        """The node runs: give it what came before."""
        self._begun = True
        for name, args in self._early:
            getattr(self._runtime.driver, name)(*args)
        self._early.clear()

    def _pass(self, name: str, *args: object) -> None:
        if self._begun:
            getattr(self._runtime.driver, name)(*args)
        else:
            self._early.append((name, args))

    def connected(self, peer: PeerId, hello: Hello, outgoing: bool) -> None:
        self._runtime.events.emit("peer_connected", peer=peer.hex(), peer_name=hello.name)
        if hello.listen:
            self._runtime.transport.learn(peer, hello.listen)
        self._runtime.outreach.connected(peer, hello)
        self._runtime.time.connected(peer, hello.wall_s)
        self._pass("connected", peer, hello, outgoing)
        for listener in self._runtime.link_listeners:
            listener(peer)

    def disconnected(self, peer: PeerId, code: str, reason: str) -> None:
        self._runtime.events.emit("peer_disconnected", peer=peer.hex(), reason=f"{code}: {reason}")
        self._runtime.outreach.disconnected(peer)
        self._runtime.time.disconnected(peer)
        self._pass("disconnected", peer, code, reason)

    def answered(self, peer: PeerId, rtt_s: float) -> None:
        if self._begun:
            self._runtime.driver.answered(peer, rtt_s)

    def message(self, peer: PeerId, message: Message) -> None:
        if isinstance(message, mm.ManifestReply):
            self.enquiry.heard(message)
            return
        if self._runtime.outreach.message(peer, message):
            return
        if isinstance(message, mm.Metrics):
            if peer == message.member:
                for listener in self._runtime.metrics_listeners:
                    listener(peer, message.body)
            return
        if isinstance(message, mm.SnapshotOffer):
            for heard in self._runtime.offer_listeners:
                heard(peer, message)
        self._pass("message", peer, message)

    def turned_away(self, address: str, peer: PeerId | None, code: str, reason: str) -> None:
        fields = {"reason": f"{code}: {reason}", "address": address}
        self._runtime.events.emit("link_refused", peer=peer.hex() if peer else "", **fields)

    def refused(self, address: str, peer: PeerId | None, code: str, reason: str) -> None:
        self.turned_away(address, peer, code, reason)
        if peer is not None:
            self._pass("unreachable", peer)
        # What one peer says ends nobody whom the log lists as a member.
        listed = self._begun and self._runtime.node.joiner.is_member
        linked = self._runtime.transport.connected_peers()
        if code in FINAL and (
            not listed or self._turned_away.found(self._runtime.node, peer, code, linked)
        ):
            self._runtime.fail(refused_error(code, address))

    def peer_fault(self, peer: PeerId | None, code: str, why: str) -> None:
        self._runtime.peer_fault(peer, code, why)

    def fetched(self, ticket: int) -> None:
        self._pass("fetched", ticket, self._runtime.transport.proven_leaves)

    def fetch_failed(self, ticket: int, reason: str) -> None:
        self._pass("fetch_failed", ticket, reason)

    def sent(self, root: bytes, nbytes: int, begin_s: float) -> None:
        self._runtime.clock.sent(root, nbytes, begin_s, host.mono_s())

    def broken(self, error: BaseException) -> None:
        self._runtime.fail(error)
