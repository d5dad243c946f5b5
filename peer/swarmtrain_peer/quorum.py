"""Notices when no majority of stewards answers any more, and when one does again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from swarmtrain_peer import host
from swarmtrain_peer.events import EventLog
from swarmtrain_peer.patience import Patience
from swarmtrain_protocols.node import NodeCore

LOOK_S = 0.25
ASLEEP_S = 2.0
"""A look that comes this late says that this machine stood still, not the others."""


@dataclass(frozen=True, slots=True)
class QuorumChanged:
    """Told to the listeners of a runtime."""

    lost: bool


class QuorumWatch:
    """One per running peer. A leader that has a majority is felt by every member, through whoever
    passes the log on to it; see ``LogCore.silent_s``."""

    def __init__(
        self,
        node: NodeCore,
        events: EventLog,
        tell: Callable[[QuorumChanged], None],
        patience: Patience | None = None,
        *,
        mono_s: Callable[[], float] = host.mono_s,
    ) -> None:
        self._node = node
        self._events = events
        self._tell = tell
        self._patience = patience
        self._mono_s = mono_s
        self._looked_s = self._since_s = mono_s()
        self.lost = False

    @property
    def patience_s(self) -> float:
        """Silence of this length is a loss: two elections fit into it."""
        return self._node.log.timeouts.stale_s

    async def watch(self) -> None:
        """Look for ever."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        now = self._mono_s()
        took_s, self._looked_s = now - self._looked_s, now
        if took_s > ASLEEP_S:
            self._since_s = now
        elif self._patience is not None:
            self._patience.look(now, max(0.0, took_s - LOOK_S))
        silent_s = self._node.log.silent_s(now)
        if self.lost and silent_s < self.patience_s:
            self.lost = False
            self._events.emit("quorum_regained")
            self._tell(QuorumChanged(lost=False))
        elif not self.lost and min(silent_s, now - self._since_s) >= self.patience_s:
            self.lost = True
            self._events.emit("quorum_lost", wait_s=round(silent_s, 3))
            self._tell(QuorumChanged(lost=True))
