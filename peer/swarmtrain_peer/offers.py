"""Snapshots that this site offers to others, and for how long they stay fetchable.

An offer names a mapped file. A newer one takes its place, but whoever has begun to fetch the older
one may finish: it is let go when nobody has asked for it for a while. A mapping outlives the
removal of its file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from swarmtrain_protocols.dataplane import DataPlane
from swarmtrain_protocols.merkle import Blob

IDLE_S = 30.0
"""Between hearing of an offer and asking for it, and between two ranges of a download."""
RETIRED_MAX = 4
"""Old offers of one channel that are kept for those who fetch them."""


@dataclass(slots=True)
class _Offer:
    channel: str
    round: int
    used_s: float
    asked_s: float = -math.inf
    """When somebody asked for some of it; ``used_s`` counts its being offered too."""
    retired: bool = False


class Offers:
    """All methods on the loop's thread, except ``used`` and ``oldest``.

    Args:
        snapshots: the list that the catch-up core offers from, by channel (round, state hash).
        kept: offers per channel, newest last.
        mono_s: the clock.
    """

    def __init__(
        self,
        data: DataPlane,
        snapshots: dict[str, list[tuple[int, bytes]]],
        kept: int,
        mono_s: Callable[[], float],
    ) -> None:
        self._data = data
        self._snapshots = snapshots
        self._kept = kept
        self._mono_s = mono_s
        self._known: dict[bytes, _Offer] = {}

    def add(self, channel: str, round_number: int, blob: Blob) -> None:
        """Offer a state; the oldest offer of its channel goes if there are too many."""
        have = self._snapshots.setdefault(channel, [])
        old = self._known.get(blob.root)
        if old is None:
            self._data.register(blob)
            self._known[blob.root] = _Offer(channel, round_number, self._mono_s())
        elif old.retired:
            old.retired, old.used_s = False, self._mono_s()
        if (round_number, blob.root) not in have:
            have.append((round_number, blob.root))
        while len(have) > self._kept:
            self.retire(have[0][1])
        self.sweep()

    def retire(self, root: bytes) -> None:
        """Offer it no more; whoever fetches it may go on."""
        offer = self._known.get(root)
        if offer is None or offer.retired:
            return
        offer.retired, offer.used_s = True, self._mono_s()
        have = self._snapshots.get(offer.channel, [])
        have[:] = [item for item in have if item[1] != root]

    def retire_beyond(self, channel: str, number: int) -> None:
        """Offer no state of this channel that is later than the one before round ``number``."""
        for root, offer in list(self._known.items()):
            if offer.channel == channel and offer.round > number:
                self.retire(root)

    def withdraw(self, channel: str) -> None:
        """Nothing of this channel is offered or served any more."""
        self._snapshots.pop(channel, None)
        for root in [r for r, offer in self._known.items() if offer.channel == channel]:
            self._let_go(root)

    def knows(self, root: bytes) -> bool:
        """It is, or was, on offer and may be fetched; any thread."""
        return root in self._known

    def used(self, root: bytes) -> None:
        """Somebody asks for chunks of ``root``; any thread."""
        offer = self._known.get(root)
        if offer is not None:
            offer.used_s = offer.asked_s = self._mono_s()

    def fetched_now(self) -> dict[str, list[int]]:
        """By channel the rounds of what somebody has lately asked for; any thread."""
        rounds: dict[str, list[int]] = {}
        since_s = self._mono_s() - IDLE_S
        for offer in list(self._known.values()):
            if offer.asked_s >= since_s:
                rounds.setdefault(offer.channel, []).append(offer.round)
        return rounds

    def oldest(self) -> dict[str, int]:
        """By channel the oldest round that somebody may be fetching; any thread."""
        rounds: dict[str, int] = {}
        for offer in list(self._known.values()):
            rounds[offer.channel] = min(offer.round, rounds.get(offer.channel, offer.round))
        return rounds

    def sweep(self) -> None:
        """Let go of old offers that nobody fetches, and of the oldest if there are too many."""
        now = self._mono_s()
        retired: dict[str, list[bytes]] = {}
        for root in list(self._known):
            offer = self._known[root]
            if offer.retired and now >= offer.used_s + IDLE_S:
                self._let_go(root)
            elif offer.retired:
                retired.setdefault(offer.channel, []).append(root)
        for roots in retired.values():
            for root in roots[: max(0, len(roots) - RETIRED_MAX)]:
                self._let_go(root)

    def _let_go(self, root: bytes) -> None:
        del self._known[root]
        self._data.drop(root)
