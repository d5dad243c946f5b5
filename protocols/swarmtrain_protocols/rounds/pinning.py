"""Which state the next round is applied to, where the log does not pin it yet (08 §2.2, rule 5).

One member that has miscomputed a step may be the first to have applied a result. Were the state of
the first that says so pinned, all others would throw theirs away for it. (A bit that flips between
two steps is found without comparison: ``CanonicalState.apply``.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.messages.member import StateReport

NO_MAJORITY = "no state hash has a majority"
"""Why a run is paused that goes on by itself once there is one."""
HASH_PATIENCE_S = 3.0
"""Nobody that is applying a result is waited for any longer."""

Standing = tuple[tuple[bytes, ...], bytes]
"""(holders in member order, state hash)."""


class Pins:
    """The state hashes of one leadership that the log does not pin yet."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._since: dict[str, tuple[int, float]] = {}
        """By channel: a round without a pinned hash, and when somebody first was at it."""
        self._said: dict[str, tuple[int, dict[bytes, bytes]]] = {}
        """By channel: a round, and by member the state that it said to be in there."""
        self._split: dict[str, bool] = {}
        """Channels without a majority; True: nobody is waited for any more."""

    def standing(
        self,
        now: float,
        name: str,
        number: int,
        reports: Mapping[bytes, StateReport],
        present: Sequence[bytes],
    ) -> Standing | None:
        """Present members that are in step at round ``number``, and with which state; or nobody."""
        votes: dict[bytes, list[bytes]] = {}
        for member in present:
            report = reports.get(member)
            holds = self._ledger.members[member].holds_state
            if holds and report is not None and report.round == number and report.ready:
                votes.setdefault(report.state_hash, []).append(member)
        self._split.pop(name, None)
        known = self._ledger.channels[name].pinned_hash(number)
        if known is not None:
            self._since.pop(name, None)
            return (tuple(votes[known]), known) if known in votes else None
        said = self._heard(name, number, votes, reports)
        if not votes:
            self._since.pop(name, None)
            return None
        if self._since.get(name, (-1, 0.0))[0] != number:
            self._since[name] = number, now
        count = Counter(said.values())
        state_hash = max(count, key=lambda found: (count[found], found))
        late = now >= self._since[name][1] + HASH_PATIENCE_S
        coming = 0 if late else self._outstanding(name, number, reports, votes, present)
        if 2 * count[state_hash] > len(said) + coming:
            return (tuple(votes[state_hash]), state_hash) if state_hash in votes else None
        self._split[name] = not coming
        return None

    def _heard(
        self,
        name: str,
        number: int,
        votes: Mapping[bytes, Sequence[bytes]],
        reports: Mapping[bytes, StateReport],
    ) -> dict[bytes, bytes]:
        """Who has said to be in which state at this round, also those that have no link now.

        Else a member whose memory has flipped a bit has the majority while the other cannot be
        heard. Who says something else now is no longer there: it has thrown its state away.
        """
        if self._said.get(name, (-1, {}))[0] != number:
            self._said[name] = number, {}
        said = self._said[name][1]
        for member in [k for k in said if k in reports or k not in self._ledger.members]:
            del said[member]
        for state_hash, group in votes.items():
            said.update(dict.fromkeys(group, state_hash))
        return said

    def tied(self, name: str) -> bool:
        """Members that are in step differ, and nobody is waited for that could decide it."""
        return self._split.get(name, False)

    def is_split(self, name: str) -> bool:
        """Somebody is in step, and no hash had a majority when last asked."""
        return name in self._split

    def deadline(self, now: float) -> float:
        """When somebody is no longer waited for; infinity if nobody is."""
        ends = (since + HASH_PATIENCE_S for _, since in self._since.values())
        return min((end for end in ends if end > now), default=math.inf)

    def _outstanding(
        self,
        name: str,
        number: int,
        reports: Mapping[bytes, StateReport],
        votes: Mapping[bytes, Sequence[bytes]],
        present: Sequence[bytes],
    ) -> int:
        """How many more are applying the last result at this moment, as far as is known.

        Nobody waits for who is gone: a stage of two members stood for seconds when one died.
        """
        done = self._ledger.channels[name].outcome(number - 1)
        held_by = () if done is None else done.held_by
        voted = [member for group in votes.values() for member in group]
        count = 0
        for member in present:
            site, report = self._ledger.members[member], reports.get(member)
            before = report is not None and report.ready and report.round == number - 1
            follows = site.holds_state and self._ledger.follows(member, name)
            if follows and member not in voted and (before or member in held_by):
                count += 1
        return count
