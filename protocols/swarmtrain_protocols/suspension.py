"""Members that cost others an attempt: for some rounds nothing depends on them (spec 08 §2.9).

Agreed by the log, so that the next leader knows it too. It is no ban: an honest member on a machine
that stood still is back after a few rounds, one that goes on is out for longer each time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from swarmtrain_protocols import limits
from swarmtrain_protocols.entries import MemberSuspended

if TYPE_CHECKING:
    from swarmtrain_protocols.ledger import Ledger

ROUNDS = 8
DOUBLED_MAX = 7


class Suspension(msgspec.Struct):
    """``until``: number of committed rounds of the run with which it is over."""

    until: int
    times: int
    reason: str


def suspended(ledger: Ledger, index: int, body: MemberSuspended) -> bool:
    """Twice as many rounds as the last time; members that left are remembered, too."""
    known = ledger.suspended.get(body.member)
    if body.member not in ledger.members or is_suspended(ledger, body.member):
        return False
    if known is None and len(ledger.suspended) >= limits.SUSPENSIONS_MAX:
        oldest = min(ledger.suspended, key=lambda k: (ledger.suspended[k].until, k))
        del ledger.suspended[oldest]
    times = 1 if known is None else known.times + 1
    rounds = ROUNDS * 2 ** min(times - 1, DOUBLED_MAX)
    ledger.suspended[body.member] = Suspension(ledger.rounds_committed + rounds, times, body.reason)
    return True


def is_suspended(ledger: Ledger, member: bytes) -> bool:
    """Whether ``member`` owns no part, and trains for nothing, at this point of the log."""
    known = ledger.suspended.get(member)
    return known is not None and ledger.rounds_committed < known.until


def trusted(ledger: Ledger, members: list[bytes]) -> list[bytes]:
    """Those of ``members`` that are not suspended; all of them if nobody else is left."""
    return [k for k in members if not is_suspended(ledger, k)] or members
