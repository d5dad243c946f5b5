"""When this site encoded, sent, received, summed and applied what, by attempt of a round.

A passive book on the event loop's thread: whoever does the work says when it began and ended, in
monotonic seconds. Figures are relative to the moment at which this site saw ROUND_OPENED, so that
those of sites whose clocks differ can be drawn on one axis.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from swarmtrain_protocols.messages import RoundKey

Phase = Literal["send", "receive", "reduce", "apply"]
PHASES: tuple[Phase, ...] = ("send", "receive", "reduce", "apply")
ATTEMPTS_KEPT = 512
"""A step of a pipeline is one attempt per stage, at most 129 of them."""
ROOTS_KEPT = 1024
SPANS_TOLD = 12
"""Of each kind, in figures: neighbours with the smallest gaps between them are told as one."""

Span = tuple[float, float]


def merge(spans: list[Span], most: int = 0) -> list[Span]:
    """The union of ``spans`` as disjoint ones, in order; at most ``most`` (0: any number)."""
    out: list[Span] = []
    for begin, end in sorted(spans):
        if out and begin <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((begin, end))
    while most and len(out) > most:
        gaps = [after[0] - before[1] for before, after in itertools.pairwise(out)]
        at = gaps.index(min(gaps))
        out[at : at + 2] = [(out[at][0], out[at + 1][1])]
    return out


@dataclass(slots=True)
class _Attempt:
    opened_s: float
    spans: dict[Phase, list[Span]] = field(default_factory=lambda: {phase: [] for phase in PHASES})
    bytes_up: int = 0
    bytes_down: int = 0


class RoundClock:
    """One per peer. What it was not told the opening of, it ignores."""

    def __init__(self) -> None:
        self._attempts: OrderedDict[RoundKey, _Attempt] = OrderedDict()
        self._of_root: OrderedDict[bytes, RoundKey] = OrderedDict()

    def opened(self, key: RoundKey, now: float, own: bytes | None = None) -> None:
        """ROUND_OPENED was seen; ``own`` is the root of this site's contribution."""
        self._attempts[key] = _Attempt(now)
        while len(self._attempts) > ATTEMPTS_KEPT:
            self._attempts.popitem(last=False)
        if own is not None:
            self.names(own, key)

    def names(self, root: bytes, key: RoundKey) -> None:
        """Bytes under ``root`` that are sent from now on belong to ``key``."""
        self._of_root[root] = key
        self._of_root.move_to_end(root)
        while len(self._of_root) > ROOTS_KEPT:
            self._of_root.popitem(last=False)

    def latest(self, channel: str, round_number: int) -> RoundKey | None:
        """The last attempt of a round."""
        keys = reversed(self._attempts)
        found = (key for key in keys if (key.channel, key.round) == (channel, round_number))
        return next(found, None)

    def sent(self, root: bytes, nbytes: int, begin_s: float, end_s: float) -> None:
        """Chunks of a blob were handed to the kernel."""
        key = self._of_root.get(root)
        if key is not None and (attempt := self._attempts.get(key)) is not None:
            attempt.bytes_up += nbytes
            attempt.spans["send"].append((begin_s, end_s))

    def received(self, key: RoundKey, nbytes: int, begin_s: float, end_s: float) -> None:
        """A fetch was answered in full."""
        if (attempt := self._attempts.get(key)) is not None:
            attempt.bytes_down += nbytes
            attempt.spans["receive"].append((begin_s, end_s))

    def worked(self, key: RoundKey, phase: Phase, begin_s: float, end_s: float) -> None:
        """A piece of work was done."""
        if (attempt := self._attempts.get(key)) is not None:
            attempt.spans[phase].append((begin_s, end_s))

    def is_busy(self, key: RoundKey) -> bool:
        """This site had a part in the attempt."""
        attempt = self._attempts.get(key)
        return attempt is not None and any(attempt.spans.values())

    def figures(self, keys: Sequence[RoundKey], handed_s: float | None = None) -> dict[str, Any]:
        """What is known of an attempt; empty for one that was not seen to open.

        Several ``keys``: attempts that were opened together, as one.

        ``bytes_up`` and ``bytes_down`` are of chunks of this attempt. A phase that happened has
        ``PHASE_s``, seconds during which it went on, and ``t_PHASE_offset_s``, its first moment
        after ROUND_OPENED; sending and receiving have ``PHASE_spans_s``, pairs of begin and end
        after ROUND_OPENED. ``t_open_offset_s``: when the trainer handed over at ``handed_s``,
        negative if before.
        """
        found = [self._attempts[key] for key in keys if key in self._attempts]
        if not found:
            return {}
        zero = found[0].opened_s
        out: dict[str, Any] = {
            "bytes_up": sum(one.bytes_up for one in found),
            "bytes_down": sum(one.bytes_down for one in found),
        }
        if handed_s is not None:
            out["t_open_offset_s"] = round(handed_s - zero, 6)
        for phase in PHASES:
            spans = merge([span for one in found for span in one.spans[phase]])
            if not spans:
                continue
            out[f"{phase}_s"] = round(sum(end - begin for begin, end in spans), 6)
            out[f"t_{phase}_offset_s"] = round(spans[0][0] - zero, 6)
            if phase in ("send", "receive"):
                out[f"{phase}_spans_s"] = [
                    [round(begin - zero, 4), round(end - zero, 4)]
                    for begin, end in merge(spans, SPANS_TOLD)
                ]
        return out
