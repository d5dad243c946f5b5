"""All that keeps stages from being lost, and brings lost ones back: one part of ``PipelineCore``.

Copies of other stages (``buddy``), the leader's watch (``recovery``), the host's work (``rebuild``)
and the fetches that they share (``collect``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Effect, PeerId
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.messages.member import SnapshotOffer
from swarmtrain_protocols.pipeline.buddy import Buddy
from swarmtrain_protocols.pipeline.collect import Collector
from swarmtrain_protocols.pipeline.errands import Errands
from swarmtrain_protocols.pipeline.rebuild import Rebuilder
from swarmtrain_protocols.pipeline.recovery import RecoveryLeader, RecoveryPolicy
from swarmtrain_protocols.rounds.catchup import CatchUp
from swarmtrain_protocols.rounds.leader import RoundLeader


class Healing:
    """Composes the cores of recovery for one node.

    Args:
        catchup, rounds: of the node: which states are here, and which are elsewhere.
        able: members with a link and a trainer that a stage is assigned to, in member order.
    """

    def __init__(
        self,
        *,
        me: PeerId,
        ledger: Ledger,
        out: list[Effect],
        catchup: CatchUp,
        rounds: RoundLeader,
        errands: Errands,
        connected: Callable[[], list[PeerId]],
        able: Callable[[int], Sequence[PeerId]],
        propose: Callable[[float, e.EntryBody], bool],
        replicas_min: int,
        swapped: bool = False,
        policy: RecoveryPolicy | None = None,
        chunk_values: int = limits.CHUNK_VALUES,
    ) -> None:
        self._catchup = catchup
        self.collector = Collector(
            me=me, ledger=ledger, fetches=catchup.fetches, out=out, chunk_values=chunk_values
        )
        self.buddy = Buddy(
            me=me,
            ledger=ledger,
            out=out,
            collector=self.collector,
            replicas_min=replicas_min,
        )
        self.leader = RecoveryLeader(
            ledger=ledger,
            out=out,
            propose=propose,
            present=rounds.here,
            reported=rounds.reports,
            able=able,
            policy=policy,
        )
        self.host = Rebuilder(
            me=me,
            ledger=ledger,
            out=out,
            collector=self.collector,
            errands=errands,
            connected=connected,
            held=self._held,
            fetching=self._fetching,
            swapped=swapped,
        )

    def _held(self, channel: str) -> tuple[int, bytes] | None:
        track = self._catchup.tracks.get(channel)
        if track is None or track.state_hash is None or track.busy:
            return None
        return track.round, track.state_hash

    def _fetching(self, channel: str) -> bool:
        track = self._catchup.tracks.get(channel)
        return track is not None and (track.busy or track.download is not None)

    def adopt_ledger(self, ledger: Ledger) -> None:
        """A snapshot has replaced the ledger."""
        self.collector.ledger = self.buddy.ledger = ledger
        self.leader.ledger = self.host.ledger = ledger

    def activate(self, now: float, active: bool) -> None:
        """Leadership of the log begins or ends."""
        self.leader.activate(now, active)

    def leader_changed(self, leader: PeerId | None) -> None:
        self.host.leader = leader

    def offered(self, now: float, peer: PeerId, offer: SnapshotOffer) -> None:
        """A peer's snapshots; most offers are answers to the catch-up."""
        self.collector.offered(now, peer, offer)

    def reconcile(self, now: float) -> None:
        """The ledger moved, or a state arrived."""
        self.leader.reconcile(now)
        self.host.reconcile(now)

    def tick(self, now: float) -> None:
        self.collector.tick(now)
        self.buddy.tick(now)
        self.leader.step(now)
        self.host.tick(now)

    def deadline(self) -> float:
        parts = (self.collector, self.buddy, self.leader, self.host)
        return min(part.deadline() for part in parts)
