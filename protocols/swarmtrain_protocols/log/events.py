"""What the log tells the layer above, and how patient it is."""

from __future__ import annotations

from dataclasses import dataclass

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.entries import EntryBody
from swarmtrain_protocols.log.view import chained
from swarmtrain_protocols.messages.log import Certificate, WireEntry


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One committed entry."""

    index: int
    term: int
    body: EntryBody


@dataclass(frozen=True, slots=True)
class Committed:
    """The next committed entries, in order, each exactly once per incarnation of the core."""

    entries: tuple[LogEntry, ...]


@dataclass(frozen=True, slots=True)
class SnapshotLoaded:
    """Replaces everything derived so far: ``data`` is the ledger with entry ``index`` applied."""

    index: int
    data: bytes


@dataclass(frozen=True, slots=True)
class LeaderChanged:
    """Who leads as far as this site knows; ``None`` while it knows of nobody."""

    leader: PeerId | None
    term: int
    generation: int


@dataclass(frozen=True, slots=True)
class ConflictProof:
    """Both certificates carry a majority, yet their logs differ: somebody signed a lie.

    At ``index`` the two logs have different chain hashes, ``ours_at`` and ``theirs_at``; each leads
    to its certificate by the entries that follow it.
    """

    index: int
    ours: Certificate
    ours_at: bytes
    ours_after: tuple[WireEntry, ...]
    theirs: Certificate
    theirs_at: bytes
    theirs_after: tuple[WireEntry, ...]

    def adds_up(self) -> bool:
        """True if the hashes prove the conflict, given that both certificates are valid."""
        sides = (
            (self.ours, self.ours_at, self.ours_after),
            (self.theirs, self.theirs_at, self.theirs_after),
        )
        for certificate, chain_hash, entries in sides:
            for index, item in enumerate(entries, self.index + 1):
                chain_hash = chained(chain_hash, index, item.term, item.body)
            if chain_hash != certificate.chain_hash:
                return False
        return self.ours_at != self.theirs_at


@dataclass(frozen=True, slots=True)
class Conflict:
    """The log halts here: this core neither sends nor emits anything after it."""

    proof: ConflictProof


@dataclass(frozen=True, slots=True)
class LedgerDiverged:
    """A majority derived another snapshot at ``index`` than this site: its ledger is wrong."""

    index: int
    ours: bytes
    certified: bytes


@dataclass(frozen=True, slots=True)
class Superseded:
    """The founder began the log again without this one: what only this one holds is void.

    ``ours`` is the generation of the log that is given up, ``steward`` began the new one.
    """

    generation: int
    ours: int
    steward: bytes


@dataclass(frozen=True, slots=True)
class LogTimeouts:
    """Patience in seconds. Election timeouts are drawn from ``[election_s, 2 * election_s)``."""

    election_s: float = limits.ELECTION_TIMEOUT_S
    heartbeat_s: float = limits.HEARTBEAT_INTERVAL_S
    factor: float = 1.0
    """By how much they are longer than everybody's."""

    def scaled(self, factor: float) -> LogTimeouts:
        """The same patience on links and machines that are ``factor`` times slower."""
        return LogTimeouts(self.election_s * factor, self.heartbeat_s * factor, factor)

    @property
    def feed_s(self) -> float:
        """Between two signs of life to a subscriber."""
        return self.election_s

    @property
    def silence_s(self) -> float:
        """A subscriber changes its source after hearing nothing for this long."""
        return 3 * self.election_s

    @property
    def stale_s(self) -> float:
        """A source that passed on no new pulse of a leader for this long is as good as silent."""
        return 2 * self.silence_s

    @property
    def lease_s(self) -> float:
        """A subscription that is not renewed for this long is forgotten."""
        return 10 * self.election_s

    @property
    def renew_s(self) -> float:
        """A subscription is renewed this often: whoever feeds it may have the shortest lease."""
        return self.lease_s / self.factor / 3
