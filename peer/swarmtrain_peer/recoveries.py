"""Stages that were lost and how they came back, as this site heard it from the log."""

from __future__ import annotations

from collections import deque
from typing import Any

from swarmtrain_peer import host
from swarmtrain_protocols import entries as e
from swarmtrain_protocols.node_events import LedgerChanged

Document = dict[str, Any]

RECOVERIES_KEPT = 16


class Recoveries:
    """One per peer process of a pipeline run; newest last."""

    def __init__(self) -> None:
        self._kept: deque[Document] = deque(maxlen=RECOVERIES_KEPT)

    def watch(self, event: object) -> None:
        """An event of the node."""
        if not isinstance(event, LedgerChanged):
            return
        now = host.wall_s()
        for _, body, accepted in event.entries:
            if not accepted:
                continue
            if isinstance(body, e.StageLost):
                self._lost(body, now)
            elif isinstance(body, e.StageRecovered):
                self._back(body, now)

    def _open(self, stage: int) -> Document | None:
        found = [one for one in self._kept if one["stage"] == stage and one["choice"] is None]
        return found[-1] if found else None

    def _lost(self, body: e.StageLost, now: float) -> None:
        known = self._open(body.stage)
        if known is not None:
            known["host"] = body.host.hex()  # another one takes it up
            return
        self._kept.append(
            {
                "stage": body.stage,
                "step": body.step,
                "host": body.host.hex(),
                "lost_wall_s": now,
                "back_wall_s": None,
                "choice": None,
                "loss": None,
                "candidates": [],
            }
        )

    def _back(self, body: e.StageRecovered, now: float) -> None:
        found = self._open(body.stage)
        if found is None:
            return  # it was lost before this process began
        scores = zip(body.candidates, body.losses, strict=True)
        found |= {
            "host": body.host.hex(),
            "back_wall_s": now,
            "choice": body.candidates[body.choice],
            "loss": body.losses[body.choice],
            "candidates": [{"name": name, "loss": loss} for name, loss in scores],
        }

    def documents(self) -> list[Document]:
        """Those that are known, oldest first."""
        return [dict(one) for one in self._kept]
