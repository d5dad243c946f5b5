"""Answers what peers ask of a node about membership: the manifest, joining, leaving, proposals.

Any node hands out the manifest and says who leads; the rest is for the leader's shepherd. Whoever
asks need not be a member, so nothing is remembered about strangers.
"""

from __future__ import annotations

from collections.abc import Callable

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.access import founder_of
from swarmtrain_protocols.changes import check_change
from swarmtrain_protocols.core import Effect, Emit, PeerId, Send
from swarmtrain_protocols.errors import ConfigError, PeerFault
from swarmtrain_protocols.ledger import Ledger, valid_model
from swarmtrain_protocols.log.anchor import heir_of
from swarmtrain_protocols.manifest import Manifest
from swarmtrain_protocols.membership import Joiner, Shepherd
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.messages import member as mm
from swarmtrain_protocols.messages.log import Deed
from swarmtrain_protocols.node_events import JoinFailed
from swarmtrain_protocols.orders import EVICTED, ORDERS, is_authorised
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.leader import RoundLeader

_MAY_PROPOSE = e.ModelDefined | e.DataDefined | e.CheckpointMade | e.StageRecovered


class Reception:
    """``leader`` is kept up to date by the node."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        manifest: Manifest,
        out: list[Effect],
        joiner: Joiner,
        shepherd: Shepherd,
        rounds: RoundLeader,
        propose: Callable[[float, e.EntryBody], bool],
        verify: Callable[[bytes, bytes, bytes, bytes], bool],
    ) -> None:
        self.ledger = ledger
        self.leader: PeerId | None = None
        self._manifest = manifest
        self._out = out
        self._joiner = joiner
        self._shepherd = shepherd
        self._rounds = rounds
        self._propose = propose
        self._verify = verify

    def receive(self, now: float, peer: PeerId, message: Message) -> None:
        if isinstance(message, mm.ManifestRequest):
            if message.run == self._manifest.run_id:
                self._out.append(Send(peer, mm.ManifestReply(self._manifest.to_bytes())))
        elif isinstance(message, mm.Redirect | mm.JoinRefused):
            self._answered(now, peer, message)
        elif isinstance(message, mm.JoinRequest):
            self._join_request(now, peer, message)
        elif not self._shepherd.active or peer not in self.ledger.members:
            return
        elif isinstance(message, mm.LeaveRequest):
            self._rounds.leaving(peer)
            self._shepherd.leave(now, peer, message.reason, message.at_once)
        elif isinstance(message, mm.Finished):
            self._shepherd.finished(now, peer, message.finished)
        elif isinstance(message, mm.Propose):
            self._proposed(now, peer, message)

    def _answered(self, now: float, peer: PeerId, message: mm.Redirect | mm.JoinRefused) -> None:
        """Only whom this node has asked may send it elsewhere, or away."""
        if not self._joiner.asked(peer):
            if isinstance(message, mm.JoinRefused):
                # An earlier life of this site may have asked, so nobody is accused.
                fields: dict[str, object] = {"peer": peer.hex(), "reason": "unexpected"}
                self._out.append(Emit(fx.Notice("message_ignored", fields)))
        elif self._joiner.refused:
            return  # once is enough
        elif isinstance(message, mm.Redirect):
            self._joiner.redirected(now, message)
        else:
            self._joiner.refused = message.code
            self._out.append(Emit(JoinFailed(message.code, message.reason)))

    def _join_request(self, now: float, peer: PeerId, message: mm.JoinRequest) -> None:
        if self._shepherd.active:
            self._rounds.returned(peer)
            self._shepherd.join(now, peer, message)
            return
        known = self.ledger.members.get(self.leader) if self.leader is not None else None
        addresses = known.addresses if known is not None else ()
        self._out.append(Send(peer, mm.Redirect(self.leader or b"", addresses)))

    def _proposed(self, now: float, peer: PeerId, message: mm.Propose) -> None:
        """Members may ask for a few kinds of entries; anything else is a fault of theirs."""
        try:
            body = e.decode_body(message.body)
        except PeerFault as fault:
            self._fault(peer, fault.code)
            return
        if isinstance(body, ORDERS):
            self._ordered(now, peer, message, body)
            return
        if not isinstance(body, _MAY_PROPOSE):
            self._fault(peer, "may_not_propose")
            return
        if isinstance(body, e.ModelDefined):
            if self.ledger.model is not None:
                return
            if body.author != peer or not valid_model(body):
                self._fault(peer, "bad_model")
                return
        if isinstance(body, e.DataDefined):
            if self.ledger.data.dealt:
                return
            if body.author != peer or not self.ledger.data.accepts(body.samples):
                self._fault(peer, "bad_data")
                return
        if isinstance(body, e.StageRecovered) and body.host != peer:
            self._fault(peer, "not_the_host")
            return
        self._propose(now, body)

    def _ordered(self, now: float, peer: PeerId, order: mm.Propose, body: e.EntryBody) -> None:
        """Only the founder gives orders; a steward is turned out once it votes no more."""
        good = is_authorised(
            order,
            founder=founder_of(self.ledger, self._manifest.founder),
            run=self._manifest.run_id,
            index=self.ledger.index,
            verify=self._verify,
        )
        if not good:
            self._fault(peer, "not_the_founder")
        elif not self._fits(body):
            # True when the founder's site looked, and void now: it sees that the log lacks it.
            fields: dict[str, object] = {"peer": peer.hex(), "reason": "order is out of date"}
            self._out.append(Emit(fx.Notice("message_ignored", fields)))
        elif isinstance(body, e.MemberBanned | e.MemberLeft) and body.member in self.ledger.voters:
            self._shepherd.turn_out(now, body)  # first somebody else has its vote
        else:
            self._propose(now, body)

    def _fits(self, body: e.EntryBody) -> bool:
        """Whether an order can still be obeyed; what does not fit is not written at all."""
        if isinstance(body, e.Rewound):
            return body.ordered and body.generation == self.ledger.generation + 1
        if isinstance(body, e.MemberLeft):
            return body.member in self.ledger.members and body.reason.startswith(EVICTED)
        if isinstance(body, e.FounderChanged):
            return self._may_hand_over(body)
        if isinstance(body, e.ConfigChanged):
            keys, args = self._manifest.keys, (body.at_round, body.key, body.value)
            try:
                return check_change(keys, self.ledger, *args) == body.value
            except ConfigError:
                return False
        return True

    def _may_hand_over(self, body: e.FounderChanged) -> bool:
        """Whether the founder of now has signed the deed that would be kept for ever."""
        deeds = [*self.ledger.access.deeds, Deed(body.founder, body.deed)]
        try:
            heir_of(self._manifest.run_id, self._manifest.founder, self._verify, deeds)
        except PeerFault:
            return False
        return len(deeds) <= limits.HANDOVERS_MAX

    def _fault(self, peer: PeerId, code: str) -> None:
        self._out.append(Emit(fx.Notice("peer_fault", {"peer": peer.hex(), "fault": code})))
