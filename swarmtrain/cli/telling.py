"""What a demo says while it runs: its members' events, each thing once and in a sentence."""

from __future__ import annotations

from collections.abc import Mapping

from swarmtrain.cli.output import event_line
from swarmtrain_peer.events import Record

LINES = 20
"""Commits are told so often over a whole demo; in between they only count."""
WIDTH_MAX = 160


class Teller:
    """Turns records of all members into lines; the same thing from another member is no news.

    Args:
        names: member's id (hex) to its name.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names
        self._served: dict[str, tuple[int, ...]] = {}
        self._told_served: dict[str, tuple[int, ...]] = {}
        self._losses: set[tuple[int, int]] = set()
        self._first_s: float | None = None

    def committed(self, record: Record, count: int, total: int, now: float) -> str | None:
        """A line for commit ``count`` of ``total``, if it is one of those that are told."""
        if self._first_s is None:
            self._first_s = now
        every = max(1, total // LINES)
        if count % every and count not in (1, total):
            return None
        what = "step" if record["name"] == "step_committed" else "round"
        parts = []
        if record.get("loss") is not None:
            parts.append(f"loss {record['loss']:.3f}")
        if record.get("micro_batches") is not None:
            parts.append(f"{record['micro_batches']} micro-batches")
        if count > 1 and now > self._first_s:
            parts.append(f"one every {(now - self._first_s) / (count - 1):.2f} s")
        return f"{what} {count} of {total}{': ' if parts else ' committed'}{', '.join(parts)}"

    def evaluated(self, record: Record, *, steps: bool) -> str | None:
        """The loss on the held-out text, once whoever tells of it."""
        at = int(record.get("generation") or 0), int(record["round"])
        if at in self._losses:
            return None
        self._losses.add(at)
        what = "step" if steps else "round"
        return f"held-out loss {record['loss']:.3f} after {what} {record['round']}"

    def assigned(self, record: Record) -> None:
        """A member serves other stages from now on; ``coverage`` tells of all of them."""
        self._served[str(record["peer"])] = tuple(record["stages"])

    def coverage(self) -> str | None:
        """Who serves what, if it is not what was told last."""
        if self._served == self._told_served:
            return None
        self._told_served = dict(self._served)
        by_stage: dict[int, list[str]] = {}
        for member, stages in self._served.items():
            for stage in stages:
                by_stage.setdefault(stage, []).append(self._names.get(member, member[:8]))
        return "stages: " + "; ".join(
            f"{f'stage {stage}' if stage else 'ends'} {', '.join(sorted(by_stage[stage]))}"
            for stage in sorted(by_stage)
        )

    @staticmethod
    def trouble(name: str, record: Record) -> str:
        """A warning or an error of a member, with what it is about."""
        return f"{name}: {event_line(record)}"[:WIDTH_MAX]
