"""How many inner steps a phase has here, and how far the run is. Spec 07 §2.5, 08 §2.8.

A trainer that is slower than most does fewer steps in a phase, one that is faster does more, so
that all of them are done at about the same time and nobody waits. How far the run is follows from
what all members have contributed, not from the steps that this one has done.
"""

from __future__ import annotations

STEPS_MIN_SHARE = 1 / 16
STEPS_MAX_SHARE = 2.0
"""Of ``inner_steps``: more would leave the others behind, and the average would be this one's."""
FEW_STEPS = 8
"""Of fewer steps nothing can be told off, and runs that share after every step want just those."""
LEAVE_SHARE = 0.25
"""A trainer does ``inner_steps`` as long as it would not be that much too late, or too early."""
FOLLOW_SHARE = 0.1
"""Once it does not, it follows smaller changes, too."""
PHASES_FIRST = 2
"""So many phases in a row must say so: the first steps of a process are slow."""


class Tempo:
    """Steps of the next phase; those of a phase are kept until it ends.

    Args:
        inner_steps: of the run.
        fragments: channels whose boundaries are spread over a phase.
        steps_min: fewer are of no use (streaming: the result of a phase is used so many steps in).
    """

    def __init__(self, inner_steps: int, fragments: int = 1, steps_min: int = 1) -> None:
        self.steps = inner_steps
        self._fragments = max(1, fragments)
        self._steps_min = steps_min
        self._pace_s = 0.0
        self._round = -1
        self._begin(inner_steps)

    def _begin(self, inner_steps: int) -> None:
        self._usual = inner_steps
        self._least = max(1, self._steps_min, round(inner_steps * STEPS_MIN_SHARE))
        self._most = max(self._least, round(inner_steps * STEPS_MAX_SHARE))
        self._in_a_row = 0

    def retune(self, round_number: int, inner_steps: int) -> None:
        """From this round on ``inner_steps`` are usual; the share of them that fits here stays.

        Fragments come to a round one after the other: what an earlier one says is old news.
        """
        if round_number < self._round:
            return
        self._round = round_number
        if inner_steps == self._usual:
            return
        steps = round(self.steps * inner_steps / self._usual)
        self._begin(inner_steps)
        self.steps = min(self._most, max(self._least, steps))

    def heard(self, pace_s: float) -> None:
        """The swarm's pace: seconds between two contributions of any channel, 0: not known."""
        self._pace_s = max(0.0, pace_s)

    def is_over(self, steps: int, step_s: float) -> bool:
        """Whether a phase of ``steps`` so far, of ``step_s`` each, should end before its time.

        Its steps take longer than when it began: what is ready by the deadline counts.
        """
        if not self._pace_s or self._usual < FEW_STEPS or steps < self._least:
            return False
        return steps * step_s >= (1 + LEAVE_SHARE) * self._pace_s * self._fragments

    def phase_done(self, step_s: float) -> bool:
        """A phase with steps of ``step_s`` is over; true if the next one has another length."""
        if not self._pace_s or not step_s > 0.0 or self._usual < FEW_STEPS:
            return False
        exact = self._pace_s * self._fragments / step_s
        wanted = min(self._most, max(self._least, round(min(exact, self._most))))
        usual = self.steps == self._usual
        margin = LEAVE_SHARE if usual else FOLLOW_SHARE
        if abs(wanted - self.steps) <= margin * self.steps:
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        if usual and self._in_a_row < PHASES_FIRST:
            return False
        if abs(wanted - self._usual) <= FOLLOW_SHARE * self._usual:
            wanted = self._usual
        changed, self.steps = wanted != self.steps, wanted
        return changed


class Progress:
    """Samples of all members that count, as the peer process has said last."""

    def __init__(self) -> None:
        self.samples = 0.0
        self.gain = 0.0
        """What the last round added."""

    def heard(self, samples: float, gain: float) -> None:
        self.samples, self.gain = max(0.0, samples), max(0.0, gain)

    def at(self, share: float) -> float:
        """With ``share`` of the next round's work done, 0 to 1."""
        return self.samples + min(1.0, max(0.0, share)) * self.gain
