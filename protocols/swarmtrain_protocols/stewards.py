"""How many stewards a run has, and who they are: a choice of the leader, carried out by spec 04.

Voters number 1, 3, 5 or 7: more of them lose less when some are lost, and cost every entry one more
signature. A set changes as seldom as can be, because each change is kept in the log for ever: who
votes goes on voting while it can, and newcomers are taken in the order in which they joined (a
member that has stayed long is likely to stay, as in Kademlia's buckets).
"""

from __future__ import annotations

from collections.abc import Sequence

from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.log.view import SIZES

FIVE_FROM = 8
SEVEN_FROM = 14
"""Members that may vote from which on a run has five and seven stewards, if the manifest leaves it
open: a set that may lose two or three is worth its price where that many come and go."""


def size_wanted(able: int, current: int, asked: int) -> int:
    """How many stewards to aim for.

    ``able`` members could vote now, ``current`` do, ``asked`` is the run key (0: by ``able``). A
    set that was reached is kept as long as it can be filled, so that one member that comes and goes
    does not make it grow and shrink.
    """
    if asked:
        target = asked
    else:
        target = 7 if able >= SEVEN_FROM else 5 if able >= FIVE_FROM else 3
        target = max(target, current)
    return max([n for n in SIZES if n <= min(target, able)], default=1)


def choose(
    ledger: Ledger,
    *,
    me: PeerId,
    linked: Sequence[PeerId],
    leaving: Sequence[bytes],
    asked: int = 0,
) -> tuple[PeerId, ...]:
    """The steward set that the leader ``me`` should aim for, in key order; empty: keep what is.

    Stewards that are cut off stay until the log declares them lost: they may hold the newest
    entries. Only who can be dialled is taken: any steward may come to lead, and joiners have to
    reach it.
    """
    here = {*linked, me}
    able = [
        m
        for m in ledger.ordered_members()
        if ledger.may_vote(m.id) and m.reachable and m.id not in leaving
    ]
    current = [PeerId(m.id) for m in able if m.id in ledger.voters]
    spare = sorted(
        (m for m in able if m.id not in ledger.voters and m.id in here),
        key=lambda m: (m.joined_index, m.ordinal),
    )
    size = size_wanted(len(current) + len(spare), len(ledger.voters), asked)
    # Who leads goes on leading, and of the others those go first that cannot be reached.
    current.sort(key=lambda p: (p != me, p not in here, ledger.members[p].ordinal))
    best = [*current, *(PeerId(m.id) for m in spare)]
    if size == 1:  # alone, it must be there
        best = [p for p in best if p in here]
    return tuple(sorted(best[:size]))
