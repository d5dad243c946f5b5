"""What this site has computed for a pipeline, and what members tell each other of it.

A passive book on the event loop's thread. Time is an argument, monotonic seconds.
"""

from __future__ import annotations

from collections import deque
from typing import Annotated

import msgspec
from msgspec import Meta

from swarmtrain_peer.roundclock import Span, merge
from swarmtrain_protocols import limits
from swarmtrain_protocols.pipeline.hops import ENDS

WINDOW_S = 10.0
"""Shares and rates are of the last so many seconds."""
SPANS_KEPT = 8192
"""Computations remembered: those of a step with many micro-batches, and of the window."""

Amount = Annotated[int, Meta(ge=0, le=1 << 60)]
Share = Annotated[float, Meta(ge=0, le=1)]
Rate = Annotated[float, Meta(ge=0, le=1e12)]


class StageRow(msgspec.Struct, omit_defaults=True):
    """One stage that a member serves.

    ``busy``: share of the time that went into it; ``rate``: micro-batches per second whose backward
    was done; ``version``: of the stage's state as the log has it; ``ready``: that state is here.
    """

    stage: Annotated[int, Meta(ge=0, lt=limits.HOPS_MAX)]
    version: Amount = 0
    ready: bool = False
    busy: Share = 0.0
    rate: Rate = 0.0
    seconds_per_sample: Rate = 0.0


class StagesBody(msgspec.Struct, tag="stages", tag_field="kind", omit_defaults=True):
    """What a member tells of its work in a pipeline, every second or so; never logged.

    ``queued``: hops that wait or are computed; ``drives``: it may drive micro-batches, and holds
    ``driving`` of the step in progress.
    """

    generation: Amount
    rows: Annotated[list[StageRow], Meta(max_length=limits.CHANNELS_SERVED_MAX)]
    queued: Amount = 0
    drives: bool = False
    driving: Amount = 0
    device: Annotated[str, Meta(max_length=32)] = ""


class WorkLog:
    """Computations of this site's trainer, newest last."""

    def __init__(self, now: float) -> None:
        self._began = now
        self._done: deque[tuple[float, float, int, bool]] = deque(maxlen=SPANS_KEPT)

    def worked(self, now: float, stage: int, hop: int, kind: str, service_s: float) -> None:
        """A hop of ``stage`` was computed in ``service_s`` and is done now."""
        # The embedding's backward is a micro-batch's last; the head's would count it twice.
        whole = kind == "backward" and (stage != ENDS or hop == 0)
        self._done.append((now - max(0.0, service_s), now, stage, whole))

    def shares(self, now: float) -> dict[int, tuple[float, float]]:
        """Stage to (share of the time spent on it, micro-batches per second), in the window."""
        since = max(now - WINDOW_S, self._began)
        length = max(1e-9, now - since)
        found: dict[int, tuple[float, int]] = {}
        for begin, end, stage, whole in reversed(self._done):
            if end <= since:
                break
            seconds, count = found.get(stage, (0.0, 0))
            found[stage] = seconds + end - max(begin, since), count + whole
        return {
            stage: (min(1.0, seconds / length), count / length)
            for stage, (seconds, count) in sorted(found.items())
        }

    def spans(self, begin_s: float, end_s: float) -> list[Span]:
        """When something was computed between these moments: disjoint, in order."""
        return merge(
            [
                (max(begin, begin_s), min(end, end_s))
                for begin, end, _, _ in self._done
                if end > begin_s and begin < end_s
            ]
        )
