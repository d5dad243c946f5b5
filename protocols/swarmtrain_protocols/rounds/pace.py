"""How long exchanges take, and which overlap mode that asks for. Spec 08 §2.7.

A member measures its own exchanges with its own clock and says so with its next contribution. The
leader turns what contributors say into an entry of the log now and then; nobody else decides.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.messages.rounds import Ready

EAGER_FROM = 0.05
"""Share of a phase above which the exchange is worth hiding."""
OFF_BELOW = 0.025
"""Share below which it is not any more: half of that, so that the mode does not swing."""
ROUNDS_TO_EAGER = 4
ROUNDS_TO_OFF = 8
NOTICE_ROUNDS = 2
"""How far ahead of the rounds a change is for: it must be logged before they are opened."""
SECONDS_MAX = 1e7
"""No phase and no exchange is longer; whoever says so is not counted."""


class Pace:
    """A member's own exchanges: from ROUND_OPENED to the state after it, and the encoding."""

    def __init__(self) -> None:
        self._begun: dict[str, tuple[RoundKey, float]] = {}
        self._took_s: dict[str, float] = {}
        self.bytes_per_s: tuple[float, float] = (0.0, 0.0)
        """Up and down, as the shell measures them; 0: not known."""

    def begun(self, now: float, key: RoundKey, encode_s: float) -> None:
        """An attempt was opened that counts an own contribution, encoded in ``encode_s``."""
        if key.channel.startswith("train/"):
            self._begun[key.channel] = key, now - encode_s

    def applied(self, now: float, channel: str, round_number: int) -> None:
        """The state is now the one after ``round_number``."""
        key, since = self._begun.get(channel, (None, now))
        if key is not None and key.round == round_number:
            del self._begun[channel]
            self._took_s[channel] = now - since

    def exchange_s(self, channel: str) -> float:
        """Seconds that the newest exchange took here, 0 before the first."""
        return self._took_s.get(channel, 0.0)


@dataclass(frozen=True, slots=True)
class _Sample:
    """What the contributors of ``round`` said of the exchange before it."""

    round: int
    share: float


class OverlapChoice:
    """The leader's: one leadership long. ``enabled`` is false in runs that name their mode."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._samples: dict[str, deque[_Sample]] = {}
        self._proposed_at = -1

    def opened(self, key: RoundKey, said: Iterable[Ready]) -> None:
        """An attempt was opened with the contributions that these messages announced."""
        if not self._enabled or key.attempt or not key.channel.startswith("train/"):
            return
        shares = [
            ready.exchange_s / ready.phase_s
            for ready in said
            if 0 < ready.phase_s < SECONDS_MAX and 0 < ready.exchange_s < SECONDS_MAX
        ]
        if shares:
            known = self._samples.setdefault(key.channel, deque(maxlen=ROUNDS_TO_OFF))
            known.append(_Sample(key.round, statistics.median_low(shares)))

    def proposal(self, ledger: Ledger) -> e.ConfigChanged | None:
        """A change to log now, or None. What was proposed once is not, until its rounds begin."""
        if not self._enabled or ledger.ended:
            return None
        front = max((channel.round for channel in ledger.train_channels()), default=0)
        last, mode = ledger.overlaps[-1] if ledger.overlaps else (-1, "off")
        if front <= max(last, self._proposed_at):
            return None
        # What is said with round r is how long round r - 1 took, so that was in today's mode.
        rounds = ROUNDS_TO_EAGER if mode == "off" else ROUNDS_TO_OFF
        share = self._share(ledger, last + 1, rounds)
        if share is None:
            return None
        wanted = "eager" if share >= EAGER_FROM else "off" if share < OFF_BELOW else mode
        if wanted == mode:
            return None
        self._proposed_at = front + NOTICE_ROUNDS
        reason = f"the exchange takes {100 * share:.1f} % of a phase"
        return e.ConfigChanged(self._proposed_at, "overlap", wanted, reason)

    def _share(self, ledger: Ledger, first: int, rounds: int) -> float | None:
        """Mean over channels of the median share of their newest rounds, from ``first`` on."""
        medians: list[float] = []
        for channel in ledger.train_channels():
            known = self._samples.get(channel.name, deque())
            shares = [item.share for item in known if first <= item.round <= channel.round]
            if len(shares) < rounds:
                return None
            medians.append(statistics.median(shares[-rounds:]))
        return statistics.fmean(medians) if medians else None
