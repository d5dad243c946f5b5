"""What a node tells the layer above, besides the events of rounds, log and DHT."""

from __future__ import annotations

from dataclasses import dataclass

from swarmtrain_protocols import entries as e


@dataclass(frozen=True, slots=True)
class LedgerChanged:
    """Event: these entries were applied (index, body, accepted)."""

    entries: tuple[tuple[int, e.EntryBody, bool], ...]


@dataclass(frozen=True, slots=True)
class JoinFailed:
    """Event: the leader refuses this node for good."""

    code: str
    reason: str
