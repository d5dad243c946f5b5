"""Whose bytes an attempt waits for: slow links take turns, and nobody is left out for ever.

A contribution that its maker's uplink cannot deliver in the time that costs nothing is not waited
for, but now and then it is: as often as the waiting costs a tenth of the time, all told. Spec 08
§2.8.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from swarmtrain_protocols.codecs import get_codec
from swarmtrain_protocols.entries import RoundOpened
from swarmtrain_protocols.rounds.unlike import closing_grace_s

BUDGET_SHARE = 0.1
"""Of all time, for waiting for slow links."""
MARGIN = 1.25
"""An uplink also carries other things than a contribution."""


@dataclass(slots=True)
class Turns:
    """Of one channel and leadership."""

    left_out: dict[bytes, int] = field(default_factory=dict)
    """By member: attempts in a row that were committed without a contribution that they list."""

    def decided(self, opened: RoundOpened, counted: Iterable[bytes]) -> None:
        """An attempt was committed; ``counted`` are the members in its set."""
        inside = dict.fromkeys(counted)
        for item in opened.contributors:
            if item.member in inside:
                self.left_out.pop(item.member, None)
            else:
                self.left_out[item.member] = self.left_out.get(item.member, 0) + 1

    def keep(self, members: Iterable[bytes]) -> None:
        """Forget everybody else."""
        known = dict.fromkeys(members)
        self.left_out = {k: count for k, count in self.left_out.items() if k in known}

    def plan(
        self, opened: RoundOpened, rates: Mapping[bytes, float], hidden: bool
    ) -> tuple[bool, tuple[int, ...]]:
        """Whether this attempt waits for whoever is slow, and if not whom it does not wait for.

        ``rates``: bytes per second by member, 0: not known. The second are indices of contributors.
        """
        if not opened.phase_s:
            return False, ()
        nbytes = get_codec(opened.scatter_codec).encoded_nbytes(opened.values)
        window_s = closing_grace_s(opened.phase_s, 0.0, hidden)
        hopeless: list[int] = []
        for index, item in enumerate(opened.contributors):
            waited, rate = self.left_out.get(item.member, 0), rates.get(item.member, 0.0)
            excess_s = MARGIN * nbytes / rate - window_s if rate > 0.0 else 0.0
            if waited >= max(1, math.ceil(excess_s / (BUDGET_SHARE * opened.phase_s))):
                return True, ()
            if excess_s > 0.0:
                hopeless.append(index)
        return False, tuple(hopeless)
