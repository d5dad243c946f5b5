"""Turns what the cores report into the site's event log. Reads, never decides."""

from __future__ import annotations

from swarmtrain_peer.events import EventLog
from swarmtrain_protocols import entries as e
from swarmtrain_protocols.dht.events import DhtCrowded, DhtRejoined
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.log.events import Conflict, LeaderChanged, LedgerDiverged, Superseded
from swarmtrain_protocols.node import NodeCore
from swarmtrain_protocols.node_events import JoinFailed, LedgerChanged
from swarmtrain_protocols.rounds import effects as fx


class Narrator:
    """One per peer. ``tell`` knows every event type of the cores; others are ignored."""

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self._closed: e.StepClosed | None = None

    def tell(self, node: NodeCore, event: object) -> None:
        """Log ``event`` with the names of the catalogue."""
        if isinstance(event, LedgerChanged):
            for _, body, accepted in event.entries:
                if accepted:
                    self._entry(body)
                    self._stage(node, body)
        elif isinstance(event, LeaderChanged):
            leader = event.leader.hex() if event.leader is not None else None
            self._events.emit("leader_changed", leader=leader, term=event.term)
        elif isinstance(event, fx.StateAdvanced):
            self._events.emit(
                "state_applied",
                state_hash=event.state_hash.hex(),
                channel=event.channel,
                round=event.round,
            )
        elif isinstance(event, fx.Resync):
            self._events.emit(
                "resync", reason=event.reason, channel=event.channel, round=event.round
            )
        elif isinstance(event, fx.Notice):
            self._events.emit(event.name, **event.fields)
        elif isinstance(event, PeerFault):
            peer = event.peer.hex() if event.peer is not None else ""
            self._events.emit("peer_fault", peer=peer, fault=event.code, why=event.why)
        elif isinstance(event, DhtCrowded):
            self._events.emit("dht_crowded", key=event.key.hex())
        elif isinstance(event, DhtRejoined):
            self._events.emit("dht_rejoined", peer=event.peer.hex())
        elif isinstance(event, JoinFailed):
            self._events.emit("join_refused", reason=f"{event.code}: {event.reason}")
        elif isinstance(event, Conflict):
            self._events.emit("conflicting_certificates", index=event.proof.index)
        elif isinstance(event, Superseded):
            fields = {"old_generation": event.ours, "steward": event.steward.hex()}
            self._events.emit("log_superseded", generation=event.generation, **fields)
        elif isinstance(event, LedgerDiverged):
            hashes = {"state_hash": event.ours.hex(), "expected_hash": event.certified.hex()}
            self._events.emit("ledger_diverged", index=event.index, **hashes)

    def _entry(self, body: e.EntryBody) -> None:
        emit = self._events.emit
        if isinstance(body, e.MemberJoined):
            emit(
                "member_joined",
                peer=body.member.hex(),
                peer_name=body.name,
                trains=body.trains,
                holds_state=body.holds_state,
                votes=body.may_vote,
            )
        elif isinstance(body, e.MemberLeft):
            emit("member_left", peer=body.member.hex(), reason=body.reason)
        elif isinstance(body, e.MemberSuspended):
            emit("member_suspended", peer=body.member.hex(), reason=body.reason)
        elif isinstance(body, e.MemberBanned):
            name = "ban_lifted" if body.lifted else "member_banned"
            emit(name, peer=body.member.hex(), reason=body.reason)
        elif isinstance(body, e.TicketRevoked):
            emit("ticket_revoked", ticket=body.ticket.hex(), reason=body.reason)
        elif isinstance(body, e.AllowChanged):
            listed = {"peer": body.member.hex() or None, "allowed": body.allowed}
            emit("allow_changed", **listed)
        elif isinstance(body, e.FounderChanged):
            emit("founder_changed", peer=body.founder.hex(), reason=body.reason)
        elif isinstance(body, e.StewardsChanged):
            if not body.joint:
                emit("stewards_changed", voters=[v.hex() for v in body.voters])
        elif isinstance(body, e.ModelDefined):
            values = sum(item.values for item in body.layout)
            emit("model_defined", values=values, schema_hash=body.schema_hash.hex())
        elif isinstance(body, e.DataDefined):
            emit("data_defined", samples=body.samples, digest=body.digest.hex())
        elif isinstance(body, e.Paused):
            emit("paused", reason=body.reason)
        elif isinstance(body, e.Resumed):
            emit("resumed", reason=body.reason)
        elif isinstance(body, e.Rewound):
            first = min(body.rounds, default=0)
            emit("rewound", reason=body.reason, generation=body.generation, round=first)
        elif isinstance(body, e.RunEnded):
            emit("run_ended", reason=body.reason)
        elif isinstance(body, e.ConfigChanged):
            fields = {"key": body.key, "value": body.value, "why": body.reason}
            emit("config_changed", round=body.at_round, **fields)
        else:
            self._round(body)

    def _round(self, body: e.EntryBody) -> None:
        emit = self._events.emit
        if isinstance(body, e.RoundOpened):
            emit(
                "round_opened",
                body.key,
                contributors=[c.member.hex() for c in body.contributors],
                parts=len(body.parts),
                holders=[h.hex() for h in body.holders],
            )
        elif isinstance(body, e.RoundSet):
            emit("round_set", body.key, contributors=len(body.coefficients))
        elif isinstance(body, e.RoundCommitted):
            emit("round_committed", body.key, root=body.root.hex())
        elif isinstance(body, e.RoundAborted):
            emit("round_aborted", body.key, reason=body.reason)

    def _stage(self, node: NodeCore, body: e.EntryBody) -> None:
        """Entries of pipelines."""
        emit = self._events.emit
        if isinstance(body, e.StageAssigned):
            peer, stages = body.member.hex(), list(body.stages)
            emit("stage_assigned", peer=peer, stages=stages, reason=body.reason)
        elif isinstance(body, e.StepClosed):
            self._closed = body
            contributors = {c.member for item in body.stages for c in item.contributors}
            emit(
                "step_closed",
                generation=body.generation,
                step=body.step,
                attempt=body.attempt,
                micro_batches=body.micro_batches,
                contributors=len(contributors),
            )
        elif isinstance(body, e.StepOutcome) and body.stages:
            # Whoever replays its log is told of many steps at once: the ledger is behind the last.
            closed, state = self._closed, node.ledger.pipeline
            mine = closed is not None and (closed.step, closed.attempt) == (body.step, body.attempt)
            step = closed if closed is not None and mine else state
            emit(
                "step_committed",
                generation=body.generation,
                step=body.step,
                attempt=body.attempt,
                micro_batches=step.micro_batches,
                loss=step.loss if step.loss >= 0 else None,
                scale=body.scale,
            )
        elif isinstance(body, e.StepOutcome):
            emit(
                "step_aborted",
                generation=body.generation,
                step=body.step,
                attempt=body.attempt,
                reason=body.reason,
            )
        elif isinstance(body, e.StageLost):
            emit(
                "stage_lost",
                stage=body.stage,
                step=body.step,
                host=body.host.hex(),
                reason=body.reason,
            )
        elif isinstance(body, e.StageRecovered):
            emit(
                "stage_recovered",
                stage=body.stage,
                step=body.step,
                host=body.host.hex(),
                candidates=list(body.candidates),
                losses=[round(one, 6) for one in body.losses],
                choice=body.candidates[body.choice],
            )
