"""The leader's last resort: a committed round whose bytes nobody has any more.

If no present state holder can reach the ledger's round for ``DATA_LOSS_S``, the run is rewound in
the open: a new generation starts from the newest state that the log pins and somebody holds. A
data-loss event, never a silent one (DESIGN §5).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.ledger import ZERO_HASH, ChannelState, Ledger
from swarmtrain_protocols.messages.member import StateReport

DATA_LOSS_S = 60.0


class LossWatch:
    """Watches one leadership; make a new one for the next."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def check(
        self, now: float, ledger: Ledger, reports: dict[str, Iterable[StateReport]]
    ) -> e.Rewound | None:
        """A rewind to propose, or None. ``reports`` are those of present members, by channel.

        Never in a pipeline: there a stage is lost and rebuilt, and the others keep theirs (11).
        """
        if ledger.pipeline.stages:
            return None
        overdue = False
        for channel in ledger.train_channels():
            known = list(reports.get(channel.name, ()))
            at_front = any(r.round == channel.round for r in known)
            if at_front or channel.open is not None or not known:
                self._since.pop(channel.name, None)
            elif now >= self._since.setdefault(channel.name, now) + DATA_LOSS_S:
                overdue = True
        if not overdue:
            return None
        targets: list[tuple[str, int, bytes]] = []
        for channel in ledger.train_channels():
            target = self._target(channel, list(reports.get(channel.name, ())))
            if target is not None:
                targets.append((channel.name, *target))
        if len(targets) != len(ledger.train_channels()):
            return None
        self._since.clear()
        return e.Rewound(
            ledger.generation + 1,
            "data loss: no member holds the result of a committed round",
            tuple(name for name, _, _ in targets),
            tuple(number for _, number, _ in targets),
            tuple(root for _, _, root in targets),
        )

    @staticmethod
    def _target(channel: ChannelState, known: list[StateReport]) -> tuple[int, bytes] | None:
        """The newest state that somebody holds and the log pins."""
        usable = [
            (r.round, r.state_hash)
            for r in known
            if r.state_hash != ZERO_HASH
            and r.round <= channel.round
            and channel.pinned_hash(r.round) in (r.state_hash, None)
            and (r.round == channel.round or channel.pinned_hash(r.round) == r.state_hash)
        ]
        return max(usable) if usable else None

    def deadline(self) -> float:
        return min((t + DATA_LOSS_S for t in self._since.values()), default=math.inf)
